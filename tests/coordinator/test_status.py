from __future__ import annotations

import sys
import threading
from typing import Any

import pytest

from broker.messages import Status, Telemetry
from broker.training_messages import Report
from coordinator import snapshot
from coordinator.health import Health
from coordinator.status import DeviceStatus, FleetStatus
from tests.fake_coordinator import Harness

WELL = Health(ok=True, broker_connected=True)


def status(server: Harness) -> FleetStatus:
    """As it comes out of HTTP."""
    return FleetStatus.model_validate_json(server.core.status(WELL).model_dump_json())


def row(server: Harness, name: str) -> DeviceStatus:
    (found,) = [device for device in status(server).devices if device.name == name]
    return found


def account(server: Harness, **changes: Any) -> Report:
    run, number, attempt = server.round.stamp
    return Report(run=run, round=number, attempt=attempt, **changes)


def make_telemetry(number: int, predictions: dict[str, float]) -> Telemetry:
    return Telemetry(
        boot="b",
        number=number,
        uptime_s=0.0,
        cut=2,
        device_class="raspberry-pi-4",
        radio="wifi",
        counters={"predictions": predictions},
    )


def test_a_coordinator_that_waits_for_devices() -> None:
    server = Harness(min_devices=2, fleet="garden")
    server.clock.now += 12.5
    found = status(server)
    assert (found.fleet, found.phase, found.version, found.rounds) == ("garden", "gathering", 0, 2)
    assert found.run == server.round.run
    assert found.uptime_s == 12.5
    assert found.round is None
    assert found.closed is None
    assert found.devices == []
    assert found.health == WELL


def test_a_round_under_way() -> None:
    server = Harness(min_devices=2)
    server.join("a", 3)
    server.join("b", 2)
    server.clock.now += 4.0
    server.send("a", 0, 1)
    found = status(server)
    assert (found.online, found.known, found.phase) == (2, 2, "training")
    current = found.round
    assert current is not None
    assert (current.number, current.attempt, current.version) == (1, 0, 0)
    assert (current.batches, current.quota) == (2, 6)
    assert (current.participants, current.finished) == (2, 0)
    assert (current.seconds, current.deadline_s) == (4.0, 96.0)
    assert current.loss.keys() == {"3"}
    assert current.loss["3"] > 0
    a = row(server, "a")
    assert (a.cut, a.state, a.software, a.share) == (3, "online", "test", 1.0)
    assert (a.samples, a.open_samples) == (0, 16)
    assert a.credits > 0
    assert (a.bytes_up, a.bytes_down) == (7, 0)
    assert found.bytes == {"up/activation": 7}


def test_samples_are_neither_lost_nor_counted_twice_over_a_round() -> None:
    server = Harness(rounds=3)
    server.join("a", 2)
    totals = []
    for _ in range(2):
        for batch in range(3):
            server.send("a", batch)
            a = row(server, "a")
            totals.append(a.samples + a.open_samples)
        server.upload("a")
    assert totals == [8, 16, 24, 32, 40, 48]
    closed = status(server).closed
    assert closed is not None
    assert (closed.number, closed.version, closed.samples) == (2, 2, 24)


def test_what_a_device_reported_and_when_it_was_heard() -> None:
    server = Harness()
    server.join("a", 2)
    assert row(server, "a").exit_loss is None
    server.hear("a", account(server, exit_loss=0.5, exit_accuracy=0.75))
    server.clock.now += 30.0
    a = row(server, "a")
    assert (a.exit_loss, a.exit_accuracy, a.heard_s) == (0.5, 0.75, 30.0)
    server.hear("a", Status(state="online", connection="c1", phase="training"))
    assert (row(server, "a").heard_s, row(server, "a").state) == (0.0, "training")
    server.clock.now += 60.0
    server.offline("a")
    assert row(server, "a").heard_s == 60.0, "a last will is not the device's word"


def test_who_answered_and_on_what_kind_of_device() -> None:
    server = Harness(min_devices=3)
    server.join("a", 2)
    server.join("b", 3)
    assert row(server, "a").device_class == ""
    server.hear("a", make_telemetry(1, {"exit": 10, "server": 4}))
    server.hear("a", make_telemetry(2, {"exit": 12, "server": 4, "fallback": 1}))
    server.hear("b", make_telemetry(1, {"exit": 1}))
    a = row(server, "a")
    assert a.device_class == "raspberry-pi-4"
    assert a.predictions == {"exit": 12, "server": 4, "fallback": 1}
    assert status(server).predictions == {"exit": 13, "server": 4, "fallback": 1}


def test_who_does_not_train_is_marked() -> None:
    server = Harness(min_devices=3)
    server.join("a", 2)
    server.join("small", 2, frozen=True)
    assert [device.frozen for device in status(server).devices] == [False, True]


def test_after_a_restart_devices_are_there_but_have_not_been_heard() -> None:
    first = Harness(rounds=3)
    first.join("a", 2)
    first.train("a")
    a = row(Harness(first.folder, rounds=3), "a")
    assert (a.state, a.heard_s, a.samples, a.cut) == ("offline", None, 24, 2)


def test_a_version_chosen_by_hand_is_marked() -> None:
    server = Harness(rounds=3)
    server.join("a", 2)
    server.train("a")
    assert status(server).serving.version == 1
    server.core.pin(0)
    serving = status(server).serving
    assert (serving.version, serving.pinned) == (0, True)


def test_devices_beyond_the_bound_are_left_out_those_offline_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(snapshot, "MOST_DEVICES", 2)
    server = Harness(min_devices=5)
    for name in ("a", "b", "c"):
        server.join(name, 2)
    server.offline("a")
    found = status(server)
    assert [device.name for device in found.devices] == ["b", "c"]
    assert (found.known, found.left_out) == (3, 1)
    assert found.states == {"online": 2, "offline": 1}


def test_it_can_be_taken_from_another_thread_at_any_time() -> None:
    server = Harness(rounds=4, min_devices=2)
    server.join("z", 2)
    over = threading.Event()
    problems: list[BaseException] = []

    def look() -> None:
        try:
            while not over.is_set():
                server.core.status(WELL)
        except BaseException as exc:  # noqa: BLE001 whatever it is, the test shows it
            problems.append(exc)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    lookers = [threading.Thread(target=look) for _ in range(2)]
    try:
        for looker in lookers:
            looker.start()
        for number in range(60):
            server.join(f"d{number}", 1 + number % 3)
        for _ in range(3):
            server.train("z", *(f"d{number}" for number in range(0)))
            server.offline("d1")
            server.online("d1", "c2")
    finally:
        over.set()
        for looker in lookers:
            looker.join()
        sys.setswitchinterval(before)
    assert problems == []
