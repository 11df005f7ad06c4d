from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from broker.drive import Effect, Subscribe
from broker.envelopes import Envelope, down, down_later, to_all, to_cut, up
from broker.messages import (
    Activations,
    Assignment,
    Coordinator,
    Gradients,
    Hello,
    Manifest,
    Receipt,
    Report,
    Request,
)
from broker.topics import COORDINATOR, Topics
from coordinator.store import Checkpoint
from ops.errors import FleetFailed
from ops.inprocess import FleetInProcess, Pump, VirtualClock
from tests.tiny import assert_same, make_assignment, make_device_data, make_hello, make_settings

TOPICS = Topics("fleet")
ONLINE = to_all(Coordinator(state="online", boot="boot"))
RECEIPT = Receipt(run="run", round=1, attempt=0, credits=1)
MANIFEST = Manifest(run="run", version=1, sha256="0" * 64, size=1, trained=False)


class Puppet:
    """A machine that says what it is given to say and remembers what it was told."""

    def __init__(self, *greeting: Effect) -> None:
        self.greeting = greeting
        self.heard: list[Envelope] = []
        self.answers: dict[type, list[Effect]] = {}
        self.finished = self.has_work = False
        self.next_tick: float | None = None
        self.ticks = 0

    def connected(self) -> Sequence[Effect]:
        return self.greeting

    def disconnected(self) -> Sequence[Effect]:
        return []

    def receive(self, envelope: Envelope) -> Sequence[Effect]:
        self.heard.append(envelope)
        return self.answers.get(type(envelope.message), [])

    def tick(self) -> Sequence[Effect]:
        self.ticks += 1
        self.next_tick = None
        return []

    def work(self) -> Sequence[Effect]:
        self.has_work = False
        return []

    @property
    def kinds(self) -> list[type]:
        return [type(envelope.message) for envelope in self.heard]


def make_pump(**parties: Puppet) -> tuple[Pump, VirtualClock]:
    clock = VirtualClock()
    pump = Pump(TOPICS, clock)
    for name, puppet in parties.items():
        pump.join(name, puppet, filters_of(name))
    return pump, clock


def filters_of(name: str) -> tuple[str, ...]:
    return TOPICS.coordinator_filters() if name == COORDINATOR else TOPICS.device_filters(name)


def drain(pump: Pump) -> None:
    while pump.turn():
        pass


class TestPump:
    def test_messages_reach_those_who_subscribed_in_order_one_turn_later(self) -> None:
        server, one, two = Puppet(), Puppet(), Puppet()
        pump, _ = make_pump(coordinator=server, one=one, two=two)
        hello = up("one", make_hello())
        server.answers[Hello] = [down("one", make_assignment()), ONLINE]
        pump.join("three", Puppet(hello), filters_of("three"))
        pump.turn()  # it is carried
        assert not server.heard
        pump.turn()
        assert server.heard == [hello]
        drain(pump)
        assert one.kinds == [Assignment, Coordinator]
        assert two.kinds == [Coordinator]

    def test_what_is_retained_is_said_to_late_comers_and_nothing_else(self) -> None:
        server = Puppet(
            ONLINE, down("late", RECEIPT), to_cut(3, MANIFEST), down("late", make_assignment())
        )
        pump, _ = make_pump(coordinator=server)
        drain(pump)
        late = Puppet()
        pump.join("late", late, filters_of("late"))
        drain(pump)
        assert late.kinds == [Coordinator, Assignment]

    def test_subscribe_adds_cut_topics_and_replaces_those_of_the_last_one(self) -> None:
        manifests = [to_cut(cut, MANIFEST) for cut in (2, 3)]
        server, device = Puppet(*manifests), Puppet()
        pump, _ = make_pump(coordinator=server, device=device)
        drain(pump)
        assert not device.heard
        server.answers[Request] = list[Effect](manifests)
        for cut in (2, 3):
            device.heard.clear()
            ask = Puppet(Subscribe(TOPICS.cut_filters(cut)), up("device", Request(what="probe")))
            pump._carry_out(pump._parties["device"], ask.connected())
            drain(pump)
            layers = [envelope.address.layer for envelope in device.heard]
            assert layers == [cut, cut], "the retained one, then the published one"

    def test_deferred_messages_are_made(self) -> None:
        device = Puppet()
        server = Puppet(down_later("device", Receipt, lambda: RECEIPT))
        pump, _ = make_pump(coordinator=server, device=device)
        drain(pump)
        assert device.heard == [down("device", RECEIPT)]

    def test_time_passes_only_when_nothing_else_can_be_done(self) -> None:
        busy, patient = Puppet(), Puppet()
        pump, clock = make_pump(coordinator=busy, patient=patient)
        busy.has_work, patient.next_tick = True, 7.0
        pump.turn()
        assert (busy.has_work, clock.now, patient.ticks) == (False, 0.0, 0)
        pump.run(until=lambda: patient.ticks > 0)
        assert clock.now == 7.0

    def test_a_fleet_that_stands_still_is_an_error_that_names_who_waits(self) -> None:
        pump, _ = make_pump(coordinator=Puppet(), device=Puppet())
        with pytest.raises(FleetFailed, match=r"nothing moves.*coordinator, device"):
            pump.run()

    def test_waiting_and_turns_are_bounded(self) -> None:
        puppet = Puppet()
        pump, _ = make_pump(device=puppet)
        puppet.next_tick = 11.0
        with pytest.raises(FleetFailed, match="nothing moves"):
            pump.run(limit_s=10.0)
        with pytest.raises(FleetFailed, match="after 0 turns"):
            pump.run(max_turns=0)

    def test_who_has_finished_hears_nothing_more(self) -> None:
        device = Puppet()
        pump, _ = make_pump(coordinator=Puppet(ONLINE), device=device)
        device.finished = True
        drain(pump)
        assert not device.heard


