"""Versions change, by rounds and by hand, while devices ask; over a real Mosquitto."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from broker.config import BrokerConfig
from broker.envelopes import up
from broker.fields import Message
from broker.link import Arrival, Link, single_frame
from broker.messages import Request, Status
from broker.mqtt import MqttTransport
from broker.serving_messages import Features, Prediction, Serving
from broker.topics import Topics
from broker.training_messages import Receipt, Round
from broker.transport import Connected, Will
from coordinator.observer import Observer
from coordinator.service import build_core, last_will, new_boot, run_coordinator
from coordinator.serving_choice import ServingChoice, write_choice
from coordinator.store import Store
from coordinator.traffic import Traffic
from tensors.decoding import decode
from tensors.networks import build_network, write_state
from tests.fake_coordinator import Harness
from tests.mosquitto_process import Mosquitto
from tests.server_side import FP32, features_at, make_activations, make_upload
from tests.tiny import SPEC, Array, make_hello, make_settings

CUTS = {"a": 2, "b": 5}
STEP_S = 120.0


class Silent:
    """A ``LinkObserver`` that minds nothing."""

    def sent(self, address: Any, size: int) -> None: ...

    def received(self, address: Any, size: int) -> None: ...

    def dropped(self, reason: str, device: str | None) -> None: ...


class Asker:
    """A device as far as questions go: it asks, one question after another, and writes down."""

    def __init__(self, name: str, url: str) -> None:
        self.name, self.cut = name, CUTS[name]
        topics = Topics("fleet")
        offline = single_frame(Status(state="offline", connection="c"))
        will = Will(topics.up(name, "status"), offline, retain=True)
        self.transport = MqttTransport(BrokerConfig(url=url), name, will=will)
        self.link = Link(self.transport, topics, observer=Silent(), clock=time.monotonic)
        self.filters = topics.device_filters(name)
        self.connected = False
        self.version: int | None = None
        self.said: list[Message] = []
        self.asked: dict[int, int] = {}
        self.answers: dict[int, list[Prediction]] = {}
        self._news = asyncio.Condition()

    async def send(self, *messages: Message) -> None:
        for message in messages:
            await self.link.send(up(self.name, message))

    async def read(self) -> None:
        """Until cancelled."""
        while True:
            event = await self.link.receive()
            async with self._news:
                self.connected = self.connected or isinstance(event, Connected)
                self._news.notify_all()
                if not isinstance(event, Arrival):
                    continue
                message = event.envelope.message
                if isinstance(message, Prediction):
                    self.answers.setdefault(message.request, []).append(message)
                if isinstance(message, Serving):
                    self.version = message.version
                self.said.append(message)

    async def until(self, happened: Callable[[], bool]) -> None:
        async with asyncio.timeout(STEP_S), self._news:
            await self._news.wait_for(happened)

    async def ask(self, version: int) -> Prediction:
        """One question, and the answer to it."""
        request = len(self.asked)
        self.asked[request] = version
        tensor = FP32.encode(features_at(self.cut, request, 2))
        question = Features(
            run=self.newest(Serving).run,
            request=request,
            version=version,
            deadline_ms=20_000,
            tensor=tensor,
        )
        await self.send(question)
        await self.until(lambda: request in self.answers)
        return self.answers[request][0]

    async def keep_asking(self, enough: asyncio.Event) -> None:
        """With whatever version serves, as it goes on changing."""
        await self.until(lambda: self.version is not None)
        while not enough.is_set():
            assert self.version is not None
            await self.ask(self.version)

    def newest(self, kind: type[Message]) -> Any:
        return next((m for m in reversed(self.said) if isinstance(m, kind)), None)


def expected(store: Store, version: int, cut: int, array: Array) -> Array:
    checkpoint = store.at(version)
    assert checkpoint is not None
    network = build_network(SPEC)
    write_state(network, checkpoint.model.state)
    with torch.inference_mode():
        return np.asarray(network.eval()(torch.from_numpy(array), start=cut).softmax(1).numpy())


async def close_a_round(devices: list[Asker]) -> None:
    """Train and upload as the devices of the round that is announced."""
    announced = devices[0].newest(Round)
    run, number, attempt = announced.stamp
    for device in devices:
        await device.send(Request(what="join", run=run, round=number, attempt=attempt))
        await device.until(lambda d=device: d.newest(Receipt) is not None)  # type: ignore[misc]
        for batch in range(3):
            fields: dict[str, Any] = {"cut": device.cut, "version": announced.version}
            await device.send(make_activations(announced.stamp, batch, **fields))
        await device.send(make_upload(announced.stamp, produced=3, **fields))


async def test_versions_change_while_devices_ask(mosquitto: Mosquitto, tmp_path: Path) -> None:
    """Every question gets one answer, by the blocks of its version, whichever serves by then."""
    before = Harness(tmp_path, rounds=4, min_devices=2, keep_checkpoints=10)
    for name, cut in CUTS.items():
        before.join(name, cut)
    for _ in range(2):
        before.train(*CUTS)
    store = Store(tmp_path, keep=10)
    assert store.current() is not None

    settings = make_settings(state_dir=tmp_path, rounds=4, min_devices=2, keep_checkpoints=10)
    boot, stop = new_boot(), asyncio.Event()
    traffic = Traffic(lambda reason: None)
    core = build_core(
        settings, observer=Observer(), traffic=traffic.totals, boot=boot, clock=time.monotonic
    )
    transport = MqttTransport(
        BrokerConfig(url=mosquitto.url), "coordinator", will=last_will(settings, boot)
    )
    devices = [Asker(name, mosquitto.url) for name in CUTS]
    enough = asyncio.Event()
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
        service = tasks.create_task(run_coordinator(settings, transport, core, traffic, stop=stop))
        readers = []
        for device in devices:
            await stack.enter_async_context(device.transport)
            await device.link.subscribe(*device.filters)
            readers.append(tasks.create_task(device.read()))
            await device.until(lambda d=device: d.connected)  # type: ignore[misc]
            await device.send(Status(state="online", connection="c"), make_hello(cut=device.cut))
        askers = [tasks.create_task(device.keep_asking(enough)) for device in devices]
        first = devices[0]
        await first.until(lambda: first.version == 2)
        assert (await first.ask(1)).refused is None, "one of the last three"

        write_choice(store.folder, ServingChoice().promote(1))
        for device in devices:
            await device.until(lambda d=device: d.version == 1)  # type: ignore[misc]
        await first.until(lambda: first.newest(Round).phase == "training")
        await close_a_round(devices)
        await first.until(lambda: first.newest(Round).version == 3)
        assert first.version == 1, "what trains does not change what serves"
        write_choice(store.folder, ServingChoice().promote(1).rollback())
        for device in devices:
            await device.until(lambda d=device: d.version == 3)  # type: ignore[misc]
        assert (await first.ask(3)).refused is None
        assert (await first.ask(0)).refused == "version"

        enough.set()
        await asyncio.gather(*askers)
        stop.set()
        await service
        for reader in readers:
            reader.cancel()
    assert check(devices, store) == {1, 2, 3}


def check(devices: list[Asker], store: Store) -> set[int]:
    """Every question has the one right answer; which versions were answered."""
    answered: set[int] = set()
    for device in devices:
        assert device.answers.keys() == device.asked.keys()
        for request, version in device.asked.items():
            (answer,) = device.answers[request]
            assert answer.version == version
            if version == 0:
                continue
            assert answer.tensor is not None, answer.refused
            wanted = expected(store, version, device.cut, features_at(device.cut, request, 2))
            np.testing.assert_allclose(decode(answer.tensor), wanted, rtol=2e-4, atol=1e-6)
            answered.add(version)
    return answered
