"""What ``splitfleet bench inference`` measures: a coordinator that answers, and who asks it.

Each is a process of its own. Parameters are random, which costs as much as trained ones, and every
image is offloaded.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from broker.config import BrokerConfig
from broker.envelopes import up
from broker.link import Arrival, Link
from broker.messages import Assignment, Hello, Network
from broker.mqtt import MqttTransport
from broker.serving_messages import CutPolicy, Features, Prediction
from broker.topics import Topics
from broker.transport import Connected
from coordinator.checkpoint import Checkpoint
from coordinator.observer import Observer
from coordinator.service import (
    build_core,
    last_will,
    new_boot,
    new_run,
    run_coordinator,
    torch_parts,
)
from coordinator.settings import CoordinatorSettings
from coordinator.store import Store
from coordinator.traffic import Traffic
from edge_agent.data import DeviceData
from edge_agent.edge import Edge
from edge_agent.errors import Unanswered
from edge_agent.settings import AgentSettings
from ops.bench_training import images
from ops.errors import FleetFailed
from ops.run import stop_signals, transport_for
from tensors.batches import normalise
from tensors.calibration import OFFLOAD_ALL
from tensors.codecs import parse_codec
from tensors.networks import NetworkSpec, build_network

CUTS = (2, 3, 4, 5)
START_S, STOP_S = 120.0, 20.0
SETTLE_S = 3.0
"""Of asking that is not counted."""


@dataclasses.dataclass(frozen=True, slots=True)
class Served:
    """A coordinator that answers with a network of this ``width`` from ``folder``."""

    url: str
    folder: str
    width: int
    answer_batch: int
    run: str = dataclasses.field(default_factory=new_run)

    @property
    def settings(self) -> CoordinatorSettings:
        """Its settings: one round, which is over."""
        network = Network(width=self.width, channels=3, size=32, classes=10)
        return CoordinatorSettings(
            fleet="bench",
            state_dir=Path(self.folder) / "coordinator",
            network=network,
            rounds=1,
            inference=False,
            stay=True,
            threshold=OFFLOAD_ALL,
            answer_batch=self.answer_batch,
            device_packets_per_s=0,
            device_bytes_per_s=0,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    """``devices`` that have ``outstanding`` questions each out all the time, for ``seconds``."""

    served: Served
    devices: int
    outstanding: int
    seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class Asks:
    """A device at ``cut`` that asks ``rate`` times a second, at random times, for ``seconds``."""

    url: str
    folder: str
    name: str
    cut: int
    rate: float
    seconds: float
    seed: int


Child = subprocess.Popen[str]


@contextmanager
def serving(served: Served) -> Iterator[None]:
    """A coordinator that answers, as long as the context lasts."""
    settings = served.settings
    parts = torch_parts(settings)
    store = Store(settings.state_dir, keep=settings.keep_checkpoints)
    store.create(
        served.run,
        settings.identity(),
        Checkpoint(version=1, round=1, model=parts.first(), trained_cuts=list(CUTS)),
    )
    with child("coordinator", dataclasses.asdict(served)) as coordinator:
        expect(coordinator, "serving")
        yield


def ask_all(devices: list[Asks]) -> list[dict[str, Any]]:
    """What all devices measure, from when all of them are ready."""
    with ExitStack() as stack:
        asking = [stack.enter_context(child("device", dataclasses.asdict(d))) for d in devices]
        for device in asking:
            expect(device, "ready")
        for device in asking:
            assert device.stdin is not None
            device.stdin.write("go\n")
            device.stdin.flush()
        return [json.loads(read_line(device)) for device in asking]


def saturate(load: Load) -> dict[str, Any]:
    """How many questions a second are answered."""
    with child("load", dataclasses.asdict(load)) as loading:
        found: dict[str, Any] = json.loads(read_line(loading))
        return found


@contextmanager
def child(role: str, arguments: dict[str, Any]) -> Iterator[Child]:
    """A process of this module with the other end of its standard input and output."""
    command = [sys.executable, "-m", "ops.bench_inference_fleet", role, json.dumps(arguments)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()


def read_line(process: Child) -> str:
    """The next line a child prints. Raises :class:`FleetFailed` if it ends instead."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise FleetFailed("a process of the benchmark has ended; its error is above")
    return line.strip()


def expect(process: Child, word: str) -> None:
    """A child says that it has come so far."""
    line = read_line(process)
    if line != word:
        raise FleetFailed(f"a process of the benchmark says {line!r} instead of {word!r}")


# -- the inside of the children -------------------------------------------------------------------


class _Announcer(Observer):
    def serving(self, version: int, *, pinned: bool, cuts: Mapping[str, CutPolicy]) -> None:
        del version, pinned, cuts
        print("serving", flush=True)


def coordinate(served: Served) -> None:
    """Answer until told to stop."""
    settings, traffic, boot = served.settings, Traffic(_refuse), new_boot()
    core = build_core(
        settings, observer=_Announcer(), traffic=traffic.totals, boot=boot, clock=time.monotonic
    )

    async def serve() -> None:
        transport = transport_for(
            BrokerConfig(url=served.url), "coordinator", last_will(settings, boot)
        )
        with stop_signals(until_eof=True) as stop:
            await run_coordinator(settings, transport, core, traffic, stop=stop)

    asyncio.run(serve())


