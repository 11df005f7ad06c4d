from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from broker.memory import MemoryBroker
from broker.serving_messages import CutPolicy
from broker.topics import Address
from edge_agent.answers import Answer
from edge_agent.edge import Edge, EdgeService
from edge_agent.errors import InputError, NotReady, Overloaded, Stopped
from edge_agent.pictures import PictureSpec
from edge_agent.service import ANSWERING, IDENTITY, TRAINING, last_will, new_boot, route
from edge_agent.settings import AgentSettings
from tests.edge_agent.test_serving import MemoryServed
from tests.fake_device import FakePredictor
from tests.fleet_in_process import Fleet, in_memory
from tests.tiny import SIZE, Array, make_assignment, make_device_data, make_serving

DEVICES = {"a": 2, "b": 3}
LIMIT_S = 60.0
SPEC = PictureSpec(size=SIZE, channels=1, mean=(0.3,), std=(0.25,))
IMAGE = np.zeros((SIZE, SIZE, 1), np.uint8)


def make_fleet(folder: Path, **settings: Any) -> Fleet:
    fields: dict[str, Any] = {
        "rounds": 300,
        "batches_per_round": 2,
        "threshold": 0.2,
        "offload_timeout_s": 5.0,
        "audit_share": 0.5,
    }
    return Fleet(
        folder,
        in_memory(MemoryBroker()),
        DEVICES,
        lambda name: make_device_data(48, seed=ord(name), tests=10),
        **(fields | settings),
    )


async def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, f"waited in vain: {what}"
        await asyncio.sleep(0.005)


async def test_devices_answer_while_the_fleet_trains(tmp_path: Path) -> None:
    fleet = make_fleet(tmp_path)
    fleet.start(answers=True)
    answers: dict[str, list[Answer]] = {name: [] for name in DEVICES}
    for edge in fleet.edges.values():
        await edge.ready(LIMIT_S)
    first = {name: (await edge.health()).version for name, edge in fleet.edges.items()}
    rng = np.random.default_rng(0)
    for _ in range(200):
        for name, edge in fleet.edges.items():
            images = rng.integers(0, 256, (3, SIZE, SIZE, 1)).astype(np.uint8)
            answers[name].append(await edge.predict(images, labels=[0, 1, 2]))
        newest = {name: given[-1].version for name, given in answers.items()}
        by = {who for given in answers.values() for answer in given for who in answer.by}
        if all(newest[name] > (first[name] or 0) for name in DEVICES) and "server" in by:
            break
    else:
        raise AssertionError(f"always the same version answers: {newest}, {by}")
    exits = answered = 0
    for name, edge in fleet.edges.items():
        counts = (await edge.health()).counts
        assert counts.images == 3 * len(answers[name]) == counts.labelled
        assert counts.images == counts.exits + counts.answered + counts.fallbacks
        assert not counts.fallbacks, counts.fallback
        exits += counts.exits
        answered += counts.answered
    for name in DEVICES:
        await fleet.stop(name)
    async with asyncio.timeout(LIMIT_S):
        await fleet.watcher.reported("predictions", "exit", exits)
        await fleet.watcher.reported("predictions", "server", answered)
    with pytest.raises(Stopped):
        await fleet.edges["a"].predict(IMAGE)
    fleet._tasks["coordinator"].cancel()
    await asyncio.gather(fleet._tasks["coordinator"], return_exceptions=True)


async def test_the_end_of_a_run_is_measured_while_devices_answer(tmp_path: Path) -> None:
    fleet = make_fleet(tmp_path, rounds=2, inference=True)
    fleet.start(answers=True)
    asking = [asyncio.create_task(ask_on(edge)) for edge in fleet.edges.values()]
    await fleet.finish()
    given = await asyncio.gather(*asking)
    assert all(given)
    assert {name: fleet.watcher.inference[name].inference.images for name in DEVICES} == {  # type: ignore[union-attr]
        "a": 10,
        "b": 10,
    }


async def ask_on(edge: EdgeService) -> int:
    """Until it stops."""
    given = 0
    while True:
        try:
            await edge.predict(IMAGE)
            given += 1
        except NotReady:
            await asyncio.sleep(0.01)
        except Stopped:
            if given:
                return given
            await asyncio.sleep(0.01)


class Slow(FakePredictor):
    """Answers when it is let."""

    def __init__(self) -> None:
        self.let = asyncio.Event()
        self.loop = asyncio.get_running_loop()

    def predict(self, images: Array) -> tuple[Array, Array]:
        asyncio.run_coroutine_threadsafe(self.let.wait(), self.loop).result(LIMIT_S)
        return super().predict(images)


