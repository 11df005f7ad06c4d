from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.aggregation import Aggregation, Model, block_of
from tensors.errors import AveragingError
from tensors.networks import build_network, read_state
from tests.tiny import SPEC, Array, assert_close, assert_same, differs

NAMES = read_state(build_network(SPEC))
MOMENTUM = [n for n in NAMES if n.startswith("blocks.") and n.endswith(("weight", "bias"))]
BLOCKS = 10


def random_state(rng: np.random.Generator, names: list[str]) -> dict[str, Array]:
    state: dict[str, Array] = {}
    for name in names:
        shape = NAMES[name].shape
        if name.endswith("num_batches_tracked"):
            state[name] = np.array(rng.integers(100, 200))
        elif name.endswith("running_var"):
            state[name] = rng.uniform(0.1, 2, shape).astype(np.float32)
        else:
            state[name] = rng.standard_normal(shape).astype(np.float32)
    return state


def start_model(rng: np.random.Generator) -> Model:
    state = random_state(rng, list(NAMES))
    for name in state:
        if name.endswith("num_batches_tracked"):
            state[name] = np.array(100)
    return Model(state, {name: np.zeros_like(NAMES[name]) for name in MOMENTUM})


def of_device(cut: int) -> list[str]:
    prefixes = (*(f"blocks.{i}." for i in range(cut)), f"heads.{cut}.")
    return [name for name in NAMES if name.startswith(prefixes)]


def of_server(start: int, stop: int = BLOCKS) -> list[str]:
    return [n for n in NAMES if (b := block_of(n)) is not None and start <= b < stop]


@dataclass
class Holder:
    state: dict[str, Array]
    momentum: dict[str, Array]
    samples: int
    server: bool


def reference(
    start: Model, holders: list[Holder], *, device_copies: bool, first: int
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The rules of averaging, said as shortly as possible, in float64."""

    def mean(name: str, of: list[tuple[dict[str, Array], int]], old: Array) -> Array:
        if not of:
            return old
        weights = np.array([w for _, w in of], np.float64) / sum(w for _, w in of)
        values = np.array([state[name] for state, _ in of], np.float64)
        if name.endswith("num_batches_tracked"):
            return np.array(old + (values - old).sum(0))
        if name.endswith("running_var"):
            partner = name.replace("running_var", "running_mean")
            means = np.array([state[partner] for state, _ in of], np.float64)
            centre = np.tensordot(weights, means, 1)
            values = values + (means - centre) ** 2
        return np.asarray(np.tensordot(weights, values, 1))

    def counts(holder: Holder, name: str) -> bool:
        block = block_of(name)
        return holder.samples > 0 and (
            holder.server or device_copies or block is None or block < first
        )

    state = {
        name: mean(
            name,
            [(h.state, h.samples) for h in holders if name in h.state and counts(h, name)],
            old,
        )
        for name, old in start.state.items()
    }
    momentum = {
        name: mean(name, [(h.momentum, h.samples) for h in holders if name in h.momentum], old)
        for name, old in start.momentum.items()
    }
    return state, momentum


def merge(start: Model, holders: list[Holder], *, device_copies: bool, first: int) -> Model:
    aggregation = Aggregation(start, first_server_block=first, device_copies=device_copies)
    for holder in holders:
        if holder.server:
            aggregation.add_server(holder.state, holder.momentum, holder.samples)
        else:
            aggregation.add_device(holder.state, holder.samples)
    return aggregation.result()


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32 - 1),
    devices=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 500)), min_size=1, max_size=5),
    device_copies=st.booleans(),
)
def test_the_mean_over_all_holders_is_that_of_the_reference(
    seed: int, devices: list[tuple[int, int]], device_copies: bool
) -> None:
    rng = np.random.default_rng(seed)
    start = start_model(rng)
    holders = []
    for cut, samples in devices:
        holders.append(Holder(random_state(rng, of_device(cut)), {}, samples, server=False))
        names = of_server(cut)
        momentum = {
            n: rng.standard_normal(NAMES[n].shape).astype(np.float32)
            for n in names
            if n in MOMENTUM and samples
        }
        holders.append(Holder(random_state(rng, names), momentum, samples, server=True))
    first = min(cut for cut, _ in devices)
    merged = merge(start, holders, device_copies=device_copies, first=first)
    state, momentum = reference(start, holders, device_copies=device_copies, first=first)
    assert_close(merged.state, state, rtol=2e-6)
    assert_close(merged.momentum, momentum, rtol=2e-6)
    for name, values in merged.state.items():
        assert values.dtype == start.state[name].dtype


def test_what_nobody_trained_stays_bit_for_bit() -> None:
    rng = np.random.default_rng(0)
    start = start_model(rng)
    device = Holder(random_state(rng, of_device(3)), {}, 10, server=False)
    merged = merge(start, [device], device_copies=True, first=3)
    assert differs(merged.state, start.state) <= set(of_device(3))
    assert_same(merged.momentum, start.momentum)


def test_a_single_holder_is_taken_over_bit_for_bit() -> None:
    rng = np.random.default_rng(0)
    start = start_model(rng)
    device = Holder(random_state(rng, of_device(3)), {}, 7, server=False)
    server = Holder(random_state(rng, of_server(3)), {}, 7, server=True)
    merged = merge(start, [device, server], device_copies=True, first=3)
    for holder in (device, server):
        assert_same({n: merged.state[n] for n in holder.state}, holder.state)


def test_without_device_copies_a_block_the_server_trains_has_server_copies_only() -> None:
    rng = np.random.default_rng(0)
    start = start_model(rng)
    shallow, deep = (Holder(random_state(rng, of_device(c)), {}, 10, server=False) for c in (2, 5))
    replica = Holder(random_state(rng, of_server(2)), {}, 10, server=True)
    merged = merge(start, [shallow, deep, replica], device_copies=False, first=2)
    for block in range(2, 10):
        names = of_server(block, block + 1)
        assert_same({n: merged.state[n] for n in names}, {n: replica.state[n] for n in names})
    head = [n for n in NAMES if n.startswith("heads.5.")]
    assert_same({n: merged.state[n] for n in head}, {n: deep.state[n] for n in head})


def test_a_claim_without_samples_weighs_nothing() -> None:
    rng = np.random.default_rng(0)
    start = start_model(rng)
    merged = merge(
        start,
        [
            Holder(random_state(rng, of_device(2)), {}, 0, server=False),
            Holder(random_state(rng, of_server(2)), {}, 0, server=True),
        ],
        device_copies=True,
        first=2,
    )
    assert_same(merged.state, start.state)


def test_a_holder_that_is_not_finite_is_refused_whole() -> None:
    rng = np.random.default_rng(0)
    start = start_model(rng)
    aggregation = Aggregation(start, first_server_block=2, device_copies=True)
    state = random_state(rng, of_device(2))
    state["heads.2.0.fc.bias"][0] = np.nan
    with pytest.raises(AveragingError, match=r"heads\.2\.0\.fc\.bias"):
        aggregation.add_device(state, 10)
    assert_same(aggregation.result().state, start.state)


def test_blocks_and_heads_are_told_apart_by_name() -> None:
    assert block_of("blocks.12.conv1.weight") == 12
    assert block_of("heads.3.0.fc.bias") is None
