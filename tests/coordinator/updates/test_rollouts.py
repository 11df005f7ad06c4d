"""Rollouts stage by stage, with devices that do as they are told, or do not."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from broker.drive import Effect
from broker.envelopes import Envelope, up
from broker.fields import Message
from broker.messages import Command, Status
from broker.update_messages import PIECE_BYTES, Fetch, Piece, Software, Update
from coordinator.identity.roster import FILE, Member, Roster
from coordinator.updates.book import Rollout, RolloutBook
from coordinator.updates.rollouts import (
    LOOK_S,
    SETTLE_S,
    TELL_AGAIN_S,
    Rollouts,
    bundle_file,
    chosen,
)
from tests.tiny import Clock

BUNDLE = bytes(range(256)) * 3000


class Fleet:
    """A coordinator's rollouts and its devices, each running a version."""

    def __init__(self, folder: Path, devices: int) -> None:
        self.folder = folder
        self.clock = Clock()
        self.names = [f"cam-{number:02d}" for number in range(devices)]
        roster = Roster(folder / FILE, create=True)
        for name in self.names:
            kind = "pi4" if name.endswith(("0", "1")) else "generic"
            roster.put_device(Member(name, "active", name, None, "", kind, "", 0.0))
        roster.close()
        bundle_file(folder, hashlib.sha256(BUNDLE).hexdigest()).write_bytes(BUNDLE)
        self.restart()

    def restart(self) -> None:
        """Another life of the coordinator."""
        roster = Roster(self.folder / FILE)
        self.book = RolloutBook(roster, clock=self.clock)
        self.machine = Rollouts(self.book, self.folder, clock=self.clock)
        self.machine.connected()
        self.clock.now += SETTLE_S

    def online(self, *names: str) -> None:
        for name in names:
            self.says(name, "1.0", "running")

    def hear(self, device: str, message: Message) -> list[Message]:
        return said(self.machine.receive(up(device, message)))

    def says(self, device: str, version: str, state: Any, **about: Any) -> list[Message]:
        return self.hear(device, Software(version=version, state=state, **about))

    def begin(self, **changes: Any) -> Rollout:
        about: dict[str, Any] = {
            "id": "r1",
            "made": 1.0,
            "version": "1.1",
            "sha256": hashlib.sha256(BUNDLE).hexdigest(),
            "size": len(BUNDLE),
            "url": None,
            "stages": ("10%", "50%", "100%"),
            "error_threshold": 0.2,
            "prove_s": 600.0,
            "patience_s": 3600.0,
        }
        rollout = Rollout(**about | changes)
        self.book.put(rollout)
        return rollout

    def tick(self, seconds: float = LOOK_S) -> dict[str, Update]:
        """Device → what it is told to run."""
        self.clock.now += seconds
        told = {}
        for effect in self.machine.tick():
            assert isinstance(effect, Envelope)
            assert isinstance(effect.message, Command)
            assert effect.message.update is not None
            assert effect.address.device is not None
            told[effect.address.device] = effect.message.update
        return told

    def install(self, device: str, version: str = "1.1", rollout: str = "r1") -> None:
        for state in ("fetching", "installing"):
            assert self.says(device, "1.0", state, rollout=rollout) == []
        assert self.says(device, version, "proving", rollout=rollout) == [Command(command="proven")]
        assert self.says(device, version, "running") == []

    def rollout(self, name: str = "r1") -> Rollout:
        return next(rollout for rollout in self.book.rollouts() if rollout.id == name)

    def progress(self, name: str = "r1") -> dict[str, str]:
        return {part.device: part.progress for part in self.book.parts(name)}


def said(effects: Sequence[Effect]) -> list[Message]:
    return [effect.message for effect in effects if isinstance(effect, Envelope)]


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    made = Fleet(tmp_path, 20)
    yield made
    made.book.roster.close()


def test_stage_after_stage_to_the_end(fleet: Fleet) -> None:
    fleet.online(*fleet.names)
    fleet.begin()
    sizes = []
    while fleet.rollout().state == "running":
        told = fleet.tick()
        for device, update in told.items():
            assert update.version == "1.1"
            fleet.install(device)
        if told:
            sizes.append(len(told))
    assert sizes == [2, 8, 10]
    assert fleet.rollout().state == "done"
    assert set(fleet.progress().values()) == {"done"}


def test_too_many_failures_stop_it(fleet: Fleet) -> None:
    fleet.online(*fleet.names)
    fleet.begin()
    first, second = fleet.tick()
    fleet.install(first)
    fleet.says(second, "1.0", "failed", rollout="r1", detail="it did not start")
    assert fleet.tick() == {}
    assert (fleet.rollout().state, fleet.rollout().stage) == ("stopped", 0)
    assert "1 of 2 devices failed" in fleet.rollout().reason
    assert len(fleet.progress()) == 2


