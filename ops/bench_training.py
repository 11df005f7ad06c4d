"""``splitfleet bench training``: a fleet of one agent against plain PyTorch in one process.

Both train the same network with the same exit head and losses on the same batches of real images
(the bundled ones, padded to 32 pixels and repeated over three channels). The fleet is a
coordinator, a broker and an agent as processes; plain PyTorch is a loop in a process of its own.
They are measured in turn, so that a change of the machine's speed hits both.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console

from broker.config import BrokerConfig
from broker.embedded import EmbeddedBroker
from broker.messages import Network
from coordinator.observer import Observer
from coordinator.service import build_core, new_boot, run_coordinator
from coordinator.service import last_will as coordinator_will
from coordinator.settings import CoordinatorSettings
from coordinator.traffic import Traffic
from edge_agent.data import DeviceData
from edge_agent.service import last_will, run_agent
from edge_agent.settings import AgentSettings
from edge_agent.snapshots import DiskSnapshots
from ops import bench_rows
from ops.errors import FleetFailed
from ops.run import stop_signals, transport_for
from tensors.batches import BatchStream
from tensors.datasets import Dataset, load_dataset
from tensors.networks import NetworkSpec, build_network
from tensors.training import choose_compute, make_optimizer, set_learning_rate

CUT = 3
BATCH = 32
RATE = 0.05
WARM_UP = 0.2
"""Share of a measurement that is not counted."""
LIMIT_S = 300.0


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """What is measured. Threads are torch's in each process."""

    width: int
    window: int
    agent_threads: int
    coordinator_threads: int
    codec: str
    batches: int


def run_bench(
    widths: Sequence[int],
    windows: Sequence[int],
    *,
    seconds: float,
    pairs: int,
    broker: str | None,
    append: Path | None,
    quiet: bool,
    threads: tuple[int, int] | None = None,
    codec: str | None = None,
) -> list[dict[str, Any]]:
    """Measure every width and window; the rows, which are printed and appended if wanted."""
    codec = codec or CoordinatorSettings().codec
    console = Console(stderr=True, quiet=quiet)
    rows = []
    for width in widths:
        plain_threads = torch.get_num_threads()
        lent = threads or (1, max(1, plain_threads - 1))
        rate = _plain(width, seconds=3.0)
        batches = max(20, int(seconds * rate / BATCH))
        ratios: dict[int, list[tuple[float, float]]] = {window: [] for window in windows}
        for pair in range(pairs):
            for window in windows:
                plain = _plain(width, seconds=seconds)
                fleet = _fleet(Case(width, window, *lent, codec, batches), broker)
                ratios[window].append((fleet, plain))
                console.print(
                    f"width {width} window {window} pair {pair + 1}/{pairs}: "
                    f"fleet {fleet:.0f}, plain {plain:.0f} samples/s, {fleet / plain:.2f}"
                )
        for window, measured in ratios.items():
            rows.append(
                {
                    "date": bench_rows.today(),
                    "machine": bench_rows.machine(),
                    "commit": bench_rows.commit(),
                    "broker": broker or "embedded",
                    "width": width,
                    "window": window,
                    "codec": codec,
                    "threads": f"{lent[0]}+{lent[1]} / {plain_threads}",
                    "fleet": statistics.median(fleet for fleet, _ in measured),
                    "plain": statistics.median(plain for _, plain in measured),
                    "ratio": statistics.median(fleet / plain for fleet, plain in measured),
                }
            )
    cells = [_cells(row) for row in rows]
    title = "samples/s: fleet of one agent against plain PyTorch"
    bench_rows.show(title, list(rows[0]), cells, console)
    if append is not None:
        bench_rows.append(append, cells)
    return rows


