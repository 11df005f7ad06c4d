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

from broker.branches import Branch, Branches
from broker.drive import Machine, drive
from broker.envelopes import channel
from broker.errors import TransportError
from broker.link import Link, single_frame
from broker.logs import LogControl, Untouched
from broker.messages import Assignment, Hello, Status
from broker.topics import Address, Topics
from broker.transport import Transport, Will
from edge_agent.core import AgentCore, OnVersion
from edge_agent.data import DeviceData
from edge_agent.errors import AgentError
from edge_agent.holding import SnapshotStore
from edge_agent.learning import Data, Learners
from edge_agent.lite import LiteFactory
from edge_agent.offline import OfflineLimits
from edge_agent.phases import Phase
from edge_agent.preparation import Preparation
from edge_agent.privacy import Privacy
from edge_agent.programs import DiskPrograms
from edge_agent.readings import LinkMeters, read_process
from edge_agent.settings import AgentSettings
from edge_agent.systemd import KeepAlive, Nobody, Supervisor
from edge_agent.telemetry import Reporter

if TYPE_CHECKING:
    from edge_agent.edge import EdgeService
    from edge_agent.identity.keeper import IdentityKeeper
    from edge_agent.learner import LearnerFactory
    from edge_agent.updates.updater import Updater


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
    privacy: Privacy | None = None,
) -> AgentCore:
    """Put an agent together; ``learners`` are those of :func:`make_learners` unless given.

    What left of its images is booked in memory alone unless ``privacy`` is given.
    """
    reporter = reporter or make_reporter(settings, hello.boot, clock=clock)
    return AgentCore(
        Topics(settings.fleet),
        settings.device,
        hello,
        Preparation(
            settings.device,
            data,
            uplink=uplink,
            learners=learners or make_learners(settings),
            snapshots=snapshots,
            reporter=reporter,
            clock=clock,
            offline=OfflineLimits(settings.offline_batches, settings.offline_expiry_s),
            privacy=privacy or Privacy.by(settings, None),
        ),
        reporter=reporter,
        clock=clock,
        stay=not settings.exit_when_finished,
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
    identity: IdentityKeeper | None = None,
    logs: LogControl | None = None,
    reporter: Reporter | None = None,
    supervisor: Supervisor | None = None,
    updater: Updater | None = None,
) -> None:
    """Take part in the fleet until ``stop`` is set, or the run ends if the settings say so.

    ``transport`` must have :func:`last_will` of the same ``boot`` as its will. Images are answered
    through ``edge`` meanwhile, if it is given, ``identity`` is kept valid, and ``updater`` ends the
    service when another version is to be started. A ``reporter`` that
    somebody else reads, too, is of the same ``boot``; ``logs`` has the level that the coordinator
    orders. The ``supervisor`` is told that the agent has started, whether there is a broker or not,
    and then that it lives.

    Raises:
        AgentError: the coordinator refused this device, or asks what it cannot do.
        ConnectRefused: the broker will not have this client.
        StateError: the account of what left of its images is unusable.
    """
    topics = Topics(settings.fleet)
    supervisor = supervisor or Nobody()
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
            privacy=Privacy.by(settings, settings.state_dir),
        )
        reporter.add(counted.meter)
        reporter.add(read_process)
        if edge is not None:
            reporter.add(edge.machine.meter)
        logs = logs or Untouched()
        logs.about(lambda: core.place)
        core.on_log_level = logs.set_level
        await link.subscribe(*topics.device_filters(settings.device))
        keep_alive = KeepAlive(supervisor)
        supervisor.ready()
        living = asyncio.create_task(keep_alive.run(), name="keep-alive")
        try:
            await _drive_all(core, edge, identity, updater, link, stop, keep_alive)
        finally:  # an error, too, ends the connection in good order: no last will follows
            living.cancel()
            supervisor.stopping()
            with contextlib.suppress(TransportError):
                await link.send(core.telemetry())
                await link.send(core.goodbye())
        if not stop.is_set() and core.problem is not None:
            raise AgentError(core.problem)