class Alone:
    """One agent without a coordinator, that has something to answer with."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        from edge_agent.served import Served

        self.settings = AgentSettings(device="d", state_dir=folder, **settings)
        store = MemoryServed()
        serving = make_serving(1, cuts={"2": CutPolicy(threshold=-1.0)})
        store.kept = Served(make_assignment(), serving, {"weight": np.ones(1, np.float32)})
        self.predictor = Slow()
        self.edge = EdgeService(self.settings, SPEC, build=lambda *_: self.predictor, store=store)
        self.fleet = Fleet(
            folder, in_memory(MemoryBroker()), {"d": 2}, lambda _: make_device_data()
        )

    async def __aenter__(self) -> EdgeService:
        from broker.memory import MemoryTransport
        from edge_agent.service import run_agent
        from edge_agent.snapshots import DiskSnapshots

        boot = new_boot()
        self.stop = asyncio.Event()
        self.task = asyncio.create_task(
            run_agent(
                self.settings,
                MemoryTransport(MemoryBroker(), "d", will=last_will(self.settings, boot)),
                make_device_data(),
                DiskSnapshots(self.settings.state_dir),
                boot=boot,
                stop=self.stop,
                edge=self.edge,
            )
        )
        await until(lambda: self.edge._branch is not None, "it runs")
        return self.edge

    async def __aexit__(self, *_: object) -> None:
        self.predictor.let.set()
        self.stop.set()
        await self.task


async def test_a_caller_that_is_cancelled_withdraws_its_request(tmp_path: Path) -> None:
    alone = Alone(tmp_path, answer_batch=1)
    async with alone as edge:
        first = asyncio.create_task(edge.predict(IMAGE))
        second = asyncio.create_task(edge.predict(IMAGE))
        await asyncio.sleep(0)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        alone.predictor.let.set()
        assert (await first).by == ("exit",)
        counts = (await edge.health()).counts
        assert counts.exits == 1
        assert counts.images == 1 + counts.cancelled
        assert not edge._awaited


async def test_newer_requests_win_and_every_one_hears_of_it(tmp_path: Path) -> None:
    alone = Alone(tmp_path, answer_batch=1, answer_queue=3)
    async with alone as edge:
        tasks = [asyncio.create_task(edge.predict(IMAGE)) for _ in range(20)]
        await asyncio.sleep(0.05)
        alone.predictor.let.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        answered = [number for number, r in enumerate(results) if isinstance(r, Answer)]
        refused = [number for number, r in enumerate(results) if isinstance(r, Overloaded)]
        assert len(answered) + len(refused) == 20
        assert answered[-3:] == [17, 18, 19], "the newest"
        counts = (await edge.health()).counts
        assert (counts.exits, counts.overloaded) == (len(answered), len(refused))


async def test_when_the_agent_stops_nobody_waits_on(tmp_path: Path) -> None:
    alone = Alone(tmp_path)
    async with alone as edge:
        waiting = asyncio.create_task(edge.predict(IMAGE))
        await asyncio.sleep(0.02)
        alone.stop.set()
        await asyncio.sleep(0.02)
        alone.predictor.let.set()
        await alone.task
        (result,) = await asyncio.gather(waiting, return_exceptions=True)
        assert isinstance(result, (Answer, Stopped))
    with pytest.raises(Stopped, match="not running"):
        await edge.health()


async def test_pictures_are_read_and_what_is_none_is_refused(tmp_path: Path) -> None:
    alone = Alone(tmp_path)
    alone.predictor.let.set()
    out = io.BytesIO()
    Image.new("L", (30, 20), 9).save(out, "PNG")
    async with alone as edge:
        answer = await edge.predict_pictures([out.getvalue()] * 2)
        assert len(answer.labels) == 2
        for bad in ([], [b"no picture"], [out.getvalue(), b""]):
            with pytest.raises(InputError):
                await edge.predict_pictures(bad)
        for images in (np.zeros((1, 3, SIZE, SIZE), np.float32), np.zeros((0, 1, SIZE, SIZE))):
            with pytest.raises(InputError):
                await edge.predict(images)
        for deadline_s in (0.0, -1.0, float("nan"), 601.0):
            with pytest.raises(InputError):
                await edge.predict(IMAGE, deadline_s=deadline_s)
        with pytest.raises(InputError):
            await edge.predict(IMAGE, labels=[1, 2])
        assert (await edge.predict(IMAGE)).by == ("exit",)


async def test_an_edge_that_does_not_run_says_so(tmp_path: Path) -> None:
    settings = AgentSettings(device="d", state_dir=tmp_path)
    with pytest.raises(Stopped):
        await EdgeService(settings, SPEC).predict(IMAGE)
    with pytest.raises(Stopped):
        await Edge(settings).predict(IMAGE)


@pytest.mark.parametrize(
    ("address", "machines"),
    [
        (Address("device", "gradients", device="d", direction="down"), (TRAINING,)),
        (Address("device", "prediction", device="d", direction="down"), (ANSWERING,)),
        (Address("device", "assignment", device="d", direction="down"), (TRAINING, ANSWERING)),
        (Address("device", "parameters", device="d", direction="down"), (TRAINING, ANSWERING)),
        (Address("device", "certificate", device="d", direction="down"), (IDENTITY,)),
        (Address("all", "serving"), (TRAINING, ANSWERING)),
        (Address("all", "round"), (TRAINING,)),
        (Address("cut", "parameters", layer=2), (TRAINING,)),
        (Address("cut", "manifest", layer=2), (TRAINING, ANSWERING)),
    ],
)
def test_messages_go_to_the_machines_they_are_for(
    address: Address, machines: tuple[str, ...]
) -> None:
    assert set(route(address, measuring=False)) == set(machines)
    if address.kind == "prediction":
        assert set(route(address, measuring=True)) == {TRAINING, ANSWERING}
