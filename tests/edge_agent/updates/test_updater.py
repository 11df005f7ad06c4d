"""A device's updates, message by message, with a coordinator of dictionaries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from broker.envelopes import to_all
from broker.messages import Command, Coordinator
from broker.update_messages import Fetch, Piece, Software
from coordinator.identity.authority import Authority
from edge_agent.updates.fetching import PartialBundle
from edge_agent.updates.updater import ASK_AGAIN_S, GIVE_UP_S
from tests import bundles
from tests.updating_device import PIECE, Lab, said, states, take


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("authority"), bundles.FLEET)


@pytest.fixture
def lab(tmp_path: Path, authority: Authority) -> Lab:
    return Lab(tmp_path, authority)


def test_from_the_announcement_to_the_proof(lab: Lab) -> None:
    assert states(lab.updater.connected()) == ["running"]
    effects = lab.announce()
    assert states(effects) == ["fetching"]
    assert lab.fetch_all(effects) == []
    assert states(lab.run()) == ["installing"]
    assert lab.updater.finished
    assert len(lab.wheels) == 2
    assert lab.slots.current == "1.1.0"

    effects = lab.boot("1.1.0").connected()
    assert said(effects, Software) == [Software(version="1.1.0", state="proving", rollout="r1")]
    lab.clock.now += ASK_AGAIN_S
    assert states(lab.updater.tick()) == ["proving"]
    assert states(lab.hear(Command(command="proven"))) == ["running"]
    assert not lab.slots.on_trial
    assert lab.updater.next_tick is None
    assert states(lab.announce()) == ["running"]


def test_a_piece_that_is_lost_is_asked_for_again(lab: Lab) -> None:
    (first,) = said(lab.announce(), Fetch)
    (second,) = said(lab.answer(first), Fetch)
    assert second.offset == PIECE
    assert lab.answer(first) == []
    lab.clock.now += ASK_AGAIN_S
    assert said(lab.updater.tick(), Fetch) == [second]
    assert said(lab.updater.connected(), Fetch) == [second]


def test_another_life_of_the_coordinator_is_told(lab: Lab) -> None:
    first, second = (to_all(Coordinator(state="online", boot=boot)) for boot in ("b1", "b2"))
    assert states(lab.updater.receive(first)) == ["running"]
    assert lab.updater.receive(first) == []
    (fetch,) = said(lab.announce(), Fetch)
    effects = lab.updater.receive(second)
    assert (states(effects), said(effects, Fetch)) == (["fetching"], [fetch])


def test_a_fetch_goes_on_after_a_restart(lab: Lab) -> None:
    (first,) = said(lab.announce(), Fetch)
    lab.answer(first)
    lab.boot("1.0.0").connected()
    (again,) = said(lab.announce(), Fetch)
    assert again.offset == PIECE


def test_the_same_announcement_again_changes_nothing(lab: Lab) -> None:
    lab.announce()
    assert lab.announce() == []


def test_another_announcement_replaces_the_one_before(lab: Lab) -> None:
    lab.fetch_all(lab.announce())
    lab.updater.work()
    effects = lab.announce(rollout="r2", sha256="0" * 64)
    assert lab.installations[0].cancelled
    assert [fetch.offset for fetch in said(effects, Fetch)] == [0]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"version": "1.2.0"}, "announced was 1.2.0"),
        ({"sha256": "0" * 64}, "checksum"),
        ({"size": 1000}, "longer than was announced"),
    ],
)
def test_what_is_not_as_announced_fails(lab: Lab, changes: dict[str, Any], says: str) -> None:
    effects = lab.fetch_all(lab.announce(**changes)) + lab.run()
    (last,) = said(effects, Software)
    assert (last.state, last.rollout) == ("failed", "r1")
    assert says in last.detail
    assert lab.installations == []
    assert not lab.updater.finished
    assert lab.slots.current == "-"


def test_a_bundle_of_another_fleet_fails(lab: Lab, tmp_path: Path) -> None:
    lab.authority = Authority.create(tmp_path / "stranger", bundles.FLEET)
    lab.fetch_all(lab.announce())
    (last,) = said(lab.run(), Software)
    assert "not signed by this fleet" in last.detail


def test_what_failed_is_tried_again_only_for_another_rollout(lab: Lab) -> None:
    lab.problem = "no matching distribution"
    lab.fetch_all(lab.announce())
    assert states(lab.run()) == ["installing", "failed"]
    assert lab.updater.next_tick is None
    assert states(lab.announce()) == ["failed"]
    assert states(lab.boot("1.0.0").connected()) == ["failed"]
    assert states(lab.announce(rollout="r2")) == ["fetching"]


def test_a_coordinator_without_the_bundle_says_so(lab: Lab) -> None:
    (fetch,) = said(lab.announce(), Fetch)
    effects = lab.hear(Piece(sha256=fetch.sha256, offset=0, data=b""))
    assert "any more" in said(effects, Software)[0].detail


def test_a_fetch_that_gets_nothing_is_given_up(lab: Lab) -> None:
    lab.announce()
    lab.clock.now += GIVE_UP_S + 1
    assert states(lab.updater.tick()) == ["failed"]


def test_a_full_disk_fails_the_update_not_the_agent(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> bool:
        raise OSError(28, "No space left on device")

    (fetch,) = said(lab.announce(), Fetch)
    monkeypatch.setattr(PartialBundle, "add", full)
    assert "No space left" in said(lab.answer(fetch), Software)[0].detail


def test_nothing_new_is_begun_on_trial(lab: Lab) -> None:
    lab.fetch_all(lab.announce())
    lab.run()
    lab.boot("1.1.0")
    assert lab.announce(version="1.2.0", rollout="r2") == []


def test_rubbish_is_ignored(lab: Lab) -> None:
    assert lab.hear(Piece(sha256="0" * 64, offset=0, data=b"x")) == []
    assert lab.hear(Command(command="proven")) == []
    assert lab.hear(Command(command="update")) == []
    lab.announce()
    assert lab.hear(Piece(sha256="0" * 64, offset=0, data=b"x")) == []
    assert lab.hear(Piece(sha256=lab.update().sha256, offset=5, data=b"x")) == []


def test_a_bundle_signed_before_the_one_that_runs_is_refused(lab: Lab) -> None:
    assert take(lab, 1_800_000_000, "1.2.0", "r1").state == "running"
    replayed = take(lab, 1_700_000_000, "1.1.0", "r2")
    assert (replayed.state, replayed.version, replayed.rollout) == ("failed", "1.2.0", "r2")
    assert replayed.detail.startswith("downgrade: version 1.1.0 was signed 2023-11-14 22:13:20Z")
    assert "splitfleet bundle" in replayed.detail
    assert lab.slots.current == "1.2.0"
    again = take(lab, 1_800_000_001, "1.1.0", "r3")
    assert (again.state, again.version) == ("running", "1.1.0")


def test_a_bundle_that_did_not_prove_itself_does_not_count(lab: Lab) -> None:
    lab.slots.try_out("9.9", "r1", signed=1_900_000_000, prove_s=600)
    (lab.slots.folder / "trial").unlink()
    (lab.slots.folder / "current").unlink()
    assert take(lab, 1_800_000_000, "1.2.0", "r2").state == "running"
