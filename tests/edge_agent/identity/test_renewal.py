from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import pytest

from broker.drive import Effect
from broker.envelopes import Envelope, down
from broker.identity_messages import Renew
from edge_agent.identity import renewal
from edge_agent.identity.clock import ClockFloor
from edge_agent.identity.folder import IdentityFolder
from edge_agent.identity.keys import valid_until
from edge_agent.identity.renewal import LEFT, Renewal
from tests.crashing_disk import Disk, full_at
from tests.device_identity import DAY_S, Issuer
from tests.tiny import Clock

BEGIN = 1_800_000_000.0
LIFE_D = 30.0


class Device:
    """A device ``d`` whose certificate begins now, on virtual clocks."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.clock = Clock()
        self.clock.now = 5000.0
        self.issuer = Issuer(folder / "authority", wall=self.wall)
        self.identity = self.issuer.enrolled(folder / "device", "d", days=LIFE_D)
        self.floor = ClockFloor(self.identity, wall=self.wall)
        self.renewal = Renewal("d", self.identity, self.floor, clock=self.clock, rng=rng)

    def wall(self) -> float:
        return BEGIN + self.clock.now - 5000.0

    @property
    def until(self) -> float:
        certificate = self.identity.certificate()
        assert certificate is not None
        return valid_until(certificate)

    def tick(self) -> Renew | None:
        effects = self.renewal.tick()
        assert len(effects) <= 1
        return self.question(effects[0]) if effects else None

    def question(self, effect: Effect) -> Renew:
        assert isinstance(effect, Envelope)
        assert isinstance(effect.message, Renew)
        assert (effect.address.device, effect.address.kind) == ("d", "renew")
        return effect.message

    def next_question(self) -> Renew:
        """Let time pass, as the machine wishes, until it asks."""
        for _ in range(100_000):
            if (question := self.tick()) is not None:
                return question
            due = self.renewal.next_tick
            assert due is not None
            self.clock.now = max(due, self.clock.now)
        raise AssertionError("it never asks")

    def hear(self, question: Renew, **changes: Any) -> None:
        assert self.renewal.receive(down("d", self.issuer.answer(question, "d", **changes))) == []


@pytest.fixture(autouse=True)
def _seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every confirmation waits for the disk."""
    monkeypatch.setattr(renewal, "CONFIRM_S", 30 * DAY_S)


@pytest.fixture
def device(tmp_path: Path, rng: random.Random) -> Device:
    return Device(tmp_path, rng)


def test_it_asks_when_about_a_third_of_its_life_is_left(device: Device) -> None:
    device.renewal.connected()
    device.next_question()
    least, most = LEFT
    # What is issued begins an hour early.
    assert least * LIFE_D * DAY_S <= device.until - device.wall() <= most * (LIFE_D * DAY_S + 3600)


def test_devices_enrolled_together_do_not_ask_together(tmp_path: Path, rng: random.Random) -> None:
    times = []
    for number in range(8):
        (folder := tmp_path / str(number)).mkdir()
        device = Device(folder, rng)
        device.renewal.connected()
        device.next_question()
        times.append(device.wall() - BEGIN)
    assert max(times) - min(times) > 3600.0


def test_the_next_certificate_takes_the_place_of_the_last(device: Device) -> None:
    before, key = device.until, device.identity.key_file.read_bytes()
    device.renewal.connected()
    device.hear(device.next_question())
    assert device.until > before
    assert device.identity.key_file.read_bytes() == key
    assert device.tick() is None
    due = device.renewal.next_tick
    assert due is not None
    assert due > device.clock.now


def test_it_goes_on_for_ever(device: Device) -> None:
    device.renewal.connected()
    for _ in range(5):
        device.hear(device.next_question())
        assert device.wall() < device.until
    assert device.wall() > BEGIN + 3 * LIFE_D * DAY_S


def test_it_asks_nothing_without_a_connection(device: Device) -> None:
    assert device.renewal.next_tick is None
    device.clock.advance(29 * DAY_S)
    assert device.tick() is None
    device.renewal.connected()
    assert device.tick() is not None
    device.renewal.disconnected()
    device.clock.advance(DAY_S)
    assert device.tick() is None


def test_an_unanswered_question_is_asked_again_with_its_nonce(device: Device) -> None:
    device.renewal.connected()
    first = device.next_question()
    assert device.tick() is None
    asked = device.wall()
    assert device.next_question() == first
    assert 1800.0 <= device.wall() - asked <= 3600.0


