"""What each block costs on this device: the ground for the choice of a cut layer."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from broker.messages import Measurement
from tensors.networks import CutNetwork, NetworkSpec
from tensors.training import Compute

REPEATS = 3


def measure(
    network: CutNetwork,
    spec: NetworkSpec,
    compute: Compute,
    batch_size: int,
    clock: Callable[[], float],
) -> Measurement:
    """Forward and backward of each block and exit head at ``batch_size``.

    The fastest of a few repetitions counts: other programs only ever make it slower. The memory of
    a cut is estimated as what training its half keeps: weights, gradient and momentum, and the
    saved features of every block (about four maps each), in MiB.
    """
    compute.place(network)
    network.train()
    x = compute.tensor(torch.randn(batch_size, spec.channels, spec.size, spec.size))
    steps: list[float] = []
    exits: list[float] = []
    memory: list[float] = []
    held = 0.0
    for index in range(network.start, network.stop - 1):
        block, head = network.blocks[str(index)], network.heads[str(index + 1)]
        seconds, y = _time(block, x, compute, clock)
        steps.append(1000 * seconds)
        exits.append(1000 * _time(head, y, compute, clock)[0])
        weights = sum(p.numel() for p in block.parameters())
        held += training_bytes(weights, y.numel(), y.element_size())
        head_weights = sum(p.numel() for p in head.parameters())
        memory.append((held + training_bytes(head_weights, 0, 0)) / 2**20)
        x = y.float()
    return Measurement(
        batch_size=batch_size,
        step_ms=steps,
        exit_ms=exits,
        memory_mb=memory,
        available_mb=available_memory_mb(),
        cores=len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
        uplink_bytes_per_s=0.0,
    )


def training_bytes(weights: int, values: float, width: int) -> float:
    """What training keeps of layers with so many weights, and features of ``width`` bytes each.

    Weights, gradient and momentum in 32 bits, and about four maps of the features.
    """
    return 12 * weights + 4 * values * width


def available_memory_mb() -> float:
    """Memory a new program could take, in MiB: the kernel's estimate, else half of all there is."""
    try:
        with Path("/proc/meminfo").open(encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) / 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**21


def _time(
    module: torch.nn.Module, x: Tensor, compute: Compute, clock: Callable[[], float]
) -> tuple[float, Tensor]:
    best = float("inf")
    for _ in range(REPEATS + 1):
        leaf = x.detach().requires_grad_()
        started = clock()
        with compute.arithmetic():
            y: Tensor = module(leaf)
        y.float().sum().backward()
        if compute.device != "cpu":
            torch.cuda.synchronize()
        best = min(best, clock() - started)
    module.zero_grad()
    return best, y.detach()
