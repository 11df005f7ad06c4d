"""The agent as a service: its state machine, driven over a transport."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import numpy as np

from broker.branches import Branches
from broker.drive import drive
from broker.envelopes import channel
from broker.errors import TransportError
from broker.link import Link, single_frame
from broker.logs import LogControl, Untouched
from broker.messages import Assignment, Hello, Status
from broker.topics import Address, Topics
from broker.transport import Transport, Will
from edge_agent.core import AgentCore, Learners
from edge_agent.data import DeviceData
from edge_agent.errors import AgentError
from edge_agent.holding import SnapshotStore
from edge_agent.lite import LiteFactory
from edge_agent.offline import OfflineLimits
from edge_agent.phases import Phase
from edge_agent.programs import DiskPrograms
from edge_agent.readings import LinkMeters, read_process
from edge_agent.settings import AgentSettings
from edge_agent.telemetry import Reporter
from edge_agent.workplace import Data

if TYPE_CHECKING:
    from edge_agent.edge import EdgeService
    from edge_agent.learner import LearnerFactory


def new_boot() -> str:
    """A name for this life of the process."""
    return secrets.token_hex(8)


def last_will(settings: AgentSettings, boot: str) -> Will:
    """What the broker says when this device vanishes."""
    topics = Topics(settings.fleet)
    return Will(
        topics.up(settings.device, "status"),
        single_frame(Status(state="offline", connection=boot)),
        retain=True,
        delay_s=settings.will_delay_s,
    )


def software() -> str:
    """Name and version for the hello."""
    try:
        return f"splitfleet {version('splitfleet')}"
    except PackageNotFoundError:
        return "splitfleet (not installed)"


def make_learners(settings: AgentSettings) -> LearnerFactory | LiteFactory:
    """Those of the engine in the settings."""
    if settings.engine == "onnxruntime":
        return LiteFactory(DiskPrograms(settings.state_dir), threads=settings.threads)
    from edge_agent.learner import LearnerFactory

    return LearnerFactory(
        networks=settings.networks,
        device=settings.compute,
        precision=settings.precision,
        memory_format=settings.memory_format,
    )


def introduce(settings: AgentSettings, data: DeviceData, boot: str) -> Hello:
    """What a device says of itself."""
    return Hello(
        boot=boot,
        software=software(),
        samples=len(data.train_rows),
        test_samples=len(data.test_rows),
        dataset=data.train.name,
        classes=len(data.train.classes),
        image=data.image,
        cut=None if settings.cut == "auto" else settings.cut,
        frozen=settings.engine == "onnxruntime",
    )


def make_reporter(
    settings: AgentSettings,
    boot: str,
    *,
    clock: Callable[[], float],
    cpu_clock: Callable[[], float] | None = None,
) -> Reporter:
    """What a device reports with; ``cpu_clock`` is ``clock`` unless it is given."""
    return Reporter(
        boot,
        clock=clock,
        cpu_clock=cpu_clock,
        heartbeat_s=settings.heartbeat_s,
        period_s=settings.telemetry_s,
        device_class=settings.device_class,
        radio=settings.radio,
    )


def build_agent(
    settings: AgentSettings,
    hello: Hello,
    data: Data,
    snapshots: SnapshotStore,
    *,
    uplink: Callable[[], float],
    clock: Callable[[], float],
    reporter: Reporter | None = None,
    learners: Learners | None = None,
) -> AgentCore:
    """Put an agent together; ``learners`` are those of :func:`make_learners` unless given."""
    return AgentCore(
        Topics(settings.fleet),
        settings.device,
        hello,
        data,
        uplink=uplink,
        learners=learners or make_learners(settings),
        snapshots=snapshots,
        clock=clock,
        stay=not settings.exit_when_finished,
        offline=OfflineLimits(settings.offline_batches, settings.offline_expiry_s),
        reporter=reporter or make_reporter(settings, hello.boot, clock=clock),
    )


async def run_agent(
    settings: AgentSettings,
    transport: Transport,
    data: DeviceData,
    snapshots: SnapshotStore,
    *,
    boot: str,
    stop: asyncio.Event,
    edge: EdgeService | None = None,
    logs: LogControl | None = None,
    reporter: Reporter | None = None,
) -> None:
    """Take part in the fleet until ``stop`` is set, or the run ends if the settings say so.

    ``transport`` must have :func:`last_will` of the same ``boot`` as its will. Images are answered
    through ``edge`` meanwhile, if it is given. A ``reporter`` that somebody else reads, too, is of
    the same ``boot``; ``logs`` has the level that the coordinator orders.

    Raises:
        AgentError: the coordinator refused this device, or asks what it cannot do.
        ConnectRefused: the broker will not have this client.
    """
    topics = Topics(settings.fleet)
    async with transport:
        counted = LinkMeters()
        if reporter is None:
            reporter = make_reporter(
                settings, boot, clock=time.monotonic, cpu_clock=time.thread_time
            )
        link = Link(transport, topics, observer=counted, clock=time.monotonic)
        core = build_agent(
            settings,
            introduce(settings, data, boot),
            data,
            snapshots,
            uplink=lambda: link.uplink_bytes_per_s,
            clock=time.monotonic,
            reporter=reporter,
        )
        reporter.add(counted.meter)
        reporter.add(read_process)
        if edge is not None:
            reporter.add(edge.machine.meter)
        logs = logs or Untouched()
        logs.about(lambda: core.place)
        core.on_log_level = logs.set_level
        await link.subscribe(*topics.device_filters(settings.device))
        try:
            if edge is None:
                await drive(core, link, clock=time.monotonic, stop=stop)
            else:
                await _train_and_answer(core, edge, link, stop)
        finally:  # an error, too, ends the connection in good order: no last will follows
            with contextlib.suppress(TransportError):
                await link.send(core.telemetry())
                await link.send(core.goodbye())
        if not stop.is_set() and core.problem is not None:
            raise AgentError(core.problem)


TRAINING, ANSWERING = "training", "answering"
_FOR_BOTH = {
    ("down", "assignment"),
    ("down", "parameters"),
    ("all", "serving"),
    ("all", "coordinator"),
    ("cut", "manifest"),
}


def route(address: Address, *, measuring: bool) -> Collection[str]:
    """Which machines a message is for; ``measuring``: the one that trains asks questions, too."""
    what = channel(address)
    if what == ("down", "prediction"):
        return (ANSWERING, TRAINING) if measuring else (ANSWERING,)
    return (TRAINING, ANSWERING) if what in _FOR_BOTH else (TRAINING,)


async def _train_and_answer(
    core: AgentCore, edge: EdgeService, link: Link, stop: asyncio.Event
) -> None:
    """Drive both machines, each in its thread, until the training one is over."""
    loop = asyncio.get_running_loop()
    branches = Branches(
        link,
        (TRAINING, ANSWERING),
        lambda address: route(address, measuring=core.phase is Phase.ANSWERING),
    )
    ended = asyncio.Event()

    def hand_over(assignment: Assignment, version: int, state: Mapping[str, np.ndarray]) -> None:
        run = partial(edge.machine.handed, assignment, version, state)
        # If too much waits there, the machine asks the coordinator for it.
        loop.call_soon_threadsafe(branches[ANSWERING].call, run)

    core.on_version = hand_over
    training = asyncio.create_task(
        drive(core, branches[TRAINING], clock=time.monotonic, stop=stop), name=TRAINING
    )
    answering = asyncio.create_task(
        drive(edge.machine, branches[ANSWERING], clock=time.monotonic, stop=ended), name=ANSWERING
    )
    tasks = [training, answering, asyncio.create_task(branches.run(), name="branches")]
    edge.open(branches[ANSWERING])
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                await task  # what went wrong
        ended.set()
        await answering
    finally:
        core.on_version = None
        edge.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
