"""Devices that are away for a week, and rounds for which too few are left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from broker.envelopes import Envelope
from broker.messages import Request
from broker.training_messages import Activations, DeviceParameters
from ops.simulator import Device, DeviceCost, Fault, LinkProfile, SimulatedFleet
from tests.faults.trial import ALL, DEADLINE_S, QUOTA, ROUNDS, SEED, UNTROUBLED_S, Outcome, Trial
from tests.tiny import make_settings

HOUR_S, DAY_S = 3600.0, 86_400.0


def sleep(fleet: SimulatedFleet) -> Callable[[], None]:
    """As a laptop does: its memory stays, its clock stands still."""
    device, began = fleet.agents["d1"], fleet.world.now
    device.freeze()

    def wake() -> None:
        device.jump_clock(began - fleet.world.now)
        device.thaw()

    return wake


def switch_off(fleet: SimulatedFleet) -> Callable[[], None]:
    device = fleet.agents["d1"]
    device.kill()
    return device.restart


@pytest.mark.parametrize("go", [sleep, switch_off])
def test_who_wakes_up_a_week_later_gets_current_parameters_before_it_contributes(
    tmp_path: Path, go: Callable[[SimulatedFleet], Callable[[], None]]
) -> None:
    said: list[tuple[float, Envelope]] = []
    fleet = SimulatedFleet(
        make_settings(
            state_dir=tmp_path,
            min_devices=3,
            rounds=14,
            batches_per_round=QUOTA,
            round_deadline_s=2 * DAY_S,
            gradient_timeout_s=HOUR_S,
        ),
        [
            Device(
                f"d{i}",
                cut=2,
                link=LinkProfile(latency_s=0.02),
                cost=DeviceCost(0.5 * HOUR_S, HOUR_S),  # a round takes a day
                settings={"heartbeat_s": 6 * HOUR_S},
            )
            for i in range(3)
        ],
        seed=SEED,
        watch=lambda envelope: said.append((fleet.world.now, envelope)),
    )
    woke = 0.0

    def strike() -> None:
        back = go(fleet)

        def wake() -> None:
            nonlocal woke
            woke = fleet.world.now
            back()

        fleet.world.after(7 * DAY_S, wake)

    fleet.world.at(1.5 * DAY_S, strike)
    fleet.run(limit_s=30 * DAY_S)
    fleet.books().check()

    mine = [
        (time, envelope.message)
        for time, envelope in said
        if time >= woke and envelope.address.device == "d1" and envelope.address.direction == "up"
    ]
    fetched = next(time for time, m in mine if isinstance(m, Request) and m.what == "parameters")
    versions = [(time, m.version) for time, m in mine if isinstance(m, Activations)]
    new = [(time, version) for time, version in versions if version > 1]
    assert new, "it contributes again"
    time, version = new[0]
    assert fetched < time
    assert version == _announced(said, time)
    # What it may still bring of the round in which it fell asleep is older than counts.
    late = [m for _, m in mine if isinstance(m, DeviceParameters) and m.version == 1]
    for record in fleet.checkpoint().history:
        assert all(entry["staleness"] <= 2 for entry in record["late"])
    assert len(late) <= 1


def _announced(said: list[tuple[float, Envelope]], until: float) -> int:
    rounds = [e.message for time, e in said if e.address.kind == "round" and time <= until]
    return int(getattr(rounds[-1], "version"))  # noqa: B009 a message of this kind has one


def test_below_quorum_a_round_is_extended_once_then_given_up(tmp_path: Path) -> None:
    """And the next one waits until a quorum is there, but not for who comes after that."""
    trial = Trial(tmp_path, seed=SEED)
    away_s = 3 * DEADLINE_S

    def strike() -> None:
        for name in ("d1", "d2"):
            trial.fleet.agents[name].kill()
            trial.after(away_s, trial.fleet.agents[name].restart)

    trial.at_device("mid-round", strike)
    outcome = trial.run(within_s=UNTROUBLED_S + away_s)
    left = ALL - ALL // ROUNDS - QUOTA
    assert outcome == Outcome(
        attempts=(0, None, 0, 0), extended=1, produced=left, missed={"d2": (3,)}
    )
    history = trial.fleet.checkpoint().history
    assert [record["version"] for record in history] == [1, 2, 3]
    assert trial.fleet.books().in_model == left


def test_a_hello_that_a_new_coordinator_does_not_get_is_said_again(tmp_path: Path) -> None:
    """It knows the device by nothing else: no round has been written down yet."""
    trial = Trial(tmp_path, seed=SEED)

    def strike() -> None:
        trial.fleet.faults.add(Fault("lose", kind="hello", way="up", device="d1", times=1))
        trial.fleet.coordinator.restart()

    trial.at_device("joining", strike)
    outcome = trial.run(within_s=UNTROUBLED_S + 2 * DEADLINE_S)
    assert outcome == Outcome(attempts=(1, 0, 0, 0))
