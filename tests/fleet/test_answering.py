"""Devices answer images while the fleet trains, on a real Mosquitto."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest

from broker.config import BrokerConfig
from edge_agent.answers import Answer
from edge_agent.edge import Edge
from edge_agent.errors import NotReady, Unanswered
from edge_agent.settings import AgentSettings
from tensors.datasets import BUNDLED, load_dataset
from tests.fleet_processes import FLEET, Fleet, wait_until
from tests.http_agent import picture, post
from tests.mosquitto_process import Mosquitto, free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1000)]

CUTS = (1, 3)
STEP_S = 200.0
"""How long anything may take that has to happen."""
COORDINATOR = {
    "precision": "fp32",
    "memory_format": "contiguous",
    "rounds": 1000,
    "batches_per_round": 4,
    "dataset": BUNDLED,
    "exit_policy": "offload:0.5",
    "calibration_images": 200,
    "offload_timeout_s": 2.0,
    "audit_share": 0.2,
}


class Asker:
    """Asks one device again and again, one image at a time, and keeps all that comes of it."""

    def __init__(self, edge: Edge, seed: int) -> None:
        self.edge = edge
        self.asked = self.unanswered = 0
        self.answers: list[Answer] = []
        rng = np.random.default_rng(seed)
        self._images = rng.permutation(load_dataset(BUNDLED, "test").images)

    async def run(self) -> None:
        while True:
            self.asked += 1
            image = self._images[self.asked % len(self._images)]
            try:
                self.answers.append(await self.edge.predict(image, deadline_s=10))
            except Unanswered:
                self.unanswered += 1
            await asyncio.sleep(0.02)

    def by(self, who: str, since: int = 0) -> list[Answer]:
        return [answer for answer in self.answers[since:] if who in answer.by]


def mark(askers: list[Asker]) -> list[tuple[Asker, int]]:
    """How much each has been answered so far."""
    return [(asker, len(asker.answers)) for asker in askers]


async def reach(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + STEP_S
    while not condition():
        assert time.monotonic() < end, f"waited {STEP_S:.0f} s: {what}"
        await asyncio.sleep(0.02)


async def in_time(wait: Awaitable[object]) -> None:
    async with asyncio.timeout(STEP_S):
        await wait


def make_edge(fleet: Fleet, number: int) -> Edge:
    settings = AgentSettings(
        fleet=FLEET,
        device=fleet.names[number],
        cut=fleet.cuts[number],
        share=number,
        shares=len(fleet.cuts),
        state_dir=fleet.folder / fleet.names[number],
        precision="fp32",
        memory_format="contiguous",
    )
    return Edge(settings, BrokerConfig(url=fleet.url, backoff_max_s=1.0, keepalive_s=5))


def test_every_request_has_one_answer_while_the_coordinator_is_killed_and_comes_back(
    mosquitto: Mosquitto, tmp_path: Path
) -> None:
    asyncio.run(_kill_the_coordinator(mosquitto, tmp_path))


async def _kill_the_coordinator(mosquitto: Mosquitto, tmp_path: Path) -> None:
    with Fleet(tmp_path, mosquitto.url, cuts=CUTS, coordinator=COORDINATOR) as fleet:
        fleet.start_coordinator()
        edges = [make_edge(fleet, number) for number in range(len(CUTS))]
        async with edges[0], edges[1]:
            with pytest.raises(NotReady):
                await edges[0].ready(0.0)
            for edge in edges:
                await in_time(edge.ready())
            askers = [Asker(edge, seed) for seed, edge in enumerate(edges)]
            tasks = [asyncio.create_task(asker.run()) for asker in askers]
            try:
                await reach(lambda: all(a.by("server") for a in askers), "the server answers")
                await reach(lambda: all(a.by("exit") for a in askers), "the exit answers")
                fleet.kill("coordinator")
                marks = mark(askers)
                await reach(lambda: all(a.by("fallback", m) for a, m in marks), "none answers")
                fleet.start_coordinator()
                marks = mark(askers)
                await reach(lambda: all(len(a.by("server", m)) > 5 for a, m in marks), "it is back")
                versions = [(asker, asker.answers[-1].version) for asker in askers]
                await reach(
                    lambda: all(a.answers[-1].version > version for a, version in versions),
                    "the fleet trains, and what it learns answers",
                )
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            for asker in askers:
                # The last one was cancelled with its task.
                assert asker.asked - 1 <= len(asker.answers) + asker.unanswered <= asker.asked
                assert asker.unanswered == 0
                reasons = {reason for answer in asker.answers for reason in answer.reasons}
                assert reasons <= {None, "offline", "timeout", "refused:version"}, reasons
                served = [answer.version for answer in asker.answers]
                assert served == sorted(served)
                counts = (await asker.edge.health()).counts
                assert counts.images == (
                    counts.exits + counts.answered + counts.fallbacks + counts.cancelled
                ), counts
                assert counts.audits_answered > 0
                assert counts.late + counts.replies <= counts.messages


def test_a_device_that_starts_without_a_broker_answers_as_it_did_before(
    mosquitto: Mosquitto, tmp_path: Path
) -> None:
    asyncio.run(_start_without_a_broker(mosquitto, tmp_path))


async def _start_without_a_broker(mosquitto: Mosquitto, tmp_path: Path) -> None:
    with Fleet(tmp_path, mosquitto.url, cuts=CUTS[:1], coordinator=COORDINATOR) as fleet:
        fleet.start_coordinator()
        image = np.zeros((28, 28, 1), np.uint8)
        async with make_edge(fleet, 0) as edge:
            await in_time(edge.ready())
            before = await edge.predict(image)
            kept = tmp_path / fleet.names[0] / "serving.safetensors"
            await reach(kept.exists, "it is saved")
        mosquitto.stop()
        async with make_edge(fleet, 0) as edge:
            await in_time(edge.ready())
            answer = await edge.predict(image)
            assert answer.run == before.run
            assert answer.version >= 1
            assert set(answer.by) <= {"exit", "fallback"}
            assert set(answer.reasons) <= {None, "offline"}


def test_a_picture_that_is_posted_to_a_device_is_answered_by_the_server(
    mosquitto: Mosquitto, tmp_path: Path
) -> None:
    address = f"127.0.0.1:{free_port()}"
    settings = {"rounds": 1, "batches_per_round": 4, "stay": True, "threshold": 1.0}
    with Fleet(
        tmp_path,
        mosquitto.url,
        cuts=(3,),
        coordinator=settings,
        agent={"http": address, "exit_when_finished": False},
    ) as fleet:
        fleet.start()
        wait_until(lambda: post(address, picture(size=28))["by"] == "server", "the server answers")
        answer = post(address, picture(size=28))
        stages = answer["milliseconds"]
        assert 0 < stages["server_forward"] < stages["round_trip"] < stages["total"]
        assert answer["name"] == answer["top"][0]["name"]
        assert "error" in post(address, b"no picture")
        fleet.kill("coordinator")
        wait_until(lambda: post(address, picture(size=28))["by"] == "fallback", "the exit answers")
        fleet.start_coordinator()
        wait_until(lambda: post(address, picture(size=28))["by"] == "server", "it is back")
