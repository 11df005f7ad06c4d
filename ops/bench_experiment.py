"""``splitfleet bench experiment``: a fleet in one process beside a plain PyTorch loop.

Both train the same arm: devices with an exit each at cuts 2 to 5, averaging with gradients in fp32,
on the same batches. The loop (``ops.plain_training``) knows nothing of this project's classes. They
are measured in turn, in pairs, one thread each.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from broker.messages import Network
from coordinator.settings import CoordinatorSettings
from edge_agent.data import DeviceData
from ops import bench_rows
from ops.errors import SettingsWrong
from ops.plain_training import PlainTraining
from ops.simulator import Device, SimulatedFleet
from tensors.batches import BatchStream
from tensors.batches_torch import TorchBatchStream, TorchImages
from tensors.datasets import Dataset, load_dataset
from tensors.partition import partition
from tensors.training import MemoryFormat, Precision

CUTS = (2, 3, 4, 5)
"""One device each."""
HEADER = (
    "date",
    "machine",
    "commit",
    "device",
    "precision",
    "width",
    "batch",
    "window",
    "plain samples/s",
    "fleet samples/s",
    "ratio: median (least … most)",
    "pairs",
)
Row = dict[str, Any]
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Setup:
    """What is trained and how. ``batches`` are each device's in a round."""

    dataset: str = "cifar10"
    width: int = 16
    batch_size: int = 32
    rounds: int = 6
    batches: int = 10
    device: str = "cpu"
    precision: Precision = "bf16"
    memory_format: MemoryFormat = "channels_last"
    window: int = 1
    resident: bool = False
    """Whether batches are made on the compute device."""


def run_bench(
    setup: Setup, *, pairs: int, data_root: Path | None, append: Path | None, quiet: bool
) -> Row:
    """Measure ``pairs`` pairs after one that is thrown away; print and append a row.

    Raises ``SettingsWrong`` for a setup in which both would not compute alike.
    """
    if "auto" in (setup.precision, setup.memory_format):
        raise SettingsWrong("choose a precision and a memory format: both sides have to have them")
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    console = Console(quiet=quiet)
    data = _data(setup, data_root)
    plain = _plain(setup, data)
    measured = []
    for number in range(pairs + 1):
        pair = plain(), _fleet(setup, data)
        if number:
            measured.append(pair)
            console.print(f"plain {pair[0]:.0f}, fleet {pair[1]:.0f}: {pair[1] / pair[0]:.3f}")
    ratios = [fleet / plain for plain, fleet in measured]
    row = {
        "plain_samples_per_s": statistics.median(plain for plain, _ in measured),
        "fleet_samples_per_s": statistics.median(fleet for _, fleet in measured),
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "pairs": pairs,
    }
    cells = _cells(setup, row)
    bench_rows.show("a fleet beside a plain loop", HEADER, [cells], console)
    if append is not None:
        bench_rows.append(append, [cells])
    return row


def _cells(setup: Setup, row: Row) -> list[str]:
    device = setup.device
    if device.startswith("cuda"):
        device = torch.cuda.get_device_name(device)
    return [
        bench_rows.today(),
        bench_rows.machine(),
        bench_rows.commit(),
        device,
        f"{setup.precision} {setup.memory_format}",
        str(setup.width),
        str(setup.batch_size),
        str(setup.window),
        f"{row['plain_samples_per_s']:.0f}",
        f"{row['fleet_samples_per_s']:.0f}",
        f"{row['ratio']:.3f} ({row['least']:.3f} … {row['most']:.3f})",
        str(row["pairs"]),
    ]


def _data(setup: Setup, data_root: Path | None) -> list[DeviceData]:
    train = load_dataset(setup.dataset, "train", root=data_root)
    rows = np.arange(min(len(train), _samples(setup)))
    train = replace(train, images=train.images[rows], labels=train.labels[rows])
    resident = TorchImages(train, setup.device) if setup.resident else None
    shares = partition(train.labels, len(CUTS), "iid", 0)
    nothing = np.zeros(0, np.int64)
    return [DeviceData(train, share, None, nothing, resident) for share in shares]


def _fleet(setup: Setup, data: list[DeviceData]) -> float:
    """Samples per second, from the first message to the last checkpoint."""
    with tempfile.TemporaryDirectory(prefix="splitfleet-bench-") as folder:
        settings = CoordinatorSettings(
            state_dir=Path(folder),
            network=_network(setup, data[0].train),
            codec="fp32",
            rounds=setup.rounds,
            batches_per_round=setup.batches,
            batch_size=setup.batch_size,
            min_devices=len(CUTS),
            window=setup.window,
            augment="crop-flip",
            inference=False,
            device=setup.device,
            precision=setup.precision,
            memory_format=setup.memory_format,
        )
        devices = [
            Device(f"cut-{cut}", cut=cut, data=share) for cut, share in zip(CUTS, data, strict=True)
        ]
        fleet = SimulatedFleet(settings, devices, learning="real", by_reference=True)
        return _samples(setup) / _seconds(setup, fleet.run)


def _plain(setup: Setup, data: list[DeviceData]) -> Any:
    network = _network(setup, data[0].train)
    training = PlainTraining(
        CUTS,
        channels=network.channels,
        side=network.size,
        width=network.width,
        classes=network.classes,
        device=setup.device,
        bf16=setup.precision == "bf16",
        channels_last=setup.memory_format == "channels_last",
    )
    streams = [_stream(setup, share, f"cut-{cut}") for cut, share in zip(CUTS, data, strict=True)]

    def rounds() -> None:
        for number in range(setup.rounds):

            def batch(device: int, step: int, first: int = number * setup.batches) -> Batch:
                images, labels = streams[device].batch(first + step)
                return torch.as_tensor(images), torch.as_tensor(labels)

            training.round(setup.batches, batch)

    return lambda: _samples(setup) / _seconds(setup, rounds)


def _stream(setup: Setup, data: DeviceData, device: str) -> BatchStream | TorchBatchStream:
    about: dict[str, Any] = {
        "batch_size": setup.batch_size,
        "seed": 0,
        "device": device,
        "augment": "crop-flip",
    }
    if data.resident is not None:
        return TorchBatchStream(data.resident, data.train_rows, **about)
    return BatchStream(data.train, data.train_rows, **about)


def _network(setup: Setup, train: Dataset) -> Network:
    _, size, _, channels = train.images.shape
    return Network(width=setup.width, channels=channels, size=size, classes=len(train.classes))


def _samples(setup: Setup) -> int:
    return len(CUTS) * setup.rounds * setup.batches * setup.batch_size


def _seconds(setup: Setup, work: Any) -> float:
    cuda = setup.device.startswith("cuda")
    if cuda:
        torch.cuda.synchronize(setup.device)
    started = time.perf_counter()
    work()
    if cuda:
        torch.cuda.synchronize(setup.device)
    return time.perf_counter() - started
