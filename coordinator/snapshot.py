"""A fleet's status, taken from the coordinator's own objects.

That is done in any thread while the machines go on in theirs: what is read is copied at once, and
figures may be some milliseconds apart.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from broker.fields import RunPhase
from broker.telemetry import METRICS
from coordinator.defences.guard import Guard
from coordinator.health import Health
from coordinator.ledger import Ledger
from coordinator.open_rounds import OpenRounds
from coordinator.registry import Device
from coordinator.status import ClosedRound, DeviceStatus, FleetStatus, RoundStatus, ServingStatus
from coordinator.training import RoundInProgress

MOST_DEVICES = 1000
"""Have a line of their own, those that are online first."""


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a run is.

    ``rounds_wanted`` is how many it shall have, ``due_s`` how long the one that runs still has;
    ``records`` are those of closed rounds, ``traffic`` is by ``direction/role/device``.
    """

    run: str
    phase: RunPhase
    version: int
    rounds: OpenRounds
    rounds_wanted: int
    due_s: float | None
    records: Sequence[Mapping[str, Any]]
    traffic: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Process:
    """Which coordinator it is; ``started`` on its clock."""

    fleet: str
    boot: str
    started: float


def fleet_status(
    process: Process,
    standing: Standing,
    devices: Sequence[Device],
    serving: ServingStatus,
    health: Health,
    guard: Guard,
    now: float,
) -> FleetStatus:
    """All there is to say; ``now`` is on the clock of the process and the rounds."""
    current = standing.rounds.current
    rows = _device_rows(devices, standing, guard, now)
    return FleetStatus(
        time=_utc_now(),
        uptime_s=round(now - process.started, 3),
        boot=process.boot,
        fleet=process.fleet,
        run=standing.run,
        phase=standing.phase,
        version=standing.version,
        rounds=standing.rounds_wanted,
        health=health,
        round=None if current is None else _round_status(current, standing.due_s, now),
        closed=_closed_round(standing.records),
        serving=serving,
        bytes=_by_role(standing.traffic),
        predictions=_predictions(devices),
        online=sum(device.online for device in devices),
        known=len(devices),
        states=dict(Counter(device.state for device in devices)),
        quarantined=sum(guard.is_held(device.name) for device in devices),
        devices=rows,
        left_out=len(devices) - len(rows),
    )


def _utc_now() -> str:
    """2026-11-21T20:15:03.042Z."""
    now = time.time()
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
    return f"{whole}.{int(now % 1 * 1000):03d}Z"


def _round_status(current: RoundInProgress, due_s: float | None, now: float) -> RoundStatus:
    ledgers = list(current.ledgers.values())
    losses = [(cut, list(values)) for cut, values in list(current.losses.items())]
    return RoundStatus(
        number=current.stamp[1],
        attempt=current.stamp[2],
        version=current.version,
        seconds=round(now - current.opened, 3),
        deadline_s=None if due_s is None else round(due_s, 3),
        extended=current.extended,
        participants=len(ledgers),
        finished=current.finished,
        batches=sum(ledger.next_batch for ledger in ledgers),
        quota=sum(ledger.quota for ledger in ledgers),
        loss={str(cut): sum(values) / len(values) for cut, values in sorted(losses) if values},
    )


def _closed_round(records: Sequence[Mapping[str, Any]]) -> ClosedRound | None:
    if not records:
        return None
    last = records[-1]
    return ClosedRound(
        number=last["round"],
        version=last["version"],
        seconds=round(last["seconds"], 3),
        samples=sum(entry.get("samples", 0) for entry in list(last["devices"].values())),
        server_accuracy=last.get("server_accuracy"),
        exit_accuracy=dict(last.get("exit_accuracy", {})),
    )


def _device_rows(
    devices: Sequence[Device], standing: Standing, guard: Guard, now: float
) -> list[DeviceStatus]:
    ordered = sorted(devices, key=lambda device: (not device.online, device.name))
    rounds = list(standing.rounds)
    sizes = _by_device(standing.traffic)
    return [
        _device_row(each, rounds, standing, sizes, guard, now) for each in ordered[:MOST_DEVICES]
    ]


def _by_role(traffic: Mapping[str, int]) -> dict[str, int]:
    roles: Counter[str] = Counter()
    for key, size in traffic.items():
        roles[key.rpartition("/")[0]] += size
    return dict(sorted(roles.items()))


def _device_row(
    device: Device,
    rounds: Sequence[RoundInProgress],
    standing: Standing,
    sizes: Mapping[tuple[str, str], int],
    guard: Guard,
    now: float,
) -> DeviceStatus:
    report, heard = device.report, device.heard
    return DeviceStatus(
        name=device.name,
        device_class=device.device_class,
        state=device.state,
        cut=device.cut,
        heard_s=None if heard is None else round(max(0.0, now - heard), 3),
        software=device.hello.software if device.hello else None,
        rounds=device.rounds,
        samples=device.samples,
        open_samples=sum(
            _open_samples(each.ledgers.get(device.name), current=each is standing.rounds.current)
            for each in rounds
        ),
        credits=sum(each.credits(device.name) for each in rounds),
        share=device.load.share,
        exit_loss=report.exit_loss if report else None,
        exit_accuracy=report.exit_accuracy if report else None,
        predictions=_predictions([device]),
        bytes_up=sizes.get((device.name, "up"), 0),
        bytes_down=sizes.get((device.name, "down"), 0),
        breaches=guard.breaches(device.name),
        quarantine_s=round(guard.remaining(device.name), 3),
        frozen=device.frozen,
    )


def _predictions(devices: Sequence[Device]) -> dict[str, int]:
    """Images answered by all of them, by who answered."""
    counts: Counter[str] = Counter(dict.fromkeys(METRICS["predictions"].values, 0))
    for device in devices:
        counts.update(device.predictions.copy())
    return dict(counts)


def _open_samples(ledger: Ledger | None, *, current: bool) -> int:
    """What a round that runs merges at its end, or an earlier one may still be brought."""
    if ledger is None:
        return 0
    return ledger.samples if current else ledger.fresh


def _by_device(traffic: Mapping[str, int]) -> dict[tuple[str, str], int]:
    sizes: Counter[tuple[str, str]] = Counter()
    for key, size in traffic.items():
        direction, _, device = key.split("/")
        sizes[device, direction] += size
    return dict(sizes)