def test_the_less_is_left_the_more_often_it_asks(device: Device) -> None:
    device.clock.advance(LIFE_D * DAY_S - 24.0)
    device.renewal.connected()
    count = 0
    while device.wall() < device.until:
        device.next_question()
        count += 1
    assert 8 < count < 48


def test_it_asks_on_with_a_certificate_that_ends_while_it_is_connected(device: Device) -> None:
    device.renewal.connected()
    device.clock.advance((LIFE_D + 1) * DAY_S)
    device.hear(device.next_question())
    assert device.wall() < device.until


def test_a_new_connection_asks_at_once(device: Device) -> None:
    device.renewal.connected()
    first = device.next_question()
    device.renewal.disconnected()
    device.renewal.connected()
    assert device.tick() == first


def test_a_refusal_is_logged_and_asked_again_later(
    device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    device.renewal.connected()
    first = device.next_question()
    before = device.until
    with caplog.at_level(logging.WARNING):
        device.hear(first, refused="not on the roster", certificate=None)
    assert "not on the roster" in caplog.text
    assert device.until == before
    assert device.tick() is None
    assert device.next_question().nonce != first.nonce


def test_what_was_not_asked_for_is_not_taken(
    device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    device.renewal.connected()
    question = device.next_question()
    before = device.until
    device.hear(question, nonce="another")
    assert device.until == before
    with caplog.at_level(logging.ERROR):
        device.hear(question, certificate=b"rubbish")
    assert "not renewed" in caplog.text
    assert device.until == before
    device.hear(device.next_question())
    assert device.until > before


def test_an_answer_counts_once(device: Device) -> None:
    device.renewal.connected()
    question = device.next_question()
    device.hear(question)
    after = device.identity.device_file.read_bytes()
    device.hear(question)
    assert device.identity.device_file.read_bytes() == after


def test_a_full_disk_leaves_the_old_one_and_is_tried_again(
    device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    device.renewal.connected()
    question = device.next_question()
    before = device.until
    disk = Disk(device.identity.folder, full_at(0, for_good=True))
    with disk.watched(), caplog.at_level(logging.ERROR):
        device.hear(question)
    assert "free some space" in caplog.text
    assert device.until == before
    device.hear(device.next_question())
    assert device.until > before


def test_a_new_connection_does_not_draw_the_time_again(device: Device) -> None:
    device.renewal.connected()
    device.hear(device.next_question())
    before = device.renewal._due
    device.renewal.connected()
    assert device.renewal._due == before


def test_a_certificate_that_came_another_way_is_noticed(device: Device) -> None:
    device.renewal.connected()
    device.clock.advance(60 * DAY_S)
    device.renewal.disconnected()
    folder = device.identity.folder
    device.issuer.enrolled(folder, "d", days=LIFE_D)
    device.renewal.connected()
    assert device.tick() is None


def test_a_damaged_folder_ends_nothing(device: Device, caplog: pytest.LogCaptureFixture) -> None:
    device.identity.device_file.write_bytes(b"rubbish")
    with caplog.at_level(logging.ERROR):
        assert device.renewal.connected() == []
    assert "device.pem" in caplog.text
    device.clock.advance(60 * DAY_S)
    assert device.tick() is None


def test_a_clock_that_stood_still_learns_the_time(tmp_path: Path, rng: random.Random) -> None:
    device = Device(tmp_path, rng)
    slow = ClockFloor(IdentityFolder(device.identity.folder), wall=lambda: 0.0)
    machine = Renewal("d", device.identity, slow, clock=device.clock, rng=rng)
    machine.connected()
    device.clock.advance(29 * DAY_S)
    # By its own clock it is not time yet; a question of another day is answered today.
    assert slow.now() < device.wall() - 28 * DAY_S
    slow.confirm(BEGIN + 25 * DAY_S)
    (effect,) = machine.tick()
    machine.receive(down("d", device.issuer.answer(device.question(effect), "d")))
    assert slow.now() == device.wall()


def test_the_floor_follows_the_clock_while_there_is_a_connection(device: Device) -> None:
    device.clock.advance(3 * DAY_S)
    assert ClockFloor(device.identity, wall=lambda: 0.0).now() <= BEGIN
    device.renewal.connected()
    device.tick()
    assert ClockFloor(device.identity, wall=lambda: 0.0).now() == BEGIN + 3 * DAY_S