PATIENCE_FOR_UPDATES_S = 60.0
"""How long a device that was refused waits for the announcement of an update."""
TRAINING, ANSWERING, IDENTITY, UPDATING = "training", "answering", "identity", "updating"
_FOR_BOTH = {
    ("down", "assignment"),
    ("down", "parameters"),
    ("all", "serving"),
    ("cut", "manifest"),
}


def route(address: Address, *, measuring: bool) -> Collection[str]:
    """Which machines a message is for; ``measuring``: the one that trains asks questions, too."""
    what = channel(address)
    if what == ("down", "certificate"):
        return (IDENTITY,)
    if what == ("down", "piece"):
        return (UPDATING,)
    if address.kind == "command":
        return (TRAINING, UPDATING)
    if what == ("all", "coordinator"):
        return (TRAINING, ANSWERING, UPDATING)
    if what == ("down", "prediction"):
        return (ANSWERING, TRAINING) if measuring else (ANSWERING,)
    return (TRAINING, ANSWERING) if what in _FOR_BOTH else (TRAINING,)


async def _drive_all(
    core: AgentCore,
    edge: EdgeService | None,
    identity: IdentityKeeper | None,
    updater: Updater | None,
    link: Link,
    stop: asyncio.Event,
    keep_alive: KeepAlive,
) -> None:
    """Drive the machines there are, each in its thread, until one of them is over."""
    run = partial(drive, clock=time.monotonic)
    machines = _beside(edge, identity, updater)
    if not machines:
        await run(core, link, stop=stop, turned=keep_alive.of(TRAINING))
        return
    branches = Branches(
        link,
        (TRAINING, *machines),
        lambda address: [
            name
            for name in route(address, measuring=core.phase is Phase.ANSWERING)
            if name == TRAINING or name in machines
        ],
    )
    ended = asyncio.Event()
    training = asyncio.create_task(
        run(core, branches[TRAINING], stop=stop, turned=keep_alive.of(TRAINING)), name=TRAINING
    )
    beside = [
        asyncio.create_task(
            run(machine, branches[name], stop=ended, turned=keep_alive.of(name)), name=name
        )
        for name, machine in machines.items()
    ]
    tasks = [training, *beside, asyncio.create_task(branches.run(), name="branches")]
    if identity is not None:
        watching = identity.watch(lambda: branches.connected)
        tasks.append(asyncio.create_task(watching, name="watching"))
    if edge is not None:
        core.on_version = _hand_over(edge, branches[ANSWERING])
        edge.open(branches[ANSWERING])
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                await task  # what went wrong
        if updater is not None and core.problem is not None:
            await _let_update(updater, tasks, stop)
        ended.set()
        await asyncio.gather(*beside)
    finally:
        core.on_version = None
        for closing in (edge, updater):
            if closing is not None:
                closing.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _beside(
    edge: EdgeService | None, identity: IdentityKeeper | None, updater: Updater | None
) -> dict[str, Machine]:
    """The machines beside the one that trains."""
    machines: dict[str, Machine] = {}
    if edge is not None:
        machines[ANSWERING] = edge.machine
    if identity is not None:
        machines[IDENTITY] = identity.machine
    if updater is not None:
        machines[UPDATING] = updater
    return machines


async def _let_update(
    updater: Updater, tasks: Collection[asyncio.Task[None]], stop: asyncio.Event
) -> None:
    """Stay for an update although the coordinator will not train with this version: it may help."""
    until = time.monotonic() + PATIENCE_FOR_UPDATES_S
    while (updater.busy or time.monotonic() < until) and not (updater.finished or stop.is_set()):
        if sum(task.done() for task in tasks) > 1:
            return
        await asyncio.sleep(0.2)


def _hand_over(edge: EdgeService, branch: Branch) -> OnVersion:
    loop = asyncio.get_running_loop()

    def hand_over(assignment: Assignment, version: int, state: Mapping[str, np.ndarray]) -> None:
        run = partial(edge.machine.handed, assignment, version, state)
        # If too much waits there, the machine asks the coordinator for it.
        loop.call_soon_threadsafe(branch.call, run)

    return hand_over
