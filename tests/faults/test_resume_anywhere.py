"""Wherever the coordinator is killed, the run ends bit for bit as if it had not been."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edge_agent.core import AgentCore
from ops.simulator import Device, DeviceCost, Killed, LinkProfile, ServerCost, SimulatedFleet
from tests.tiny import make_device_data, make_settings

CUTS = (2, 4)
ROUNDS = 3
INSTANTS = 16
BACK_S = 5.0
EVENTS = [
    *(("create", moment, 1) for moment in ("before", "after")),
    *(("announce", moment, n) for n in range(1, ROUNDS + 1) for moment in ("before", "after")),
    *(("save", moment, n) for n in range(1, ROUNDS + 1) for moment in ("before", "after")),
    *(("result", moment, 1) for moment in ("before", "after")),
]


def make_fleet(folder: Path, strategy: str, cuts: tuple[int, ...] = CUTS) -> SimulatedFleet:
    # Of unequal speed, so that sums are made in the same order whatever happens.
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
        rounds=ROUNDS,
        batches_per_round=3,
        strategy=strategy,
        codec="int8",
        parameter_codec="int8",
    )
    return SimulatedFleet(settings, devices, learning="real", server=ServerCost(step_s=0.005))


def run(fleet: SimulatedFleet) -> str:
    fleet.run(limit_s=600)
    fleet.books().check()
    assert fleet.checkpoint().version == ROUNDS
    return fleet.digest()


def at_event(fleet: SimulatedFleet, wanted: str, number: int, crash: Callable[[], None]) -> None:
    seen = 0

    def tell(event: str) -> None:
        nonlocal seen
        seen += event == wanted
        if event == wanted and seen == number:
            fleet.on_store = lambda event: None
            crash()

    fleet.on_store = tell


def die(fleet: SimulatedFleet) -> Callable[[], None]:
    def crash() -> None:
        fleet.world.after(BACK_S, fleet.coordinator.restart)
        raise Killed

    return crash


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, float]:
    """Digest and length of the run that nothing happens to."""
    fleet = make_fleet(tmp_path_factory.mktemp("whole"), "averaging")
    return run(fleet), fleet.world.now


@pytest.fixture(scope="module")
def whole_sequential(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of one device, so that the order of arrival is always the same."""
    return run(make_fleet(tmp_path_factory.mktemp("whole"), "sequential", (3,)))


@pytest.mark.parametrize("instant", range(INSTANTS))
def test_killed_at_any_time(tmp_path: Path, whole: tuple[str, float], instant: int) -> None:
    digest, length_s = whole
    fleet = make_fleet(tmp_path, "averaging")

    def kill() -> None:
        if not fleet.coordinator.over:
            fleet.coordinator.kill()
            fleet.world.after(BACK_S, fleet.coordinator.restart)

    fleet.world.at(length_s * (instant + 0.5) / INSTANTS, kill)
    assert run(fleet) == digest
    assert fleet.coordinator.tally.lives == 2


@pytest.mark.parametrize(("event", "moment", "number"), EVENTS)
def test_killed_while_it_writes(
    tmp_path: Path, whole: tuple[str, float], event: str, moment: str, number: int
) -> None:
    digest, _ = whole
    fleet = make_fleet(tmp_path, "averaging")
    at_event(fleet, f"{event}:{moment}", number, die(fleet))
    assert run(fleet) == digest
    assert fleet.coordinator.tally.lives == 2


def test_everybody_killed_between_two_rounds(tmp_path: Path, whole: tuple[str, float]) -> None:
    """Once the devices have written the version down: their momentum goes with it."""
    digest, _ = whole
    fleet = make_fleet(tmp_path, "averaging")

    def all_have_version_two() -> bool:
        agents = [process.machine for process in fleet.agents.values()]
        places = [agent._place for agent in agents if isinstance(agent, AgentCore)]
        return [place.holding.version for place in places if place] == [2] * len(CUTS)

    def power_cut() -> None:
        for process in fleet.processes:
            process.kill()
            fleet.world.after(BACK_S, process.restart)
        fleet.broker.kill()
        fleet.world.after(1.0, lambda: fleet.broker.restart(keep_sessions=False))

    fleet.when(all_have_version_two, power_cut)
    assert run(fleet) == digest
    assert [process.tally.lives for process in fleet.processes] == [2] * (1 + len(CUTS))


@pytest.mark.parametrize(("event", "moment", "number"), EVENTS)
def test_one_server_copy(
    tmp_path: Path, whole_sequential: str, event: str, moment: str, number: int
) -> None:
    fleet = make_fleet(tmp_path, "sequential", (3,))
    at_event(fleet, f"{event}:{moment}", number, die(fleet))
    assert run(fleet) == whole_sequential
    assert fleet.coordinator.tally.lives == 2


@pytest.mark.parametrize("number", [1, 2])
def test_one_server_copy_between_two_rounds(tmp_path: Path, number: int) -> None:
    whole = run(make_fleet(tmp_path / "whole", "sequential"))
    fleet = make_fleet(tmp_path / "killed", "sequential")
    at_event(fleet, "save:after", number, die(fleet))
    assert run(fleet) == whole
