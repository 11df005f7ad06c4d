"""What a simulated run came to: the same for the same seed, without any time of this machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from statistics import fmean
from typing import Any

from ops.simulator.fleet import SimulatedFleet
from ops.simulator.process import Process

KINDS = ("activations", "gradients", "parameters", "features", "prediction")
"""Kinds of messages counted by themselves; the others are ``control``."""


def summary(fleet: SimulatedFleet) -> dict[str, Any]:
    """Everything worth knowing, as JSON. Seconds are virtual, bytes those on the wire."""
    books, seen = fleet.books(), fleet.witnesses
    server, agents = fleet.coordinator, list(fleet.agents.values())
    history = fleet.checkpoint().history
    training = sum(stretch.training_s for stretch in fleet.stretches.values())
    late = [entry for record in history for entry in record["late"]]
    return {
        "seed": fleet.world.seed,
        "devices": len(agents),
        "virtual_s": round(fleet.world.now, 6),
        "rounds": {
            "closed": books.rounds,
            "extended": seen.outcomes["extended"],
            "abandoned": seen.outcomes["abandoned"],
            "seconds": _spread([record["seconds"] for record in history]),
        },
        "batches": books.totals(),
        "device_discarded": _sum(report.discarded for report in books.devices.values()),
        "utilisation": {
            "devices": _ratio(sum(s.busy_s for s in fleet.stretches.values()), training),
            "coordinator": _ratio(server.tally.busy_s, fleet.world.now),
        },
        "bytes": {
            "up": _by_kind(agents),
            "down": _by_kind([server]),
            "received_by_devices": sum(agent.received_bytes for agent in agents),
        },
        "late_work": {
            "folded": len(late),
            "staleness": _counts(entry["staleness"] for entry in late),
            "samples": dict(sorted(seen.late.items())),
        },
        "work_changes": seen.work_changes,
        "dropped_messages": dict(sorted(seen.dropped.items())),
        "refused_batches": dict(sorted(seen.discarded.items())),
        "high_water": {
            "broker_queue": fleet.broker.most_queued,
            "broker_dropped": fleet.broker.dropped,
            "coordinator_inbox": server.tally.most_inbox,
            "coordinator_unread": server.tally.most_arrived,
            "coordinator_outbox": server.tally.most_outbox,
            "device_inbox": max(agent.tally.most_inbox for agent in agents),
            "device_unread": max(agent.tally.most_arrived for agent in agents),
            "device_outbox": max(agent.tally.most_outbox for agent in agents),
        },
        "processes": {
            "lives": sum(agent.tally.lives for agent in agents),
            "connections": sum(agent.tally.connections for agent in agents),
            "unsent": sum(agent.tally.unsent for agent in agents),
        },
        "by_cut": _by_cut(fleet, history),
        "events": fleet.world.events,
        "messages": fleet.broker.routed,
        "problems": books.problems,
        "model_sha256": fleet.digest(),
    }


def _by_cut(fleet: SimulatedFleet, history: list[dict[str, Any]]) -> dict[str, Any]:
    cuts: dict[int, dict[str, Any]] = {}
    for record in history:
        for name, entry in record["devices"].items():
            at = cuts.setdefault(
                entry["cut"],
                {"devices": {}, "finished": 0, "produced": 0, "applied": 0, "expired": 0},
            )
            at["devices"][name] = None
            at["finished"] += entry["finished"]
            for key in ("produced", "applied", "expired"):
                at[key] += entry["account"][key]
    result = {}
    for cut in sorted(cuts):
        names = cuts[cut].pop("devices")
        stretches = [fleet.stretches[name] for name in names]
        result[str(cut)] = {
            "devices": len(names),
            **cuts[cut],
            "utilisation": _ratio(
                sum(s.busy_s for s in stretches), sum(s.training_s for s in stretches)
            ),
        }
    return result


def _by_kind(processes: Iterable[Process]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for process in processes:
        for kind, size in process.tally.sent_bytes.items():
            total[kind if kind in KINDS else "control"] += size
    return dict(sorted(total.items()))


def _sum(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items()))


def _counts(values: Iterable[int]) -> dict[str, int]:
    return {str(value): times for value, times in sorted(Counter(values).items())}


def _spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {
        "least": round(min(values), 6),
        "mean": round(fmean(values), 6),
        "most": round(max(values), 6),
    }


def _ratio(part: float, whole: float) -> float | None:
    return round(part / whole, 6) if whole else None
