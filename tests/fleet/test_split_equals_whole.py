"""Split learning is nothing but the network's own training, computed in two places."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from broker.config import BrokerConfig
from broker.memory import MemoryBroker
from broker.mqtt import MqttTransport
from coordinator.rounds import learning_rate
from coordinator.settings import CoordinatorSettings
from tensors.networks import build_network, read_state
from tests.fleet_in_process import Connect, Fleet, in_memory
from tests.tiny import SPEC, Array, make_assignment, make_device_data

GOLDEN = Path(__file__).with_name("split_equals_whole.json")
DEVICE, CUT = "only", 3
ROUNDS, QUOTA = 4, 5
"""20 steps; momentum and BatchNorm's buffers have to cross three round boundaries."""
DATA = make_device_data(64, tests=0)


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(mode=True)
    yield
    torch.use_deterministic_algorithms(mode=False)
    torch.set_num_threads(threads)


@pytest.fixture(params=["memory", "mosquitto"])
def connect(request: pytest.FixtureRequest) -> Connect:
    if request.param == "memory":
        return in_memory(MemoryBroker())
    config = BrokerConfig(url=request.getfixturevalue("mosquitto").url)
    return lambda name, will: MqttTransport(config, name, will=will)


def train_whole(settings: CoordinatorSettings) -> tuple[dict[str, Array], list[float]]:
    """The unsplit network on the same batches, in a plain loop; its state and every loss."""
    network = build_network(SPEC, seed=settings.seed).train()
    backbone = [p for name, p in network.named_parameters() if name.startswith("blocks.")]
    optimizer = torch.optim.SGD(
        backbone,
        lr=0.0,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        fused=True,  # as both ends have it: it rounds in another order than the loop
    )
    assignment = make_assignment(
        batch_size=settings.batch_size, seed=settings.seed, augment=settings.augment
    )
    stream = DATA.stream(assignment, DEVICE)
    losses = []
    for position in range(ROUNDS * QUOTA):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                settings.learning_rate, 1 + position // QUOTA, ROUNDS, settings.schedule
            )
        images, labels = stream.batch(position)
        loss = F.cross_entropy(network(torch.from_numpy(images)), torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return read_state(network), losses


def make_fleet(folder: Path, connect: Connect, **settings: Any) -> Fleet:
    return Fleet(
        folder,
        connect,
        {DEVICE: CUT},
        lambda _: DATA,
        **settings,
        feedback="gradient",
        feedback_weight=1.0,
        exit_weight=0.0,
        codec="fp32",
        window=1,
        rounds=ROUNDS,
        batches_per_round=QUOTA,
        schedule="cosine",
        augment="crop-flip",
    )


def relative_error(actual: Array, expected: Array) -> float:
    scale = max(float(np.abs(expected).max(initial=0)), 1e-12)
    return float(np.abs(actual - expected).max(initial=0)) / scale


@pytest.mark.parametrize("strategy", ["averaging", "sequential"])
@pytest.mark.parametrize("labels", ["server", "device"])
async def test_split_equals_whole(
    tmp_path: Path, connect: Connect, strategy: str, labels: str
) -> None:
    fleet = make_fleet(tmp_path, connect, strategy=strategy, labels=labels)
    fleet.start()
    await fleet.finish()
    expected, losses = train_whole(fleet.settings)
    actual = fleet.checkpoint().model.state
    start = read_state(build_network(SPEC, seed=fleet.settings.seed))
    names = [name for name in expected if name.startswith("blocks.")]
    for name in names:
        assert relative_error(actual[name], expected[name]) < 1e-6, name
    for name in expected.keys() - set(names):
        if name.endswith((".weight", ".bias")):  # with weight 0 the exits learn nothing
            np.testing.assert_array_equal(actual[name], start[name], err_msg=name)
    known = losses if labels == "server" else [float("nan")] * len(losses)
    np.testing.assert_allclose(fleet.watcher.losses, known, rtol=1e-6)
    moved = [name for name in names if relative_error(start[name], expected[name]) > 1e-3]
    assert len(moved) > len(names) / 2, "there was something to get wrong"


async def test_losses_are_the_golden_ones(tmp_path: Path) -> None:
    """Guards the mathematics against changes of both ways of training at once.

    The tolerance is what another processor's arithmetic may come to. After a wanted change, put
    the new losses, which a failure prints, into the file.
    """
    _, losses = train_whole(make_fleet(tmp_path, in_memory(MemoryBroker())).settings)
    np.testing.assert_allclose(
        losses, json.loads(GOLDEN.read_text()), rtol=2e-3, err_msg=f"{losses}"
    )