def test_few_failures_do_not(fleet: Fleet) -> None:
    fleet.online(*fleet.names)
    fleet.begin(stages=("50%", "100%"))
    told = list(fleet.tick())
    for device in told[1:]:
        fleet.install(device)
    fleet.says(told[0], "1.0", "failed", rollout="r1", detail="a full disk")
    fleet.tick()
    assert (fleet.rollout().state, fleet.rollout().stage) == ("running", 1)
    assert len(fleet.tick()) == 10
    assert fleet.says(told[0], "1.0", "failed", rollout="r1") == []


def test_who_is_away_gets_its_turn_when_it_comes_back(fleet: Fleet) -> None:
    away = fleet.names[3]
    fleet.online(*(name for name in fleet.names if name != away))
    fleet.begin(stages=("100%",))
    for device in fleet.tick():
        fleet.install(device)
    fleet.tick()
    assert fleet.rollout().state == "done"
    assert fleet.progress()[away] == "waiting"
    (answer,) = fleet.says(away, "1.0", "running")
    assert isinstance(answer, Command)
    assert answer.command == "update"
    fleet.install(away)
    assert fleet.progress()[away] == "done"


def test_a_canary_that_nobody_has_tried_is_not_over(fleet: Fleet) -> None:
    fleet.begin()
    for _ in range(3):
        assert fleet.tick() == {}
    assert (fleet.rollout().state, fleet.rollout().stage) == ("running", 0)


def test_a_device_that_began_and_fell_silent_has_failed(fleet: Fleet) -> None:
    fleet.online(*fleet.names)
    rollout = fleet.begin(stages=("100%",))
    silent, *others = fleet.tick()
    for device in others:
        fleet.install(device)
    fleet.says(silent, "1.0", "installing", rollout="r1")
    fleet.tick(rollout.patience_s - 10)
    assert fleet.progress()[silent] == "working"
    fleet.tick(20)
    assert fleet.progress()[silent] == "failed"
    assert fleet.rollout().state == "done"


def test_the_word_of_a_stopped_rollout_is_kept_where_it_was_given(fleet: Fleet) -> None:
    fleet.online(*fleet.names)
    fleet.begin()
    first, second = fleet.tick()
    fleet.says(first, "1.0", "installing", rollout="r1")
    fleet.book.put(replace(fleet.rollout(), state="stopped"))
    assert fleet.tick(TELL_AGAIN_S) == {}
    assert fleet.says(second, "1.0", "running") == []
    assert fleet.says(first, "1.1", "proving", rollout="r1") == [Command(command="proven")]


def test_who_does_not_answer_is_told_again(fleet: Fleet) -> None:
    fleet.online(*fleet.names)
    fleet.begin(stages=("100%",))
    assert len(fleet.tick()) == 20
    assert fleet.tick() == {}
    assert len(fleet.tick(TELL_AGAIN_S)) == 20


def test_it_goes_on_in_another_life_of_the_coordinator(fleet: Fleet) -> None:
    fleet.online(*fleet.names)
    fleet.begin(stages=("10%", "100%"))
    first, second = fleet.tick()
    fleet.install(first)
    fleet.says(second, "1.0", "fetching", rollout="r1")
    fleet.book.roster.close()
    fleet.restart()
    fleet.online(*fleet.names)
    fleet.tick()
    assert fleet.rollout().stage == 0
    fleet.install(second)
    fleet.tick()
    assert len(fleet.tick()) == 18


def test_a_later_rollout_wins(fleet: Fleet) -> None:
    fleet.online(*fleet.names)
    fleet.begin(stages=("100%",))
    for device in fleet.tick():
        fleet.install(device)
    fleet.tick()
    fleet.begin(id="r2", made=2.0, version="1.2", stages=("cam-0*",))
    told = fleet.tick()
    assert set(told) == {f"cam-0{number}" for number in range(10)}
    assert {update.rollout for update in told.values()} == {"r2"}
    assert fleet.says("cam-15", "1.1", "running") == []


def test_a_version_nobody_asked_for_is_not_proven(fleet: Fleet) -> None:
    fleet.online(*fleet.names)
    assert fleet.says("cam-00", "6.6.6", "proving", rollout="r9") == []
    fleet.begin(stages=("100%",))
    fleet.tick()
    assert fleet.says("cam-00", "6.6.6", "proving", rollout="r1") == []


def test_retired_and_revoked_devices_have_no_part(fleet: Fleet) -> None:
    member = fleet.book.roster.device("cam-00")
    assert member is not None
    fleet.book.roster.put_device(replace(member, state="revoked"))
    fleet.online(*fleet.names)
    fleet.begin(stages=("100%",))
    assert "cam-00" not in fleet.tick()


def test_pieces_are_those_of_the_bundle(fleet: Fleet) -> None:
    rollout = fleet.begin()
    found = b""
    while len(found) < len(BUNDLE):
        (piece,) = fleet.hear("cam-00", Fetch(sha256=rollout.sha256, offset=len(found)))
        assert isinstance(piece, Piece)
        assert 0 < len(piece.data) <= PIECE_BYTES
        found += bytes(piece.data)
    assert found == BUNDLE


