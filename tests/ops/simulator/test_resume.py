"""A run that was interrupted ends as one that was not, bit for bit: learning is real here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ops.simulator import Device, DeviceCost, Killed, LinkProfile, ServerCost, SimulatedFleet
from tests.tiny import assert_same, make_device_data, make_settings

Interrupt = Callable[[SimulatedFleet], None]


def make_fleet(folder: Path, strategy: str, feedback: str) -> SimulatedFleet:
    # One copy trains what all send in the order it arrives, which another start may change.
    cuts = (2, 4) if strategy == "averaging" else (3,)
    # Of unequal speed, so that they finish in the same order whatever happens.
    devices = [
        Device(
            f"d{cut}",
            cut=cut,
            data=make_device_data(40, seed=cut),
            cost=DeviceCost(0.01 * cut, 0.02 * cut),
            link=LinkProfile(latency_s=0.01),
        )
        for cut in cuts
    ]
    settings = make_settings(
        state_dir=folder,
        min_devices=len(cuts),
        rounds=3,
        batches_per_round=4,
        strategy=strategy,
        feedback=feedback,
        codec="int8",
        parameter_codec="int8",
    )
    return SimulatedFleet(settings, devices, learning="real", server=ServerCost(step_s=0.005))


def at_disk(wanted: str, nth: int) -> Interrupt:
    def interrupt(fleet: SimulatedFleet) -> None:
        seen = 0

        def tell(event: str) -> None:
            nonlocal seen
            seen += event == wanted
            if seen == nth:
                fleet.on_store = lambda _: None
                fleet.world.after(5.0, fleet.coordinator.restart)
                raise Killed

        fleet.on_store = tell

    return interrupt


def coordinator_in_round(fleet: SimulatedFleet) -> None:
    def crash() -> None:
        fleet.coordinator.kill()
        fleet.world.after(5.0, fleet.coordinator.restart)

    def soon() -> None:
        fleet.world.after(0.3, crash)

    fleet.when(lambda: fleet.witnesses.outcomes["closed"] == 1, soon)


INTERRUPTS: dict[str, Interrupt] = {
    "before the first round is announced": at_disk("announce:before", 1),
    "after a round is announced": at_disk("announce:after", 2),
    "before a round is saved": at_disk("save:before", 2),
    "after a round is saved": at_disk("save:after", 2),
    "in a round": coordinator_in_round,
    "before the result is saved": at_disk("result:before", 1),
}


@pytest.mark.parametrize("feedback", ["gradient", "none"])
@pytest.mark.parametrize("strategy", ["averaging", "sequential"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, strategy: str, feedback: str
) -> None:
    whole = make_fleet(tmp_path / "whole", strategy, feedback)
    whole.run()
    expected = whole.checkpoint()
    for name, interrupt in INTERRUPTS.items():
        fleet = make_fleet(tmp_path / name, strategy, feedback)
        interrupt(fleet)
        fleet.run(limit_s=3600)
        fleet.books().check()
        assert fleet.coordinator.tally.lives == 2, name
        resumed = fleet.checkpoint()
        assert resumed.version == expected.version, name
        assert_same(resumed.model.state, expected.model.state)
        assert_same(resumed.model.momentum, expected.model.momentum)
