"""A whole fleet in one process: coordinator and agents as their services run them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from broker.errors import TransportError
from broker.memory import MemoryBroker, MemoryTransport
from broker.training_messages import Report
from broker.transport import Transport, Will
from coordinator import service as coordinator_service
from coordinator.checkpoint import Checkpoint
from coordinator.identity.enrolment import Enrolment, open_enrolment
from coordinator.observer import Observer
from coordinator.service import build_core, run_coordinator
from coordinator.settings import CoordinatorSettings
from coordinator.store import Store
from coordinator.telemetry import Gain
from coordinator.traffic import Traffic
from coordinator.updates.rollouts import Rollouts, open_rollouts
from edge_agent import service as agent_service
from edge_agent.data import DeviceData
from edge_agent.edge import EdgeService
from edge_agent.identity.keeper import IdentityKeeper
from edge_agent.service import run_agent
from edge_agent.settings import AgentSettings
from edge_agent.snapshots import DiskSnapshots
from tests.tiny import make_settings

Connect = Callable[[str, Will], Transport]
"""Client id and will → a transport."""


class Watcher(Observer):
    """What happened, and a way to wait for it. Called from the coordinator's worker thread."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.discarded: dict[str, int] = defaultdict(int)
        self.reports: dict[tuple[str, int, int], Report] = {}
        self.inference: dict[str, Report] = {}
        self.gained: dict[tuple[str, str], float] = defaultdict(float)
        """Metric and label value, of all devices."""
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()

    def batch_applied(self, cut: int, images: int, loss: float | None, seconds: float) -> None:
        self.losses.append(float("nan") if loss is None else loss)
        self._loop.call_soon_threadsafe(self._changed.set)

    def batch_discarded(self, reason: str) -> None:
        self.discarded[reason] += 1

    def device_report(self, device: str, cut: int, report: Report) -> None:
        if report.inference is not None:
            self.inference[device] = report
        else:
            self.reports[device, report.round, report.attempt] = report

    def telemetry(self, gain: Gain) -> None:
        for series, amount in gain.counters.items():
            self.gained[series] += amount
        self._loop.call_soon_threadsafe(self._changed.set)

    async def applied(self, batches: int) -> None:
        """Wait until so many batches have been trained on."""
        while len(self.losses) < batches:
            self._changed.clear()
            await self._changed.wait()

    async def reported(self, name: str, label: str, amount: float) -> None:
        """Wait until devices have reported that much of a counter; it must not become more."""
        while self.gained[name, label] < amount:
            self._changed.clear()
            await self._changed.wait()
        assert self.gained[name, label] == amount


class Fleet:
    """``devices`` maps a name to its cut; ``data`` a name to its images.

    ``agents`` are settings of every agent, ``settings`` the coordinator's.
    """

    def __init__(
        self,
        folder: Path,
        connect: Connect,
        devices: Mapping[str, int | Literal["auto"]],
        data: Callable[[str], DeviceData],
        agents: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        self.folder = folder
        self._agents = agents or {}
        self.settings: CoordinatorSettings = make_settings(
            state_dir=folder / "coordinator",
            min_devices=len(devices),
            **({"deadline_mads": None} | settings),  # no round ends because the machine was busy
        )
        self.watcher = Watcher()
        self.transports: dict[str, Transport] = {}
        self.edges: dict[str, EdgeService] = {}
        self.stops: dict[str, asyncio.Event] = {}
        self._connect = connect
        self._devices = devices
        self._data = data
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._opened: list[Enrolment | Rollouts] = []

    def start_coordinator(self) -> None:
        """With ``fleet_dir`` in its settings it signs for devices, too."""
        boot = coordinator_service.new_boot()
        traffic = Traffic(lambda reason: None)
        transport = self._transport(
            "coordinator", coordinator_service.last_will(self.settings, boot)
        )
        core = build_core(
            self.settings,
            observer=self.watcher,
            traffic=traffic.totals,
            boot=boot,
            clock=time.monotonic,
        )
        enrolment = open_enrolment(self.settings, {}, self.watcher)
        rollouts = open_rollouts(self.settings)
        self._opened += [one for one in (enrolment, rollouts) if one is not None]
        self._start(
            "coordinator",
            run_coordinator(
                self.settings,
                transport,
                core,
                traffic,
                stop=asyncio.Event(),
                enrolment=enrolment,
                rollouts=rollouts,
            ),
        )

    def start_agent(
        self,
        name: str,
        *,
        answers: bool = False,
        identity: IdentityKeeper | None = None,
        engine: Literal["torch", "onnxruntime"] = "torch",
    ) -> None:
        """``answers``: it has an entry in ``edges`` from then on."""
        settings = AgentSettings(
            device=name,
            cut=self._devices[name],
            engine=engine,
            state_dir=self.folder / name,
            precision="fp32",
            memory_format="contiguous",
            exit_when_finished=True,
            **self._agents,
        )
        boot = agent_service.new_boot()
        transport = self._transport(name, agent_service.last_will(settings, boot))
        data = self._data(name)
        if answers:
            self.edges[name] = EdgeService(settings, data.pictures)
        self.stops[name] = asyncio.Event()
        self._start(
            name,
            run_agent(
                settings,
                transport,
                data,
                DiskSnapshots(settings.state_dir),
                boot=boot,
                stop=self.stops[name],
                edge=self.edges.get(name) if answers else None,
                identity=identity,
            ),
        )

    def start(self, *, answers: bool = False) -> None:
        """The coordinator and all agents."""
        self.start_coordinator()
        for name in self._devices:
            self.start_agent(name, answers=answers)

    async def stop(self, name: str) -> None:
        """End a device in good order."""
        self.stops[name].set()
        await self._tasks[name]

    async def kill(self, name: str) -> None:
        """End one party as a power cut would."""
        transport = self.transports[name]
        assert isinstance(transport, MemoryTransport)
        transport.abort()
        with contextlib.suppress(TransportError):
            await self._tasks[name]

    async def finish(self) -> dict[str, Any]:
        """Wait for the end of the run; its result."""
        await asyncio.gather(*self._tasks.values())
        for opened in self._opened:
            opened.close()
        (path,) = (self.folder / "coordinator").glob("*/result.json")
        result: dict[str, Any] = json.loads(path.read_text())
        return result

    def checkpoint(self) -> Checkpoint:
        store = Store(self.folder / "coordinator")
        assert store.current() is not None
        found = store.latest()
        assert found is not None
        return found

    def _transport(self, name: str, will: Will) -> Transport:
        self.transports[name] = self._connect(name, will)
        return self.transports[name]

    def _start(self, name: str, service: Any) -> None:
        self._tasks[name] = asyncio.create_task(service, name=name)


def in_memory(broker: MemoryBroker) -> Connect:
    return lambda name, will: MemoryTransport(broker, name, will=will)
