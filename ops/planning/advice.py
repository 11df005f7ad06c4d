"""Which strategy suits a fleet, and what would make its rounds shorter."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ops.planning.memory import server_mb
from ops.planning.model import FleetModel, Prediction
from ops.planning.skew import Skew
from ops.units import mebibytes

WORTH = 1.5
"""Batches a second that no barrier must bring, times those with one, to be advised."""
WAITS = 0.3
"""Share of a round that the mean device has to wait for that to be worth advising."""
HELPS = 0.05
BUSY = 0.95
BUFFERS = 4
"""Without a barrier a version is made of every so many-th part of the fleet's contributions."""


@dataclass(frozen=True, slots=True)
class Advice:
    """``strategy`` and ``aggregation`` as in the coordinator's settings; why; what would help.

    ``helps`` are settings with the seconds of a round that they would lead to, best first.
    ``memory_mb`` is the server's, by strategy.
    """

    strategy: str
    aggregation: str
    buffer_size: int | None
    reasons: list[str]
    helps: list[tuple[str, float]]
    memory_mb: dict[str, float]
    waiting: float
    """Share of a round that the mean device waits for the slowest."""


def advise(model: FleetModel, found: Prediction, skew: Skew | None) -> Advice:
    """For a fleet cut like this."""
    settings, cuts = model.settings, found.cuts.tolist()
    memory = {
        strategy: server_mb(settings, model.sizes, cuts, strategy)
        for strategy in ("averaging", "sequential", "cascade")
    }
    limit = model.server.memory_mb
    waiting = 1 - float(found.device_s.mean() / found.device_s.max())
    size = max(2, math.ceil(len(cuts) / BUFFERS))
    strategy, aggregation, reasons = "averaging", "rounds", list[str]()
    if memory["averaging"] > limit:
        strategy = "sequential"
        reasons.append(
            f"a replica for each device takes {mebibytes(memory['averaging'])} at the server, "
            f"which has {mebibytes(limit)}; one network for all takes "
            + mebibytes(memory["sequential"])
            + ("" if memory["sequential"] <= limit else ", which is too much as well")
        )
    elif skew is not None and skew.level == "strong":
        strategy = "sequential"
        reasons.append(
            "labels are spread very unevenly: one server network sees those of all devices mixed, "
            "a replica only those of its own device until the round's end"
        )
    else:
        gain = _without_barrier(model, found, size)
        gains = gain >= WORTH and waiting >= WAITS
        if gains and (skew is None or skew.level == "even"):
            aggregation = "buffered"
            reasons.append(
                f"devices wait {100 * waiting:.0f} % of a round for the slowest: without a barrier "
                f"{gain:.1f} × the batches a second; slow devices then count less often"
            )
        elif gains:
            reasons.append(
                f"without a barrier there would be {gain:.1f} × the batches a second, but labels "
                "are spread unevenly, and fast devices would count more often than slow ones"
            )
        else:
            reasons.append("replicas fit the server's memory")
            if waiting < WAITS:
                reasons.append("devices wait little for each other")
            elif settings.aggregation == "rounds" and settings.round_seconds is None:
                reasons.append(
                    f"without a barrier there would be only {gain:.1f} × the batches a second"
                )
    if found.server_load > BUSY:
        reasons.append(
            "the server is the bottleneck: deeper cuts relieve it; cascade makes more of its time "
            "(1.2 to 1.4 × the samples a second, docs/benchmarks.md, which also says what it cost)"
        )
    return Advice(
        strategy, aggregation, size if aggregation == "buffered" else None,
        reasons, _helps(model, found), memory, waiting,
    )  # fmt: skip


def bottleneck(found: Prediction, names: list[str], parts: tuple[str, ...]) -> str:
    """What the slowest device does most of the time, e.g. ``uplink of class LTE-M``.

    ``names`` are the devices' classes.
    """
    if found.server_load > BUSY:
        return f"server (busy {100 * found.server_load:.0f} % while all devices train)"
    slowest = int(found.device_s.argmax())
    part = parts[int(found.busy[slowest].argmax())]
    share = float(found.busy[slowest].max())
    where = "" if part == "server" else f" of class {names[slowest]}"
    return f"{part}{where} ({100 * min(1.0, share):.0f} % of its round)"


def _without_barrier(model: FleetModel, found: Prediction, size: int) -> float:
    if model.settings.aggregation == "buffered" or model.settings.round_seconds is not None:
        return 1.0
    changed = {"aggregation": "buffered", "buffer_size": size, "strategy": "averaging"}
    other = FleetModel(
        model.settings.model_copy(update=changed), model.devices, model.server, model.sizes
    )
    per_s = other.predict(found.cuts).batches_per_s
    return per_s / found.batches_per_s if found.batches_per_s else math.inf


def _helps(model: FleetModel, found: Prediction) -> list[tuple[str, float]]:
    settings = model.settings
    tries: list[tuple[str, dict[str, object]]] = [
        (f"window = {2 * settings.window}", {"window": 2 * settings.window}),
        (f"window = {4 * settings.window}", {"window": 4 * settings.window}),
    ]
    if settings.feedback == "gradient":
        tries.append(('feedback = "none"', {"feedback": "none"}))
    helped: list[tuple[str, float]] = []
    for label, change in tries:
        other = FleetModel(
            settings.model_copy(update=change), model.devices, model.server, model.sizes
        )
        fits = other.memory_mb[found.cuts - 1] <= other.budget_mb
        seconds = other.predict(found.cuts).slowest_s
        if bool(np.all(fits)) and seconds < (1 - HELPS) * min(
            [found.slowest_s, *(least for _, least in helped)]
        ):
            helped.append((label, seconds))
    return sorted(helped, key=lambda pair: pair[1])
