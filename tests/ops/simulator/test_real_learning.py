"""A fleet that really learns, on ideal links: the same every time."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from broker.envelopes import Envelope
from broker.training_messages import Activations, Gradients, Report
from ops.errors import FleetFailed
from ops.simulator import Device, SimulatedFleet
from tests.tiny import assert_same, make_device_data, make_settings


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


def run_fleet(folder: Path, **settings: Any) -> tuple[SimulatedFleet, Log]:
    log = Log()
    devices = [Device(f"d{cut}", cut=cut, data=make_device_data(40, seed=cut)) for cut in (2, 3, 5)]
    fleet = SimulatedFleet(
        make_settings(state_dir=folder, min_devices=len(devices), **settings),
        devices,
        learning="real",
        watch=log,
    )
    fleet.run()
    fleet.books().check()
    return fleet, log


@pytest.mark.parametrize("strategy", ["averaging", "sequential"])
def test_the_same_fleet_gives_the_same_model_and_the_same_messages(
    tmp_path: Path, strategy: str
) -> None:
    first, said = run_fleet(tmp_path / "1", strategy=strategy, codec="int8")
    again, said_again = run_fleet(tmp_path / "2", strategy=strategy, codec="int8")
    assert_same(again.checkpoint().model.state, first.checkpoint().model.state)
    for kind in (Activations, Gradients):
        assert [(m.batch, m.tensor) for m in said.of(kind)] == [
            (m.batch, m.tensor) for m in said_again.of(kind)
        ]


@pytest.mark.parametrize("feedback", ["gradient", "none"])
def test_every_batch_is_applied_once_and_the_books_add_up(tmp_path: Path, feedback: str) -> None:
    fleet, log = run_fleet(tmp_path, feedback=feedback, rounds=2, batches_per_round=4)
    checkpoint = fleet.checkpoint()
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
def test_as_many_batches_are_out_as_the_window_allows(tmp_path: Path, window: int) -> None:
    _, log = run_fleet(tmp_path, window=window, batches_per_round=6, rounds=1)
    assert log.most_out == window


def test_test_images_are_answered_too(tmp_path: Path) -> None:
    _, log = run_fleet(tmp_path, inference=True, rounds=1, threshold=1.0)
    answered = [report.inference for report in log.of(Report) if report.inference]
    assert [(a.images, a.offloads, a.timeouts) for a in answered] == [(16, 16, 0)] * 3


def test_a_refused_device_is_an_error_with_its_reason(tmp_path: Path) -> None:
    devices = [Device("deep", cut=99, data=make_device_data())]
    fleet = SimulatedFleet(make_settings(state_dir=tmp_path), devices, learning="real")
    with pytest.raises(FleetFailed, match=r"deep: its cut layer 99 does not exist"):
        fleet.run()


def test_a_device_too_few_is_an_error_not_a_wait(tmp_path: Path) -> None:
    devices = [Device("only", data=make_device_data())]
    settings = make_settings(state_dir=tmp_path, min_devices=2)
    fleet = SimulatedFleet(settings, devices, learning="real")
    with pytest.raises(FleetFailed, match="not finished"):
        fleet.run(limit_s=100.0)
