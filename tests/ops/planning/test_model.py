"""What is predicted against what the simulator does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ops.planning import FleetModel
from ops.planning.check import check
from ops.planning.timing import Rings, train, wait_for
from ops.simulate import Plan, settings_of
from ops.simulator import World
from ops.simulator.profile import bundled, load_profile
from ops.simulator.sizes import message_sizes

WITHIN = 0.15
CUTS = (2, 3, 4, 5)


def model_of(profile: str, devices: int, seed: int = 0, **settings: Any) -> FleetModel:
    wanted = settings_of(Plan(devices, profile, seed, "stub", settings), Path())
    made = load_profile(profile)
    drawn = made.devices(devices, World(seed))
    return FleetModel(wanted, drawn, made.server, message_sizes(wanted))


def rings(
    *, batches: float, window: float, loop: float, slowest: float, server: float, count: int = 1
) -> Rings:
    values = (batches, window, loop, slowest, server, 0.0)
    return Rings(*(np.full(count, value) for value in values))


@pytest.mark.parametrize("profile", bundled())
@pytest.mark.parametrize(("devices", "window"), [(5, 1), (5, 4), (30, 2)])
def test_rounds_last_as_long_as_simulated(profile: str, devices: int, window: int) -> None:
    model = model_of(profile, devices, seed=devices + window, window=window)
    cuts = np.array([CUTS[device % 4] for device in range(devices)])
    assert abs(check(model, cuts, rounds=2, seed=1).error) < WITHIN


@pytest.mark.parametrize(
    "settings",
    [
        {"feedback": "none", "window": 1},
        {"feedback": "none", "window": 4},
        {"round_seconds": 5},
        {"codec": "fp32"},
        {"strategy": "cascade"},
        {"bytes_per_sample": 500.0, "batches_per_round": 5},
        {"network": {"width": 32}},
    ],
)
def test_settings_change_both_alike(settings: dict[str, Any]) -> None:
    model = model_of("home", 12, **settings)
    cuts = np.array([CUTS[device % 4] for device in range(12)])
    assert abs(check(model, cuts, rounds=2, seed=1).error) < WITHIN


def test_versions_without_a_barrier(tmp_path: Path) -> None:
    model = model_of("home", 12, aggregation="buffered", buffer_size=6)
    cuts = np.array([CUTS[device % 4] for device in range(12)])
    assert abs(check(model, cuts, rounds=16, seed=1).error) < WITHIN


def test_one_device_at_a_time_waits_for_every_part() -> None:
    alone = rings(batches=10, window=1, loop=1.0, slowest=0.4, server=0.1)
    assert train(alone).seconds == pytest.approx([10.0])


def test_a_wide_window_leaves_the_slowest_part() -> None:
    wide = rings(batches=10, window=8, loop=1.0, slowest=0.4, server=0.1)
    assert train(wide).seconds == pytest.approx([1.0 + 9 * 0.4])


def test_a_server_that_is_asked_for_too_much_slows_everybody_down() -> None:
    crowd = rings(batches=10, window=2, loop=1.0, slowest=0.4, server=0.1, count=50)
    training = train(crowd)
    work = 50 * 10 * 0.1
    assert training.load > 0.95
    assert work * (1 - 1e-6) < training.seconds.max() < 1.1 * work


def test_an_idle_server_makes_nobody_wait() -> None:
    assert wait_for(rings(batches=5, window=1, loop=1, slowest=1, server=0, count=3)) == (0.0, 0.0)


def test_who_misses_the_deadline_is_named() -> None:
    model = model_of("cellular", 20, round_deadline_s=12.0)
    prediction = model.predict([2] * 20)
    assert len(prediction.late) > 0
    assert prediction.round_s < prediction.slowest_s
    assert prediction.device_s[prediction.late].min() > prediction.deadline_s


def test_a_round_that_would_never_close() -> None:
    prediction = model_of("lan", 4, round_deadline_s=0.1).predict([2] * 4)
    assert prediction.round_s == float("inf")
    assert prediction.batches_per_s == 0


def test_bytes_are_those_of_the_codec() -> None:
    coarse, fine = model_of("lan", 4, codec="int4"), model_of("lan", 4, codec="int8")
    (few, _), (more, _) = (m.bytes_per_round(m.predict([3] * 4)) for m in (coarse, fine))
    assert np.all((more / few > 1.7) & (more / few < 2.0))


def test_more_batches_out_take_more_memory_on_the_device() -> None:
    one, four = model_of("lan", 2, window=1), model_of("lan", 2, window=4)
    assert np.all(four.memory_mb > one.memory_mb)
    assert np.all(np.diff(one.memory_mb) > 0)