async def ask(asks: Asks) -> dict[str, Any]:
    """Ask for single images at random times, whether or not earlier answers have come."""
    data = images()
    rows = np.arange(len(data))
    settings = AgentSettings(
        fleet="bench", device=asks.name, cut=asks.cut, state_dir=Path(asks.folder) / asks.name
    )
    loop, when = asyncio.get_running_loop(), random.Random(asks.seed)
    answered: list[dict[str, float]] = []
    by = {"exit": 0, "server": 0, "fallback": 0}
    unanswered = 0

    async def one(image: np.ndarray, due: float, *, counts: bool) -> None:
        nonlocal unanswered
        try:
            answer = await edge.predict(image)
        except Unanswered:
            unanswered += counts
            return
        if counts:
            by[answer.by[0]] += 1
            answered.append({**answer.seconds, "since_due": loop.time() - due})

    async with Edge(
        settings, BrokerConfig(url=asks.url), data=DeviceData(data, rows, None, rows[:0])
    ) as edge:
        await edge.ready(START_S)
        await edge.predict(data.images[0])
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        start = due = loop.time()
        async with asyncio.TaskGroup() as group:
            while due < start + SETTLE_S + asks.seconds:
                due += when.expovariate(asks.rate)
                await asyncio.sleep(max(0.0, due - loop.time()))
                image = data.images[when.randrange(len(data))]
                group.create_task(one(image, due, counts=due > start + SETTLE_S))
        health = await edge.health()
    return {
        "answers": answered,
        "by": by,
        "unanswered": unanswered,
        "bytes_up": health.counts.bytes_up / max(1, health.counts.messages),
        "bytes_down": health.counts.bytes_down / max(1, health.counts.replies),
    }


async def put_load(load: Load) -> dict[str, float]:
    """All devices on one connection: what they would compute is encoded beforehand.

    Of each device the newest questions are answered first, so that its first ones may wait to the
    end; another is asked for each answer.
    """
    names = {f"load-{number}": CUTS[number % len(CUTS)] for number in range(load.devices)}
    questions = _questions(load.served)
    topics, boot = Topics(load.served.settings.fleet), new_boot()
    answered = refused = number = 0
    transport = MqttTransport(BrokerConfig(url=load.served.url), "load")
    async with asyncio.timeout(START_S + load.seconds), transport:
        link = Link(transport, topics, observer=Traffic(_refuse), clock=time.monotonic)

        async def ask(device: str) -> None:
            nonlocal number
            number += 1
            tensors = questions[names[device]]
            tensor = tensors[number % len(tensors)]
            await link.send(
                up(
                    device,
                    Features(
                        run=load.served.run,
                        request=number,
                        version=1,
                        deadline_ms=60_000,
                        tensor=tensor,
                    ),
                )
            )

        await link.subscribe(*(topic for name in names for topic in topics.device_filters(name)))
        while not isinstance(await link.receive(), Connected):
            pass
        for name, cut in names.items():
            await link.send(up(name, _hello(boot, cut)))
        assigned: set[str] = set()
        begun = asyncio.get_running_loop().time() + START_S
        while (now := asyncio.get_running_loop().time()) < begun + load.seconds:
            event = await link.receive()
            if not isinstance(event, Arrival) or event.envelope.address.device is None:
                continue
            device, message = event.envelope.address.device, event.envelope.message
            if isinstance(message, Assignment):
                if message.run != load.served.run or device in assigned:
                    continue  # the broker retains those of earlier runs
                assigned.add(device)
                if len(assigned) == len(names):
                    begun = now + SETTLE_S
                for _ in range(load.outstanding):
                    await ask(device)
            elif isinstance(message, Prediction):
                answered += now > begun and message.refused is None
                refused += message.refused is not None
                await ask(device)
    return {"answered_per_s": answered / load.seconds, "refused": refused}


def _questions(served: Served) -> dict[int, list[bytes]]:
    network = build_network(NetworkSpec(**served.settings.network.model_dump())).eval()
    codec = parse_codec(served.settings.codec)
    data = images()
    pixels = torch.from_numpy(normalise(data.images[:16], data.mean, data.std))
    with torch.inference_mode():
        return {cut: [codec.encode(one[None]) for one in network(pixels, stop=cut)] for cut in CUTS}


def _hello(boot: str, cut: int) -> Hello:
    return Hello(
        boot=boot,
        software="bench",
        samples=1,
        dataset="bench",
        classes=10,
        image=(3, 32, 32),
        cut=cut,
    )


def _refuse(reason: str) -> None:
    print(f"a message was dropped: {reason}", file=sys.stderr)


def _main(role: str, arguments: dict[str, Any]) -> None:
    match role:
        case "coordinator":
            coordinate(Served(**arguments))
        case "device":
            torch.set_num_threads(1)
            print(json.dumps(asyncio.run(ask(Asks(**arguments)))))
        case "load":
            load = Load(**{**arguments, "served": Served(**arguments["served"])})
            print(json.dumps(asyncio.run(put_load(load))))
        case _:
            raise SystemExit("this is the inside of `splitfleet bench inference`")


if __name__ == "__main__":
    _main(sys.argv[1], json.loads(sys.argv[2]))
