"""Cuts that are found against the best there are."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.errors import SettingsWrong
from ops.planning import FleetModel, Limits, assign, by_group, each_alone
from ops.planning.assignment import allowed
from ops.simulate import Plan, settings_of
from ops.simulator import Device, DeviceCost, LinkProfile
from ops.simulator.profile import Server
from ops.simulator.sizes import message_sizes

SETTINGS = settings_of(Plan(5, "lan", 0, "stub", {"codec": "int4"}), Path())
SIZES = message_sizes(SETTINGS)
WITHIN = 1.1

seconds = st.floats(1e-4, 0.1)
speeds = st.floats(2e4, 2e7)
some_device = st.builds(
    Device,
    name=st.just("d"),
    cost=st.builds(DeviceCost, seconds, seconds),
    samples=st.integers(32, 1000),
    memory_mb=st.sampled_from([40.0, 64.0, 1024.0]),
    link=st.builds(LinkProfile, speeds, speeds, latency_s=st.floats(0, 0.2)),
)
some_server = st.builds(
    Server, step_s=st.floats(0, 0.02), block_s=st.floats(0, 0.05), merge_s=st.just(0.1)
)


def model_of(devices: list[Device], server: Server, window: int = 2) -> FleetModel:
    changed = SETTINGS.model_copy(update={"window": window})
    return FleetModel(changed, devices, server, SIZES)


def fleet(count: int, seed: int, server: Server) -> FleetModel:
    rng = np.random.default_rng(seed)
    devices = [
        Device(
            f"d{i}",
            cost=DeviceCost(*rng.lognormal(-5, 1, 2)),
            samples=int(rng.integers(32, 1000)),
            link=LinkProfile(
                up_bytes_per_s=rng.lognormal(13, 1),
                down_bytes_per_s=rng.lognormal(13, 1),
                latency_s=rng.uniform(0, 0.1),
            ),
        )
        for i in range(count)
    ]
    return model_of(devices, server)


@given(st.lists(some_device, min_size=1, max_size=5), some_server, st.sampled_from([1, 2, 4]))
@settings(max_examples=10)
def test_as_good_as_trying_everything(devices: list[Device], server: Server, window: int) -> None:
    model = model_of(devices, server, window)
    last = {1: 9, 2: 9, 3: 5, 4: 4, 5: 3}[len(devices)]
    limits = Limits(last_cut=last)
    choices = allowed(model, each_alone(len(devices)), limits)
    best = min(model.predict(cuts).slowest_s for cuts in itertools.product(*choices))
    found = assign(model, each_alone(len(devices)), limits)
    assert all(int(cut) in cuts for cut, cuts in zip(found.cuts, choices, strict=True))
    assert best <= found.prediction.slowest_s * (1 + 1e-9)
    assert found.prediction.slowest_s <= WITHIN * best


@pytest.mark.parametrize("block_s", [0.0, 0.01])
def test_as_good_as_a_long_search_in_larger_fleets(block_s: float) -> None:
    model = fleet(20, 3, Server(block_s=block_s))
    found = assign(model, each_alone(20), Limits())
    rng = np.random.default_rng(1)
    best = np.inf
    for _ in range(2):
        cuts = rng.integers(1, 10, 20)
        now = model.predict(cuts).slowest_s
        for _ in range(300):
            other = cuts.copy()
            other[rng.integers(20, size=rng.integers(1, 4))] = rng.integers(1, 10)
            if (tried := model.predict(other).slowest_s) <= now:
                cuts, now = other, tried
        best = min(best, now)
    assert found.prediction.slowest_s <= WITHIN * best


def test_a_slow_server_pushes_work_to_the_devices() -> None:
    quick, slow = fleet(10, 1, Server(block_s=0.0)), fleet(10, 1, Server(block_s=0.05))
    limits = Limits(slack=0)
    shallow = assign(quick, each_alone(10), limits).cuts.mean()
    assert assign(slow, each_alone(10), limits).cuts.mean() > shallow


def test_slack_goes_into_deeper_cuts() -> None:
    model = fleet(10, 1, Server())
    tight = assign(model, each_alone(10), Limits(slack=0))
    loose = assign(model, each_alone(10), Limits(slack=0.5))
    assert loose.cuts.sum() > tight.cuts.sum()
    assert loose.prediction.slowest_s <= 1.5 * tight.prediction.slowest_s


def test_a_class_has_one_cut() -> None:
    cuts = assign(fleet(9, 2, Server()), by_group([0, 1, 2] * 3), Limits()).cuts
    assert all(len(set(cuts[i::3].tolist())) == 1 for i in range(3))


def test_memory_and_bytes_bound_the_cuts() -> None:
    small = [Device("d0", memory_mb=2 * SIZES.blocks)]
    model = model_of(small, Server())
    (choices,) = allowed(model, each_alone(1), Limits())
    assert all(model.memory_mb[cut - 1] <= model.budget_mb[0] for cut in choices)
    assert len(choices) < 9
    with pytest.raises(SettingsWrong, match=r"memory: .* d0 may use 1 MiB"):
        allowed(model_of([Device("d0", memory_mb=2)], Server()), each_alone(1), Limits())
    with pytest.raises(SettingsWrong, match="month-gb 1e-06"):
        allowed(model, each_alone(1), Limits(month_bytes=1e3, rounds_per_month=30))
    with pytest.raises(SettingsWrong, match="the network has cuts 1 to 9"):
        allowed(model, each_alone(1), Limits(first_cut=12))
