"""``splitfleet simulate``: a fleet of any size on virtual time."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from broker.config import load_settings
from broker.errors import ConfigError
from coordinator.settings import CoordinatorSettings
from edge_agent.data import DeviceData
from ops.errors import SettingsWrong
from ops.simulator.fleet import SimulatedFleet
from ops.simulator.profile import load_profile
from ops.simulator.programs import Device
from ops.simulator.summary import summary
from ops.simulator.world import World
from tensors.datasets import load_dataset
from tensors.partition import partition

DATASET = "fashion-mnist-small"
DEFAULTS: dict[str, Any] = {
    "rounds": 10,
    "queue_chunks": 10_000,  # as in the mosquitto.conf that `splitfleet fleet init` writes
    "inference": False,
    "device": "cpu",
    "precision": "fp32",
    "memory_format": "contiguous",
    "threads": 1,
}
NETWORK = {"width": 8, "channels": 1, "size": 28, "classes": 10}


@dataclass(frozen=True, slots=True)
class Plan:
    """What is simulated."""

    devices: int
    profile: str
    seed: int
    learning: Literal["stub", "real"]
    settings: Mapping[str, Any]
    """Of the coordinator; over :data:`DEFAULTS`."""
    limit_s: float = 30 * 86_400.0


def parse_learning(name: str) -> Literal["stub", "real"]:
    """``--learning``. Raises :class:`SettingsWrong`."""
    match name:
        case "stub" | "real":
            return name
    raise SettingsWrong(f"--learning {name}: it is stub or real")


def simulate(plan: Plan) -> dict[str, Any]:
    """Run it; the summary.

    Raises:
        SettingsWrong: a setting or the profile is wrong.
        FleetFailed: the run does not come to its end within ``limit_s`` of virtual time.
    """
    profile = load_profile(plan.profile)
    devices = profile.devices(plan.devices, World(plan.seed))
    if plan.learning == "real":
        devices = _with_data(devices, plan.seed)
    with tempfile.TemporaryDirectory(prefix="splitfleet-simulate-") as folder:
        fleet = SimulatedFleet(
            settings_of(plan, Path(folder)),
            devices,
            seed=plan.seed,
            learning=plan.learning,
            sizes="real",
            server=profile.server.cost,
            coordinator_link=profile.server.link,
        )
        with rarely_collecting():
            fleet.run(until=lambda: fleet.coordinator.over, limit_s=plan.limit_s)
        return {"profile": plan.profile, "learning": plan.learning, **summary(fleet)}


def run_simulation(plan: Plan, *, as_json: bool) -> None:
    """Simulate and print the summary."""
    with _errors_only():  # failures are what is simulated
        result = simulate(plan)
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        show(result, Console())


def show(result: Mapping[str, Any], console: Console) -> None:
    """Print a summary for people."""
    table = Table(
        title=f"{result['devices']} devices, profile {result['profile']}, seed {result['seed']}",
        show_header=False,
    )
    rounds, batches = result["rounds"], result["batches"]
    table.add_row("virtual time", f"{result['virtual_s']:.1f} s")
    table.add_row(
        "rounds",
        f"{rounds['closed']} closed, {rounds['extended']} extended, "
        f"{rounds['abandoned']} abandoned",
    )
    if rounds["seconds"]:
        spread = rounds["seconds"]
        table.add_row(
            "seconds of a round",
            f"{spread['least']:.1f} … {spread['most']:.1f}, mean {spread['mean']:.1f}",
        )
    table.add_row(
        "batches",
        f"{batches['produced']} produced, {batches['applied']} applied, "
        f"{_reasons(batches['discarded'])} discarded, {batches['expired']} expired",
    )
    for who, share in result["utilisation"].items():
        table.add_row(f"utilisation of {who}", "–" if share is None else f"{share:.3f}")
    for way in ("up", "down"):
        table.add_row(f"bytes {way}", _reasons(result["bytes"][way]))
    late = result["late_work"]
    table.add_row("late work", f"{late['folded']} folded; samples: {_reasons(late['samples'])}")
    table.add_row("staleness", _reasons(late["staleness"]))
    for what, most in result["high_water"].items():
        table.add_row(f"most in {what.replace('_', ' ')}", str(most))
    table.add_row("messages", f"{result['messages']}, {result['events']} events")
    table.add_row("model", result["model_sha256"])
    console.print(table)
    cuts = Table(title="by cut layer")
    header = ("devices", "finished", "produced", "applied", "expired", "utilisation")
    for column in ("cut", *header):
        cuts.add_column(column, justify="right")
    for cut, entry in result["by_cut"].items():
        cuts.add_row(cut, *(str(entry[column]) for column in header))
    console.print(cuts)
    for problem in result["problems"]:
        console.print(f"[red]problem:[/red] {problem}")


@contextlib.contextmanager
def _errors_only() -> Iterator[None]:
    logger = logging.getLogger("splitfleet")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def rarely_collecting() -> Iterator[None]:
    """A fleet is millions of objects that live on; to look for rubbish among them takes long."""
    thresholds = gc.get_threshold()
    gc.set_threshold(500_000, 50, 100)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)


def settings_of(plan: Plan, folder: Path) -> CoordinatorSettings:
    """The coordinator's settings of a simulation. Raises :class:`SettingsWrong`."""
    given = {key: value for key, value in plan.settings.items() if value is not None}
    network = given.get("network", {})
    fixed = {"state_dir", "dataset", "seed"} & given.keys()
    if fixed:
        raise SettingsWrong(f"--set {min(fixed)}: a simulation has its own")
    if plan.settings.get("stay"):
        raise SettingsWrong("--set stay: a simulation ends when its run does")
    flags = {
        "min_devices": max(1, plan.devices * 3 // 4),
        "max_devices": plan.devices,
        "seed": plan.seed,
        **DEFAULTS,
        **given,
        "network": {**NETWORK, **network} if isinstance(network, Mapping) else network,
        "state_dir": folder,
    }
    if plan.learning == "real":
        flags["dataset"] = DATASET
    try:
        settings = load_settings(
            CoordinatorSettings, section="coordinator", file=None, environ={}, flags=flags
        )
    except ConfigError as exc:
        raise SettingsWrong(str(exc)) from exc
    if (least := settings.min_devices) > plan.devices:
        raise SettingsWrong(f"min_devices = {least}: with {plan.devices} no round would begin")
    return settings


def _with_data(devices: Sequence[Device], seed: int) -> list[Device]:
    train = load_dataset(DATASET, "train")
    shares = partition(train.labels, len(devices), "iid", seed)
    nothing = np.zeros(0, np.int64)
    return [
        replace(device, data=DeviceData(train, rows, None, nothing))
        for device, rows in zip(devices, shares, strict=True)
    ]


def _reasons(counts: Mapping[str, int]) -> str:
    parts = [f"{name} {count}" for name, count in counts.items()]
    return ", ".join(parts) if parts else "0"
