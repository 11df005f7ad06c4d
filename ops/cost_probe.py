"""The inside of ``splitfleet bench cost``: one measurement in a process of its own.

A fresh process, because a peak of memory says something only above a known ground: the resident
memory after all is imported and torch has convolved once. The kernel's high-water mark is set back
(``/proc/self/clear_refs``) before each part, so that a part does not answer for the one before.
CPU time is that of the process, with one thread.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict

from coordinator.aggregation import Aggregation, Model, block_of, half_of
from coordinator.cascade import TOGETHER
from coordinator.contribution import Contribution
from coordinator.engines import Engine, Entry, Step, make_engine
from edge_agent.learner import TorchLearner, TorchPredictor
from edge_agent.trainer import DeviceTrainer
from tensors.networks import CutNetwork, NetworkSpec, State, build_network, read_state
from tensors.training import (
    Compute,
    MemoryFormat,
    Precision,
    choose_compute,
    make_optimizer,
    set_learning_rate,
)

MOMENTUM, DECAY, RATE = 0.9, 5e-4, 0.01
WARM_UP, LEAST = 2, 3
"""Batches that are not counted, and the fewest that are."""


class Order(BaseModel):
    """What to measure. ``cuts``: one of a device, none for the whole network; of a server all."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    what: str
    width: int
    cuts: tuple[int, ...]
    batch_size: int
    seconds: float
    strategy: str = ""
    precision: Precision = "fp32"
    memory_format: MemoryFormat = "contiguous"

    @property
    def spec(self) -> NetworkSpec:
        """CIFAR's images and ten classes."""
        return NetworkSpec(width=self.width)


class Memory:
    """Resident memory above what it was when this was made, in bytes."""

    def __init__(self) -> None:
        _return_freed()
        self._ground = _resident("VmRSS")
        self.restart()

    def restart(self) -> None:
        """Forget the peak so far."""
        _return_freed()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def peak(self) -> int:
        """The most since :meth:`restart`."""
        return _resident("VmHWM") - self._ground


def measure(order: Order) -> dict[str, float]:
    """Carry out an order: CPU seconds per sample and peaks of memory in bytes, by name."""
    kinds: dict[str, Callable[[Order], dict[str, float]]] = {
        "device-training": _device_training,
        "device-inference": _device_inference,
        "whole-training": _whole_training,
        "whole-inference": _whole_inference,
        "server": _server,
    }
    if order.what not in kinds:
        raise ValueError(f"what = {order.what!r}: choose one of {', '.join(kinds)}")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    _wake_up()
    return kinds[order.what](order)


# -- a device, and the whole network in its place --------------------------------------------------


def _device_training(order: Order) -> dict[str, float]:
    """As the agent does it: forward and exit, then one step on exit and returned gradient."""
    images, labels = _batch(order)
    memory = Memory()
    compute = _compute(order)
    half = build_network(order.spec).device_half(order.cuts[0])
    trainer = DeviceTrainer(
        half,
        compute,
        exit_weight=1.0,
        feedback_weight=1.0,
        momentum=MOMENTUM,
        weight_decay=DECAY,
    )
    learner = TorchLearner(half, compute, trainer)
    learner.set_learning_rate(RATE)
    built = memory.peak()
    memory.restart()

    def step(number: int) -> None:
        features = learner.forward(number, images, labels)
        learner.backward(number, torch.full_like(features, 1e-4))

    return _measured(order, step) | {"peak_bytes": memory.peak(), "built_bytes": built}


def _device_inference(order: Order) -> dict[str, float]:
    images, _ = _batch(order)
    memory = Memory()
    compute = _compute(order)
    half = build_network(order.spec).device_half(order.cuts[0])
    compute.place(half)
    predictor = TorchPredictor(half, compute)
    built = memory.peak()
    memory.restart()
    cpu = _measured(order, lambda _: predictor.predict(images))
    return cpu | {"peak_bytes": memory.peak(), "built_bytes": built}


