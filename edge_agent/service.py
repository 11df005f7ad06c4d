"""The agent as a service: its state machine, driven over a transport."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Protocol

from broker.drive import drive
from broker.errors import TransportError
from broker.link import Link, LinkObserver, single_frame
from broker.messages import Assignment, Hello, Measurement, Status
from broker.topics import Address, Topics
from broker.transport import Transport, Will
from edge_agent.attempt import Learner
from edge_agent.core import AgentCore
from edge_agent.data import DeviceData
from edge_agent.errors import AgentError
from edge_agent.holding import SnapshotStore
from edge_agent.learner import LearnerFactory
from edge_agent.offline import OfflineLimits
from edge_agent.settings import AgentSettings
from edge_agent.workplace import Data


class Silent:
    """A ``LinkObserver`` that is not interested."""

    def sent(self, address: Address, size: int) -> None:
        """Nothing."""

    def received(self, address: Address, size: int) -> None:
        """Nothing."""

    def dropped(self, reason: str, device: str | None) -> None:
        """Nothing."""


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


class Learners(Protocol):
    """Makes what a device learns with; :class:`LearnerFactory` with torch."""

    def build(self, assignment: Assignment) -> Learner: ...

    def measure(self, assignment: Assignment) -> Measurement: ...


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
    )


def build_agent(
    settings: AgentSettings,
    hello: Hello,
    data: Data,
    snapshots: SnapshotStore,
    *,
    uplink: Callable[[], float],
    clock: Callable[[], float],
    learners: Learners | None = None,
) -> AgentCore:
    """Put an agent together; ``learners`` are torch's unless others are given."""
    learners = learners or LearnerFactory(
        networks=settings.networks,
        device=settings.compute,
        precision=settings.precision,
        memory_format=settings.memory_format,
    )
    return AgentCore(
        Topics(settings.fleet),
        settings.device,
        hello,
        data,
        uplink=uplink,
        build=learners.build,
        measure=learners.measure,
        snapshots=snapshots,
        clock=clock,
        heartbeat_s=settings.heartbeat_s,
        stay=not settings.exit_when_finished,
        offline=OfflineLimits(settings.offline_batches, settings.offline_expiry_s),
    )


async def run_agent(
    settings: AgentSettings,
    transport: Transport,
    data: DeviceData,
    snapshots: SnapshotStore,
    *,
    boot: str,
    stop: asyncio.Event,
    observer: LinkObserver | None = None,
) -> None:
    """Take part in the fleet until ``stop`` is set, or the run ends if the settings say so.

    ``transport`` must have :func:`last_will` of the same ``boot`` as its will.

    Raises:
        AgentError: the coordinator refused this device, or asks what it cannot do.
        ConnectRefused: the broker will not have this client.
    """
    topics = Topics(settings.fleet)
    async with transport:
        link = Link(transport, topics, observer=observer or Silent(), clock=time.monotonic)
        core = build_agent(
            settings,
            introduce(settings, data, boot),
            data,
            snapshots,
            uplink=lambda: link.uplink_bytes_per_s,
            clock=time.monotonic,
        )
        await link.subscribe(*topics.device_filters(settings.device))
        try:
            await drive(core, link, clock=time.monotonic, stop=stop)
        finally:  # an error, too, ends the connection in good order: no last will follows
            with contextlib.suppress(TransportError):
                await link.send(core.goodbye())
        if not stop.is_set() and core.problem is not None:
            raise AgentError(core.problem)