def images() -> Dataset:
    """The bundled training images as 32×32×3."""
    small = load_dataset("fashion-mnist-small")
    padded = np.pad(small.images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    return Dataset(
        "fashion-mnist-small at 32 px",
        np.repeat(padded, 3, axis=3),
        small.labels.copy(),
        small.classes,
        small.mean * 3,
        small.std * 3,
    )


def _spec(width: int) -> NetworkSpec:
    return NetworkSpec(width=width, channels=3, size=32, classes=10)


def _plain(width: int, *, seconds: float) -> float:
    return float(_child("plain", str(width), str(seconds)))


def plain_training(width: int, seconds: float) -> float:
    """Samples per second of an ordinary training loop."""
    spec = _spec(width)
    network = build_network(spec)
    compute = choose_compute(lambda: build_network(spec), (BATCH, 3, 32, 32))
    compute.place(network)
    optimizer = make_optimizer(network, momentum=0.9, weight_decay=5e-4)
    set_learning_rate(optimizer, RATE)
    data = images()
    rows = np.arange(len(data))
    stream = BatchStream(data, rows, batch_size=BATCH, seed=0, device="plain")
    started, counted, position = time.perf_counter(), 0, 0
    begun = started + WARM_UP * seconds
    while time.perf_counter() < started + seconds:
        if time.perf_counter() < begun:
            counted, first = 0, time.perf_counter()
        x, y = stream.batch(position)
        labels = torch.from_numpy(y)
        with compute.arithmetic():
            features = network(compute.tensor(x), stop=CUT)
            exit_logits = network.exit(features, CUT)
            logits = network(features, start=CUT)
        loss = F.cross_entropy(logits.float(), labels) + F.cross_entropy(
            exit_logits.float(), labels
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        position += 1
        counted += BATCH
    return counted / (time.perf_counter() - first)


class _Stopwatch(Observer):
    def __init__(self) -> None:
        self.times: list[float] = []

    def batch_applied(self, cut: int, images: int, loss: float | None, seconds: float) -> None:
        del cut, images, loss, seconds
        self.times.append(time.perf_counter())

    def rate(self) -> float:
        counted = self.times[int(WARM_UP * len(self.times)) :]
        return BATCH * (len(counted) - 1) / (counted[-1] - counted[0])


def _fleet(case: Case, broker: str | None) -> float:
    folder = tempfile.TemporaryDirectory(prefix="splitfleet-bench-")
    with folder as name, broker_at(broker) as url:
        return float(_child("fleet", json.dumps(dataclasses.asdict(case)), url, name))


@contextmanager
def broker_at(url: str | None) -> Iterator[str]:
    """The URL that is given, or that of an embedded broker as long as the context lasts."""
    if url is not None:
        yield url
        return
    with EmbeddedBroker() as embedded:
        yield embedded.url


def fleet_training(case: Case, url: str, folder: Path) -> float:
    """Samples per second the coordinator applied; it runs here, the agent in a child."""
    settings = CoordinatorSettings(
        fleet="bench",
        state_dir=folder / "coordinator",
        network=Network(**dataclasses.asdict(_spec(case.width))),
        codec=case.codec,
        window=case.window,
        rounds=1,
        batches_per_round=case.batches,
        learning_rate=RATE,
        inference=False,
        threads=case.coordinator_threads,
    )
    stopwatch, traffic, boot = _Stopwatch(), Traffic(_refuse), new_boot()
    core = build_core(
        settings, observer=stopwatch, traffic=traffic.totals, boot=boot, clock=time.monotonic
    )
    command = _command("agent", json.dumps(dataclasses.asdict(case)), url, str(folder))
    agent = subprocess.Popen(command, stdin=subprocess.PIPE)

    async def serve() -> None:
        transport = transport_for(
            BrokerConfig(url=url), "coordinator", coordinator_will(settings, boot)
        )
        with stop_signals() as stop:
            async with asyncio.timeout(LIMIT_S):
                await run_coordinator(settings, transport, core, traffic, stop=stop)

    try:
        asyncio.run(serve())
    finally:
        agent.terminate()
        agent.wait(20)
    return stopwatch.rate()


def bench_agent(case: Case, url: str, folder: Path) -> None:
    """The agent's side of :func:`fleet_training`."""
    torch.set_num_threads(case.agent_threads)
    data = images()
    nothing = np.zeros(0, np.int64)
    settings = AgentSettings(
        fleet="bench",
        device="bench",
        cut=CUT,
        state_dir=folder / "agent",
        exit_when_finished=True,
    )
    boot = new_boot()

    async def serve() -> None:
        transport = transport_for(BrokerConfig(url=url), "bench", last_will(settings, boot))
        with stop_signals(until_eof=True) as stop:
            await run_agent(
                settings,
                transport,
                DeviceData(data, np.arange(len(data)), None, nothing),
                DiskSnapshots(settings.state_dir),
                boot=boot,
                stop=stop,
            )

    asyncio.run(serve())


def _refuse(reason: str) -> None:
    raise FleetFailed(f"a message was dropped in the benchmark: {reason}")


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "ops.bench_training", *arguments]


def _child(*arguments: str) -> str:
    done = subprocess.run(
        _command(*arguments), stdout=subprocess.PIPE, timeout=LIMIT_S + 60, check=False
    )
    if done.returncode != 0:
        raise FleetFailed(f"the measurement {arguments[0]!r} failed; its error is above")
    return done.stdout.decode().strip().splitlines()[-1]


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        str(value)
        if not isinstance(value, float)
        else f"{value:.2f}"
        if key == "ratio"
        else f"{value:.0f}"
        for key, value in row.items()
    ]


def _main(arguments: list[str]) -> None:
    match arguments:
        case ["plain", width, seconds]:
            print(plain_training(int(width), float(seconds)))
        case ["fleet", case, url, folder]:
            print(fleet_training(Case(**json.loads(case)), url, Path(folder)))
        case ["agent", case, url, folder]:
            bench_agent(Case(**json.loads(case)), url, Path(folder))
        case _:
            raise SystemExit("this is the inside of `splitfleet bench training`")


if __name__ == "__main__":
    _main(sys.argv[1:])