def _whole_training(order: Order) -> dict[str, float]:
    """Ordinary training of the network without exits: what a device alone would do."""
    images, labels = _batch(order)
    targets = torch.from_numpy(labels)
    memory = Memory()
    compute = _compute(order)
    network = _without_exits(order)
    compute.place(network)
    optimizer = make_optimizer(network, momentum=MOMENTUM, weight_decay=DECAY)
    set_learning_rate(optimizer, RATE)
    built = memory.peak()
    memory.restart()

    def step(_: int) -> None:
        with compute.arithmetic():
            logits = network(compute.tensor(images))
        loss = F.cross_entropy(logits.float(), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return _measured(order, step) | {"peak_bytes": memory.peak(), "built_bytes": built}


def _whole_inference(order: Order) -> dict[str, float]:
    images, _ = _batch(order)
    memory = Memory()
    compute = _compute(order)
    network = _without_exits(order)
    compute.place(network)
    network.eval()
    built = memory.peak()
    memory.restart()

    def answer(_: int) -> None:
        with torch.inference_mode(), compute.arithmetic():
            network(compute.tensor(images)).float().softmax(1).numpy()

    return _measured(order, answer) | {"peak_bytes": memory.peak(), "built_bytes": built}


def _without_exits(order: Order) -> CutNetwork:
    network = build_network(order.spec)
    return CutNetwork({i: network.blocks[str(i)] for i in range(network.stop)}, {})


def _measured(
    order: Order, work: Callable[[int], object], *, warm_up: int = WARM_UP
) -> dict[str, float]:
    """Median CPU seconds of one piece of work, by the images in a batch."""
    for number in range(warm_up):
        work(number)
    spent: list[float] = []
    while len(spent) < LEAST or sum(spent) < order.seconds:
        started = time.process_time()
        work(warm_up + len(spent))
        spent.append(time.process_time() - started)
    return {"cpu_s_per_sample": statistics.median(spent) / order.batch_size}


# -- the server ------------------------------------------------------------------------------------


def _server(order: Order) -> dict[str, float]:
    """One round of a strategy's engine: every device sends batches in turn, then all is merged.

    All devices are active at once, which is when *averaging* needs most. A group of batches is one
    of each cut, as many in all strategies, and measured as one.
    """
    entries = _entries(order)
    memory = Memory()
    network = build_network(order.spec)
    state = read_state(network)
    model = Model(
        state,
        {
            name: np.zeros(tuple(parameter.shape), np.float32)
            for name, parameter in network.named_parameters()
            if block_of(name) is not None
        },
    )
    engine = make_engine(
        order.strategy, network, _compute(order), momentum=MOMENTUM, weight_decay=DECAY
    )
    aggregation = Aggregation(model, first_server_block=min(order.cuts), device_copies=True)
    engine.begin(model, RATE)
    ground = memory.peak()
    memory.restart()
    _train(engine, [_first_images(entry) for entry in entries])  # every device has its replica
    groups = cycle(_grouped(entries))
    _train(engine, next(groups))
    cpu = _measured(order, lambda _: _train(engine, next(groups)), warm_up=0)
    training = memory.peak()
    memory.restart()
    started = time.process_time()
    for entry in entries:
        _contribution(engine, model, entry, order.batch_size).fold(aggregation, model, 0)
    engine.close(aggregation)
    merged = aggregation.result()
    aggregated = time.process_time() - started
    assert merged.state.keys() == state.keys()
    return {
        "cpu_s_per_sample": cpu["cpu_s_per_sample"] / len({*order.cuts}),
        "peak_bytes": training,
        "ground_bytes": ground,
        "aggregation_cpu_s": aggregated,
        "aggregation_peak_bytes": memory.peak(),
    }


def _entries(order: Order) -> list[Entry]:
    """A batch of each device: what its half makes of random images. Devices of a cut share it."""
    network = build_network(order.spec).eval()
    images, labels = _batch(order)
    with torch.no_grad():
        features = {
            cut: network(torch.from_numpy(images), stop=cut) for cut in sorted(set(order.cuts))
        }
    return [
        Entry(str(index), cut, features[cut], torch.from_numpy(labels))
        for index, cut in enumerate(order.cuts)
    ]


def _grouped(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Groups of consecutive devices, as long as there are different cuts; a rest is left out."""
    size = len({entry.cut for entry in entries})
    return [list(entries[i : i + size]) for i in range(0, len(entries) - size + 1, size)]


def _first_images(entry: Entry) -> Entry:
    return dataclasses.replace(entry, features=entry.features[:2], labels=entry.labels[:2])


def _train(engine: Engine, entries: Sequence[Entry]) -> None:
    """One step on each batch, or on as many at once as the strategy takes."""
    if not engine.gathers:
        for entry in entries:
            engine.step(entry, want_gradient=True)
        return
    for chosen in _chunks(entries, TOGETHER):
        for outcome in engine.step_together(chosen, want_gradients=True):
            if not isinstance(outcome, Step):
                raise outcome


def _chunks(entries: Sequence[Entry], size: int) -> Iterator[list[Entry]]:
    rest = iter(entries)
    while chunk := list(islice(rest, size)):
        yield chunk


def _contribution(engine: Engine, model: Model, entry: Entry, samples: int) -> Contribution:
    """A device's upload, arrays of its own as they come off the wire, and its server-side copy."""
    half: State = {name: values.copy() for name, values in half_of(model.state, entry.cut).items()}
    server, momentum = engine.finish(entry.device)
    return Contribution(entry.device, entry.cut, 0, model, samples, half, server, momentum)


# -- small parts -----------------------------------------------------------------------------------


def _batch(order: Order) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    spec = order.spec
    images = rng.standard_normal((order.batch_size, spec.channels, spec.size, spec.size))
    return images.astype(np.float32), rng.integers(0, spec.classes, order.batch_size)


def _compute(order: Order) -> Compute:
    spec = order.spec
    return choose_compute(
        lambda: build_network(spec),
        (order.batch_size, spec.channels, spec.size, spec.size),
        device="cpu",
        precision=order.precision,
        memory_format=order.memory_format,
    )


def _wake_up() -> None:
    """Small steps, so that what torch loads on first use, of code mostly, is not counted."""
    order = Order(what="", width=16, cuts=(2,), batch_size=2, seconds=0)
    _device_training(order)
    _device_inference(order)


def _return_freed() -> None:
    """Give the kernel back what is free, where the C library can (glibc)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident(key: str) -> int:
    """A line of the process's status, in bytes."""
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def _main(arguments: list[str]) -> None:
    if len(arguments) != 1:
        raise SystemExit("this is the inside of `splitfleet bench cost`")
    result: dict[str, Any] = measure(Order.model_validate_json(arguments[0]))
    print(json.dumps(result))


if __name__ == "__main__":
    _main(sys.argv[1:])
