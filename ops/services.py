"""The services behind the commands: each runs until it has finished or is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from broker.config import BrokerConfig
from broker.embedded import EmbeddedBroker
from ops import run
from ops.logs import Logs

if TYPE_CHECKING:
    from coordinator.settings import CoordinatorSettings
    from edge_agent.settings import AgentSettings


def serve_coordinator(
    flags: Mapping[str, Any],
    network: Mapping[str, Any],
    broker_flags: Mapping[str, Any],
    config: Path | None,
    *,
    fresh: bool,
    quiet: bool,
    until_eof: bool,
) -> None:
    """Run a coordinator to the end of its run.

    What ``network`` and the configuration leave open of the input's shape and the number of classes
    is taken from the data set.
    """
    from coordinator.identity.enrolment import open_enrolment
    from coordinator.observer import Observers
    from coordinator.service import build_core, last_will, new_boot, new_vitals, run_coordinator
    from coordinator.settings import CoordinatorSettings
    from coordinator.traffic import Traffic
    from coordinator.updates.rollouts import open_rollouts
    from ops.http_status import FleetPages, serve_http
    from ops.metrics import Metrics
    from ops.progress import progress_observer

    broker = run.settings_of(BrokerConfig, "broker", config, broker_flags)
    settings = run.settings_of(CoordinatorSettings, "coordinator", config, flags)
    logs = _logs(settings, broker)
    settings = settings.model_copy(update={"network": _network(settings, network)})
    boot = new_boot()
    traffic = Traffic(lambda reason: observer.message_dropped(reason))  # noqa: PLW0108 it comes below
    metrics = Metrics(traffic, settings)
    progress = progress_observer(quiet=quiet, logged=settings.log_format == "json")
    observer = Observers(metrics, progress)
    vitals = new_vitals(settings)
    pages = FleetPages(vitals)
    enrolment = open_enrolment(settings, os.environ, observer)
    rollouts = open_rollouts(settings)

    async def serve() -> bool:
        transport = run.transport_for(broker, "coordinator", last_will(settings, boot))
        with run.stop_signals(until_eof=until_eof) as stop:
            await run_coordinator(
                settings,
                transport,
                core,
                traffic,
                stop=stop,
                vitals=vitals,
                logs=logs,
                enrolment=enrolment,
                rollouts=rollouts,
            )
            return stop.interrupted

    with contextlib.ExitStack() as stack:
        for machine in (enrolment, rollouts):
            if machine is not None:
                stack.callback(machine.close)
        if settings.metrics_port is not None:
            host, port = settings.metrics_host, settings.metrics_port
            stack.enter_context(serve_http(metrics.registry, pages(), host, port))
        core = pages.core = build_core(
            settings,
            observer=observer,
            traffic=traffic.totals,
            boot=boot,
            clock=time.monotonic,
            fresh=fresh,
        )
        stack.enter_context(progress)
        interrupted = asyncio.run(serve())
    if interrupted and not core.finished:
        sys.exit(130)


def serve_agent(
    flags: Mapping[str, Any],
    broker_flags: Mapping[str, Any],
    config: Path | None,
    *,
    until_eof: bool,
) -> None:
    """Run an agent until it is stopped, or to the end of the run if its settings say so."""
    from edge_agent.data import DeviceData, load_device_data
    from edge_agent.edge import EdgeService
    from edge_agent.heap import keep_little
    from edge_agent.identity.keeper import IdentityKeeper, with_name
    from edge_agent.service import last_will, make_reporter, new_boot, run_agent
    from edge_agent.settings import AgentSettings
    from edge_agent.snapshots import DiskSnapshots
    from edge_agent.systemd import supervisor
    from edge_agent.updates.updater import updater_of
    from ops.http_door import Door

    broker = run.settings_of(BrokerConfig, "broker", config, broker_flags)
    settings = with_name(run.settings_of(AgentSettings, "agent", config, flags))
    identity = None if settings.identity_dir is None else IdentityKeeper(settings, broker)
    updater = None if settings.updates_dir is None else updater_of(settings)
    logs = _logs(settings, broker)
    logs.about(lambda: {"device": settings.device})
    if settings.engine == "onnxruntime":
        keep_little()
    elif settings.threads is not None:
        import torch

        torch.set_num_threads(settings.threads)
    boot = new_boot()
    reporter = make_reporter(settings, boot, clock=time.monotonic, cpu_clock=time.thread_time)

    async def serve(data: DeviceData, snapshots: DiskSnapshots, door: Door | None) -> None:
        async with contextlib.AsyncExitStack() as stack:
            stop = stack.enter_context(run.stop_signals(until_eof=until_eof))
            watched_by = supervisor()
            to = broker if identity is None else await identity.ensure(stop, watched_by)
            if to is None:
                return
            transport = run.transport_for(to, settings.device, last_will(settings, boot))
            edge = None
            if door is not None:
                edge = EdgeService(settings, data.pictures)
                await stack.enter_async_context(door.open(edge, data.train.classes))
            await run_agent(
                settings,
                transport,
                data,
                snapshots,
                boot=boot,
                stop=stop,
                edge=edge,
                identity=identity,
                updater=updater,
                reporter=reporter,
                logs=logs,
                supervisor=watched_by,
            )

    with contextlib.ExitStack() as stack:
        if settings.metrics_port is not None:
            from ops.agent_metrics import AgentMetrics
            from ops.http_status import serve_http

            registry = AgentMetrics(reporter).registry
            host, port = settings.metrics_host, settings.metrics_port
            stack.enter_context(serve_http(registry, {}, host, port))
        door = None
        if settings.http is not None:
            door = stack.enter_context(Door(settings))
            if door.token is not None:
                logs.redaction.hide(door.token)
        asyncio.run(serve(load_device_data(settings), DiskSnapshots(settings.state_dir), door))


def serve_broker(port: int, *, until_eof: bool) -> None:
    """Run the embedded broker until stopped."""

    async def serve() -> None:
        with EmbeddedBroker(port=port) as broker, run.stop_signals(until_eof=until_eof) as stop:
            print(f"listening on {broker.url}; Ctrl-C ends it", file=sys.stderr)
            await stop.wait()

    asyncio.run(serve())


def _logs(settings: CoordinatorSettings | AgentSettings, broker: BrokerConfig) -> Logs:
    logs = Logs(settings.log_level, settings.log_format)
    if broker.password is not None:
        logs.redaction.hide(broker.password.get_secret_value())
    return logs


def _network(settings: Any, flags: Mapping[str, Any]) -> Any:
    """The network: flags over configuration, open places filled from the data set."""
    from broker.messages import Network
    from tensors.datasets import load_dataset

    given = settings.network.model_dump(exclude_unset=True)
    given |= {key: value for key, value in flags.items() if value is not None}
    if settings.dataset is not None:
        data = load_dataset(
            settings.dataset, "test", root=settings.data_root, download=settings.download
        )
        _, size, _, channels = data.images.shape
        given = {"channels": channels, "size": size, "classes": len(data.classes)} | given
    return Network.model_validate(given)
