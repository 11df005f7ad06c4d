"""The devices' end of ``splitfleet bench inference-link``: one process, many agents.

It reads a :class:`Task` as JSON from its standard input and prints :class:`Measured` as JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from broker.config import BrokerConfig
from edge_agent.answer_counts import Counts
from edge_agent.data import DeviceData
from edge_agent.edge import Edge
from edge_agent.errors import AgentError
from edge_agent.settings import AgentSettings
from ops.errors import FleetFailed
from tensors.datasets import Dataset, load_dataset
from tensors.partition import partition

READY_S = 90.0
WARM_UP = 3
"""Images that each device is asked about before those that count."""
QUIET_S, QUIET_BYTES = 3.0, 10_000
"""The link is quiet when it carries less in that time."""
_POLL_S = 0.05
_NET_DEV = Path("/proc/net/dev")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is asked. ``cuts``: one device each, which the broker knows by ``names``.

    Every device is asked about the first ``images`` of its share of the test images, one at a time
    and ``images_per_s`` of them in the mean, whether or not it has answered those before.
    """

    url: str
    fleet: str
    names: tuple[str, ...]
    identities: tuple[str, ...]
    """The devices' folders of key and certificates."""
    cuts: tuple[int, ...]
    state_dir: str
    dataset: str
    data_root: str | None
    networks: tuple[str, ...]
    images: int
    images_per_s: float
    threshold: float
    """With which the coordinator has them answer; waited for."""
    interface: str

    @classmethod
    def read(cls, text: str) -> Task:
        """What :func:`json.dumps` has made of its fields."""
        fields = json.loads(text)
        for name in ("names", "identities", "cuts", "networks"):
            fields[name] = tuple(fields[name])
        return cls(**fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class OfDevice:
    """What came of a device's images, in the order of its share.

    ``seconds`` from the moment an image was due; ``by`` is ``exit``, ``server``, ``fallback`` or
    ``nobody``, ``reasons`` counts those of fallbacks. ``exit_right`` counts images that the exit
    alone gets right, ``offloads`` those that the server was asked about; ``bytes_up`` and
    ``bytes_down`` are of tensors alone.
    """

    cut: int
    seconds: list[float]
    by: list[str]
    reasons: dict[str, int]
    right: list[bool]
    exit_right: int
    offloads: int
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """``bytes_up`` and ``bytes_down`` are of IP packets, of all devices together."""

    devices: list[OfDevice]
    bytes_up: int
    bytes_down: int

    @classmethod
    def read(cls, text: str) -> Measured:
        """What the process has printed."""
        fields = json.loads(text)
        fields["devices"] = [OfDevice(**device) for device in fields["devices"]]
        return cls(**fields)


def shares(test: Dataset, devices: int, images: int) -> list[np.ndarray]:
    """Which test images each device is asked about: int64 (images,) or fewer."""
    return [rows[:images] for rows in partition(test.labels, devices, "iid", 0)]


async def measure(task: Task) -> Measured:
    """Run the agents, ask them, and count. Raises ``TimeoutError`` if they do not get ready."""
    root = None if task.data_root is None else Path(task.data_root)
    test = load_dataset(task.dataset, "test", root=root)
    rows = shares(test, len(task.cuts), task.images)
    async with contextlib.AsyncExitStack() as stack:
        edges = [
            await stack.enter_async_context(_edge(task, number, test, own))
            for number, own in enumerate(rows)
        ]
        async with asyncio.timeout(READY_S):
            await asyncio.gather(*(_follow(edge, task.threshold) for edge in edges))
        for edge, own in zip(edges, rows, strict=True):
            await edge.predict(test.images[own[:WARM_UP]])
        await _until_quiet(task.interface)
        before = [(await edge.health()).counts for edge in edges]
        up, down = _link_bytes(task.interface)
        asked = await asyncio.gather(
            *(
                _ask(edge, test, own, task.images_per_s, seed=number)
                for number, (edge, own) in enumerate(zip(edges, rows, strict=True))
            )
        )
        up_then, down_then = _link_bytes(task.interface)
        after = [(await edge.health()).counts for edge in edges]
    return Measured(
        devices=[
            _of_device(cut, own, then, now)
            for cut, own, then, now in zip(task.cuts, asked, before, after, strict=True)
        ],
        bytes_up=up_then - up,
        bytes_down=down_then - down,
    )


def _edge(task: Task, number: int, test: Dataset, rows: np.ndarray) -> Edge:
    """A device's agent, which has these test images."""
    name = task.names[number]
    settings = AgentSettings(
        fleet=task.fleet,
        device=name,
        identity_dir=Path(task.identities[number]),
        cut=task.cuts[number],
        state_dir=Path(task.state_dir) / name,
        networks=task.networks,
        precision="fp32",
        memory_format="contiguous",
    )
    broker = BrokerConfig(url=task.url, backoff_max_s=1.0)
    return Edge(settings, broker, data=DeviceData(test, rows, None, np.zeros(0, np.int64)))


async def _follow(edge: Edge, threshold: float) -> None:
    """Until it answers with this threshold and could ask."""
    while True:
        health = await edge.ready(READY_S)
        known = health.threshold_in_force
        if health.online and known is not None and math.isclose(known, threshold, abs_tol=1e-9):
            return
        await asyncio.sleep(_POLL_S)


async def _until_quiet(interface: str) -> None:
    """Until nobody fetches parameters any more."""
    async with asyncio.timeout(READY_S):
        before = -QUIET_BYTES
        while (now := sum(_link_bytes(interface))) - before >= QUIET_BYTES:
            before = now
            await asyncio.sleep(QUIET_S)


@dataclass(frozen=True, slots=True)
class _Answered:
    seconds: float
    by: str
    reason: str | None
    right: bool


async def _ask(
    edge: Edge, test: Dataset, rows: np.ndarray, images_per_s: float, *, seed: int
) -> list[_Answered]:
    """One image after the other, at times that do not depend on the answers."""
    gaps = np.random.default_rng(seed).exponential(1 / images_per_s, len(rows))
    start = time.monotonic()

    async def ask(row: int, due: float) -> _Answered:
        await asyncio.sleep(due - time.monotonic())
        label = int(test.labels[row])
        try:
            answer = await edge.predict(test.images[row], labels=[label])
        except AgentError:
            return _Answered(time.monotonic() - due, "nobody", None, right=False)
        seconds = time.monotonic() - due
        right = int(answer.labels[0]) == label
        return _Answered(seconds, answer.by[0], answer.reasons[0], right=right)

    times = start + np.cumsum(gaps)
    return list(await asyncio.gather(*(ask(*each) for each in zip(rows, times, strict=True))))


def _of_device(cut: int, asked: Sequence[_Answered], before: Counts, after: Counts) -> OfDevice:
    return OfDevice(
        cut=cut,
        seconds=[each.seconds for each in asked],
        by=[each.by for each in asked],
        reasons=dict(Counter(each.reason for each in asked if each.reason is not None)),
        right=[each.right for each in asked],
        exit_right=after.exit_correct - before.exit_correct,
        offloads=after.offloads - before.offloads,
        bytes_up=after.bytes_up - before.bytes_up,
        bytes_down=after.bytes_down - before.bytes_down,
    )


def _link_bytes(interface: str) -> tuple[int, int]:
    """Sent and received over it since it was made; /proc shows those of this namespace."""
    for line in _NET_DEV.read_text("ascii").splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == interface:
            fields = numbers.split()
            return int(fields[8]), int(fields[0])
    raise FleetFailed(f"there is no interface {interface} at the devices' end of the link")


def _main() -> None:
    torch.set_num_threads(1)
    task = Task.read(sys.stdin.read())
    print(json.dumps(dataclasses.asdict(asyncio.run(measure(task)))))


if __name__ == "__main__":
    _main()