def test_other_files_are_not_given_out(fleet: Fleet) -> None:
    bundle_file(fleet.folder, "0" * 64).write_bytes(b"secret")
    assert fleet.hear("cam-00", Fetch(sha256="0" * 64, offset=0)) == [
        Piece(sha256="0" * 64, offset=0, data=b"")
    ]
    rollout = fleet.begin()
    (beyond,) = fleet.hear("cam-00", Fetch(sha256=rollout.sha256, offset=2**40))
    assert beyond == Piece(sha256=rollout.sha256, offset=2**40, data=b"")
    bundle_file(fleet.folder, rollout.sha256).unlink()
    (gone,) = fleet.hear("cam-00", Fetch(sha256=rollout.sha256, offset=0))
    assert gone == Piece(sha256=rollout.sha256, offset=0, data=b"")


def test_stages_by_share_name_and_class(fleet: Fleet) -> None:
    members = fleet.book.members()
    rollout = fleet.begin(stages=("class:pi4", "cam-1*", "100%"))
    assert {*chosen(rollout, members)} == {"cam-00", "cam-01", "cam-10", "cam-11"}
    assert len(chosen(replace(rollout, stage=1), members)) == 12
    assert len(chosen(replace(rollout, stage=2), members)) == 20
    tiny = replace(rollout, stages=("0.1%",))
    assert len(chosen(tiny, members)) == 1
    assert chosen(tiny, members) != chosen(replace(tiny, id="r3"), members)
    assert chosen(tiny, {}) == []


def test_bundles_are_signed_one_after_the_other_whatever_the_clock_does(fleet: Fleet) -> None:
    found = []
    for now in (1000.5, 1000.9, 4_000_000_000.0, 900.0):
        fleet.clock.now = now
        found.append(fleet.book.next_signed())
    assert found == [1000, 1001, 4_000_000_000, 4_000_000_001]


def test_a_device_that_takes_no_updates_holds_up_nobody(fleet: Fleet) -> None:
    deaf, *others = fleet.names
    fleet.online(*others)
    fleet.hear(deaf, Status(state="online", connection="c"))
    fleet.begin(stages=("100%",))
    told = fleet.tick()
    assert deaf not in told
    for device in told:
        fleet.install(device)
    fleet.tick()
    assert fleet.rollout().state == "done"


def test_who_goes_away_is_not_waited_for(fleet: Fleet) -> None:
    away, *others = fleet.names
    fleet.online(*fleet.names)
    fleet.begin(stages=("100%",))
    fleet.tick()
    for device in others:
        fleet.install(device)
    fleet.tick()
    assert fleet.rollout().state == "running"
    fleet.hear(away, Status(state="offline", connection="c"))
    fleet.tick()
    assert fleet.rollout().state == "done"


def test_no_stage_is_over_before_devices_can_have_come_back(fleet: Fleet) -> None:
    fleet.online(*fleet.names)
    fleet.begin(stages=("10%", "50%", "100%"))
    first, second = fleet.tick()
    fleet.install(first)
    fleet.book.roster.close()
    fleet.restart()
    fleet.machine.disconnected()
    for _ in range(10):  # the broker is away, and with it everybody
        fleet.tick(600.0)
    assert (fleet.rollout().stage, fleet.progress()[second]) == (0, "waiting")
    fleet.machine.connected()
    fleet.tick(SETTLE_S / 2)
    assert fleet.rollout().stage == 0
    fleet.online(second)
    fleet.tick(SETTLE_S)
    assert fleet.rollout().stage == 0
    fleet.install(second)
    fleet.tick()
    assert fleet.rollout().stage == 1


def test_nobody_falls_silent_because_the_broker_was_away(fleet: Fleet) -> None:
    fleet.online(*fleet.names)
    rollout = fleet.begin(stages=("100%",))
    working = next(iter(fleet.tick()))
    fleet.says(working, "1.0", "installing", rollout="r1")
    fleet.machine.disconnected()
    fleet.tick(2 * rollout.patience_s)
    fleet.machine.connected()
    fleet.tick(SETTLE_S)
    assert fleet.progress()[working] == "working"
    fleet.tick(rollout.patience_s + 10)
    assert fleet.progress()[working] == "failed"


def test_one_that_may_fail_wholly_stops_when_everybody_has(fleet: Fleet) -> None:
    fleet.online(*fleet.names)
    fleet.begin(error_threshold=1.0)
    first, second = fleet.tick()
    fleet.says(first, "1.0", "failed", rollout="r1")
    fleet.tick()
    assert fleet.rollout().state == "running"
    fleet.says(second, "1.0", "failed", rollout="r1")
    fleet.tick()
    assert (fleet.rollout().state, fleet.rollout().reason) == ("stopped", "2 of 2 devices failed")
