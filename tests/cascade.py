"""What tests of the cascade share: a network without BatchNorm, batches, an engine."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import nn

from coordinator.aggregation import Aggregation, Model
from coordinator.cascade import Cascade, RateRule
from coordinator.engines import Engine
from coordinator.server_copy import Entry, Step
from tensors.networks import CutNetwork, read_state
from tensors.training import Compute
from tests.server_side import NETWORK, SHAPES, START
from tests.tiny import CLASSES, CPU

RATE, MOMENTUM, DECAY = 0.05, 0.9, 0.01
WIDTHS = (6, 7, 8, 9, 10, CLASSES)
"""Features before and after each block of the network without BatchNorm."""


def plain_network(
    *, seed: int = 0, activation: Callable[[int], nn.Module] = lambda _: nn.Tanh()
) -> CutNetwork:
    """Five blocks of an activation and a linear layer, without BatchNorm."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks: dict[int, nn.Module] = {
            index: nn.Sequential(activation(index), nn.Linear(inputs, outputs))
            for index, (inputs, outputs) in enumerate(pairwise(WIDTHS))
        }
    return CutNetwork(blocks, {})


def start_of(network: CutNetwork) -> Model:
    momentum = {n: np.zeros(tuple(p.shape), np.float32) for n, p in network.named_parameters()}
    return Model(read_state(network), momentum)


def make_cascade(
    network: CutNetwork = NETWORK,
    *,
    rule: RateRule = "none",
    compute: Compute = CPU,
    rate: float = RATE,
) -> Cascade:
    engine = Cascade(
        copy.deepcopy(network), compute, momentum=MOMENTUM, weight_decay=DECAY, rate_rule=rule
    )
    engine.begin(START if network is NETWORK else start_of(network), rate)
    return engine


def plain_entry(cut: int, seed: int = 0, size: int = 5) -> Entry:
    generator = torch.Generator().manual_seed(1000 * cut + seed)
    features = torch.randn((size, WIDTHS[cut]), generator=generator)
    return Entry(
        f"{cut}-{seed}", cut, features, torch.randint(0, CLASSES, (size,), generator=generator)
    )


def entry_at(cut: int, seed: int = 0, size: int = 8) -> Entry:
    """A batch for the network with BatchNorm."""
    generator = torch.Generator().manual_seed(1000 * cut + seed)
    features = torch.randn((size, *SHAPES[cut - 1]), generator=generator).relu()
    return Entry(
        f"{cut}-{seed}", cut, features, torch.randint(0, CLASSES, (size,), generator=generator)
    )


def train(engine: Cascade, *entries: Entry, want_gradients: bool = True) -> list[Step]:
    steps = []
    for outcome in engine.step_together(entries, want_gradients=want_gradients):
        assert isinstance(outcome, Step), outcome
        steps.append(outcome)
    return steps


def close(engine: Engine | Cascade, start: Model = START) -> Model:
    aggregation = Aggregation(start, first_server_block=1, device_copies=True)
    engine.close(aggregation)
    return aggregation.result()
