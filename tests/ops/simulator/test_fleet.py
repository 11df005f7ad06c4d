"""A fleet of stubs: the same every time, its books complete, faults seen in them."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.errors import StoreError
from ops.errors import FleetFailed
from ops.simulator import Device, DeviceCost, Fault, Killed, LinkProfile, ServerCost, SimulatedFleet
from ops.simulator.stub import DIGITS, labels_of, name_of, stub_state
from tests.tiny import make_settings

LINK = LinkProfile(1e6, 1e6, latency_s=0.02, jitter_s=0.005, loss=0.01)


def make_fleet(folder: Path, *, seed: int = 0, devices: int = 3, **settings: Any) -> SimulatedFleet:
    fields: dict[str, Any] = {
        "rounds": 3,
        "batches_per_round": 6,
        "min_devices": devices,
        "codec": "int8",
    }
    return SimulatedFleet(
        make_settings(state_dir=folder, **(fields | settings)),
        [
            Device(f"d{i}", cut=2 + i % 4, link=LINK, cost=DeviceCost(0.05, 0.1), test_samples=20)
            for i in range(devices)
        ],
        seed=seed,
        server=ServerCost(step_s=0.002),
    )


@pytest.mark.parametrize("strategy", ["averaging", "sequential", "cascade"])
@pytest.mark.parametrize("feedback", ["gradient", "none"])
def test_without_faults_every_batch_is_in_the_model(
    tmp_path: Path, strategy: str, feedback: str
) -> None:
    fleet = make_fleet(tmp_path, strategy=strategy, feedback=feedback)
    fleet.run()
    books = fleet.books()
    books.check()
    assert books.totals() == {"produced": 54, "applied": 54, "expired": 0, "discarded": {}}
    assert books.in_model == books.applied == 54


def test_the_same_seed_gives_the_same_model_events_and_time(tmp_path: Path) -> None:
    def run(folder: str, seed: int) -> tuple[str, int, float]:
        fleet = make_fleet(tmp_path / folder, seed=seed)
        fleet.faults.add(Fault("lose", share=0.05, end=20.0))
        fleet.run()
        return fleet.digest(), fleet.world.events, fleet.world.now

    first = run("1", 5)
    assert run("2", 5) == first
    assert run("3", 6) != first


PROGRAM = """
import sys, tempfile
from pathlib import Path
from ops.simulate import Plan, simulate
import json
settings = {"rounds": 2, "batches_per_round": 3, "parameter_codec": "int8", "min_devices": 6}
print(json.dumps(simulate(Plan(8, "mixed", 3, "stub", settings))))
"""


def test_two_processes_with_other_hashes_say_the_same() -> None:
    def run(hash_seed: str) -> bytes:
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", PROGRAM]
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, timeout=250, check=True
        )
        return done.stdout

    first = run("1")
    assert hashlib.sha256(run("2")).digest() == hashlib.sha256(first).digest()


def test_test_images_are_answered(tmp_path: Path) -> None:
    fleet = make_fleet(tmp_path, inference=True, rounds=1)
    answers = []
    fleet._watch = lambda e: answers.append(getattr(e.message, "inference", None))
    fleet.run()
    answered = [a for a in answers if a is not None]
    assert [(a.images, a.exits, a.offloads, a.answered) for a in answered] == [(20, 10, 10, 10)] * 3


def test_a_batch_applied_twice_is_a_problem(tmp_path: Path) -> None:
    fleet = make_fleet(tmp_path)
    fleet.run()
    attempt = fleet.witnesses.applied[2, 0]
    attempt[next(iter(attempt))] += 1
    problems = fleet.books().problems
    assert any("applied 2 times" in problem for problem in problems), problems


def test_work_missing_in_the_model_is_a_problem(tmp_path: Path) -> None:
    fleet = make_fleet(tmp_path)
    fleet.run()
    checkpoint = fleet.checkpoint()
    checkpoint.model.state["blocks.9.count.num_batches_tracked"] -= 1
    fleet.checkpoint = lambda: checkpoint  # type: ignore[method-assign]
    assert any("the model counts" in problem for problem in fleet.books().problems)


def test_a_poisoned_batch_is_discarded_by_the_device(tmp_path: Path) -> None:
    fleet = make_fleet(tmp_path)
    fleet.poisoned = lambda device, batch: (device, batch) == ("d0", 3)
    fleet.run()
    fleet.books().check()
    reports = [r for (name, _), r in fleet.reports.items() if name == "d0"]
    assert [report.discarded for report in reports] == [{"not_finite": 1}] * 3


def test_a_diverging_batch_is_discarded_by_the_server(tmp_path: Path) -> None:
    fleet = make_fleet(tmp_path)
    fleet.witnesses.diverging.add(("d1", 2))
    fleet.run()
    books = fleet.books()
    books.check()
    assert books.totals()["discarded"] == {"diverged": 1}


def test_a_kill_in_a_round_is_survived(tmp_path: Path, rng: random.Random) -> None:
    seed = rng.randrange(2**32)
    fleet = make_fleet(tmp_path, seed=seed)
    fleet.when(lambda: fleet.agent("d1").phase == "training", fleet.agents["d1"].kill)
    fleet.world.at(20.0, fleet.agents["d1"].restart)
    fleet.run(limit_s=3600)
    fleet.books().check()
    assert fleet.checkpoint().round == 3
    assert fleet.agents["d1"].tally.lives == 2


@pytest.mark.parametrize(
    "event", ["create:before", "announce:after", "save:before", "save:after", "result:before"]
)
def test_a_coordinator_killed_at_its_disk_goes_on(tmp_path: Path, event: str) -> None:
    fleet = make_fleet(tmp_path)

    def crash(happened: str) -> None:
        if happened == event:
            fleet.on_store = lambda _: None
            fleet.world.after(5.0, fleet.coordinator.restart)
            raise Killed

    fleet.on_store = crash
    fleet.run(limit_s=3600)
    fleet.books().check()
    assert fleet.checkpoint().round == 3
    assert fleet.coordinator.tally.lives == 2


def test_a_full_disk_is_an_error_unless_somebody_restarts(tmp_path: Path) -> None:
    def refuse(happened: str) -> None:
        if happened == "save:before":
            raise StoreError("the disk is full")

    fleet = make_fleet(tmp_path / "1")
    fleet.on_store = refuse
    with pytest.raises(FleetFailed, match="coordinator: the disk is full"):
        fleet.run(limit_s=3600)

    fleet = make_fleet(tmp_path / "2")
    fleet._restart_s = 10.0
    fleet.on_store = refuse
    fleet.world.at(60.0, lambda: setattr(fleet, "on_store", lambda _: None))
    fleet.run(limit_s=3600)
    fleet.books().check()
    assert fleet.coordinator.tally.lives > 2


def test_a_full_disk_on_a_device_only_costs_its_snapshot(tmp_path: Path) -> None:
    fleet = make_fleet(tmp_path)
    fleet.programs["d0"].disk.full = True
    fleet.run()
    fleet.books().check()
    assert fleet.programs["d0"].disk.load("simulated", 2) is None
    assert fleet.programs["d1"].disk.load("simulated", 3) is not None


def test_devices_that_come_and_go(tmp_path: Path) -> None:
    devices = [
        Device(f"d{i}", cut=2, link=LINK, cost=DeviceCost(0.2, 0.4), start_s=i, failure_s=40.0,
               repair_s=10.0, on_s=60.0, off_s=5.0)
        for i in range(6)
    ]  # fmt: skip
    settings = make_settings(
        state_dir=tmp_path, rounds=5, batches_per_round=10, min_devices=4, round_deadline_s=60.0
    )
    fleet = SimulatedFleet(settings, devices, seed=2, server=ServerCost(0.002))
    fleet.run(until=lambda: fleet.coordinator.over, limit_s=7200)
    fleet.books().check()
    assert fleet.checkpoint().round == 5
    assert sum(agent.tally.lives for agent in fleet.agents.values()) > 6


def test_a_cut_measured_by_slow_devices_is_shallower(tmp_path: Path) -> None:
    devices = [
        Device(name, cut="auto", cost=DeviceCost(block_s, 2 * block_s), memory_mb=mb)
        for name, block_s, mb in [("fast", 0.005, 4096), ("slow", 0.04, 4096), ("small", 0.005, 64)]
    ]
    settings = make_settings(state_dir=tmp_path, min_devices=3, step_budget_ms=250.0)
    fleet = SimulatedFleet(settings, devices)
    fleet.run()
    cuts = {name: program.cut for name, program in fleet.programs.items()}
    assert cuts == {"fast": 9, "slow": 2, "small": 2}


def test_real_sizes_make_real_times(tmp_path: Path) -> None:
    def seconds(sizes: Any) -> float:
        settings = make_settings(state_dir=tmp_path / str(sizes), batch_size=32, rounds=1)
        fleet = SimulatedFleet(settings, [Device("d", link=LinkProfile(1e4, 1e4))], sizes=sizes)
        fleet.run()
        return fleet.world.now

    assert seconds("real") > 5 * seconds("stub")


def test_labels_name_device_and_position(rng: random.Random) -> None:
    for _ in range(100):
        device, position = rng.randrange(DIGITS), rng.randrange(DIGITS**3)
        labels = labels_of(device, position, rng.randint(4, 40))
        assert name_of(labels.tolist()) == (device, position)
        assert labels.max() < DIGITS


def test_a_stub_model_is_of_arrays_that_can_be_averaged() -> None:
    assert all(np.isfinite(value).all() for value in stub_state().values())


def test_a_process_computes_one_thing_at_a_time(tmp_path: Path) -> None:
    # More batches wait than the coordinator's inbox holds: each step makes room for one of them.
    devices = [Device(f"d{i:02}") for i in range(40)]
    settings = make_settings(
        state_dir=tmp_path, min_devices=40, rounds=1, batches_per_round=4, window=4
    )
    fleet = SimulatedFleet(settings, devices, server=ServerCost(step_s=0.01))
    fleet.run()
    assert fleet.coordinator.tally.most_arrived > 1
    assert fleet.coordinator.tally.busy_s == pytest.approx(40 * 4 * 0.01)
    assert fleet.world.now >= fleet.coordinator.tally.busy_s