class Log:
    """Everything that was said, and how many batches each device had out."""

    def __init__(self) -> None:
        self.said: list[Envelope] = []
        self.out: Counter[str] = Counter()
        self.most_out = 0

    def __call__(self, envelope: Envelope) -> None:
        self.said.append(envelope)
        device = envelope.address.device or ""
        self.out[device] += isinstance(envelope.message, Activations)
        self.out[device] -= isinstance(envelope.message, Gradients)
        self.most_out = max(self.most_out, self.out[device])

    def of(self, kind: type[Any]) -> list[Any]:
        return [e.message for e in self.said if isinstance(e.message, kind)]


def run_fleet(folder: Path, **settings: Any) -> tuple[Checkpoint, Log]:
    log = Log()
    devices = {f"d{cut}": (cut, make_device_data(40, seed=cut)) for cut in (2, 3, 5)}
    fleet = FleetInProcess(
        make_settings(state_dir=folder, min_devices=len(devices), **settings), devices, watch=log
    )
    return fleet.run(), log


class TestFleet:
    @pytest.mark.parametrize("strategy", ["averaging", "sequential"])
    def test_the_same_fleet_gives_the_same_model_and_the_same_messages(
        self, tmp_path: Path, strategy: str
    ) -> None:
        first, said = run_fleet(tmp_path / "1", strategy=strategy, codec="int8")
        again, said_again = run_fleet(tmp_path / "2", strategy=strategy, codec="int8")
        assert_same(again.model.state, first.model.state)
        for kind in (Activations, Gradients):
            assert [(m.batch, m.tensor) for m in said.of(kind)] == [
                (m.batch, m.tensor) for m in said_again.of(kind)
            ]

    @pytest.mark.parametrize("feedback", ["gradient", "none"])
    def test_every_batch_is_applied_once_and_the_books_add_up(
        self, tmp_path: Path, feedback: str
    ) -> None:
        checkpoint, log = run_fleet(tmp_path, feedback=feedback, rounds=2, batches_per_round=4)
        assert checkpoint.round == 2
        batches = 3 * 4 * 2
        assert len(log.of(Activations)) == batches
        assert len(log.of(Gradients)) == (batches if feedback == "gradient" else 0)
        for record in checkpoint.history:
            for entry in record["devices"].values():
                assert entry["finished"]
                assert entry["account"]["applied"] == entry["account"]["produced"] == 4
        for report in log.of(Report):
            assert (report.produced, report.applied, report.expired) == (4, 4, 0)

    @pytest.mark.parametrize("window", [1, 2, 3])
    def test_as_many_batches_are_out_as_the_window_allows(
        self, tmp_path: Path, window: int
    ) -> None:
        _, log = run_fleet(tmp_path, window=window, batches_per_round=6, rounds=1)
        assert log.most_out == window

    def test_test_images_are_answered_too(self, tmp_path: Path) -> None:
        _, log = run_fleet(tmp_path, inference=True, rounds=1, threshold=1.0)
        answered = [report.inference for report in log.of(Report) if report.inference]
        assert [(a.images, a.offloads, a.timeouts) for a in answered] == [(16, 16, 0)] * 3

    def test_a_refused_device_is_an_error_with_its_reason(self, tmp_path: Path) -> None:
        devices = {"deep": (99, make_device_data())}
        fleet = FleetInProcess(make_settings(state_dir=tmp_path), devices)
        with pytest.raises(FleetFailed, match=r"deep: its cut layer 99 does not exist"):
            fleet.run()

    def test_a_device_too_few_is_an_error_not_a_wait(self, tmp_path: Path) -> None:
        devices = {"only": (2, make_device_data())}
        fleet = FleetInProcess(make_settings(state_dir=tmp_path, min_devices=2), devices)
        with pytest.raises(FleetFailed, match="not finished"):
            fleet.run(limit_s=100.0)
