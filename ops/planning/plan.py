"""``splitfleet plan``: everything together, as one JSON object."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from broker.messages import Measurement
from coordinator.rounds import choose_cut
from coordinator.settings import CoordinatorSettings
from ops import simulate
from ops.errors import SettingsWrong
from ops.planning.advice import Advice, advise, bottleneck
from ops.planning.assignment import Found, Limits, assign, by_group, each_alone
from ops.planning.check import check
from ops.planning.model import PARTS, Cuts, FleetModel, Prediction
from ops.planning.skew import Skew, read_counts, skew_of
from ops.simulator.profile import Profile, load_profile
from ops.simulator.sizes import message_sizes
from ops.simulator.world import World
from ops.units import mebibytes
from tensors.datasets import load_dataset
from tensors.partition import partition

DAYS_PER_MONTH = 30.44
DAY_S = 86_400
MOST_ROUNDS_PER_DAY = 1_000_000
LOSSY = 0.05
"""From this share of lost packets on, their mean delay says little about a round."""
COMPARED = 100
"""Up to so many devices the other way of assigning cuts is shown beside the chosen one."""


class PlanSettings(BaseModel):
    """What is asked of ``splitfleet plan``."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    profile: str
    devices: int = Field(default=20, ge=1, le=100_000)
    seed: int = Field(default=0, ge=0)
    settings: dict[str, Any] = Field(default_factory=dict)
    """Of the coordinator, over those of a simulation."""
    network: dict[str, int] = Field(default_factory=dict)
    """Over the network of a simulation."""
    by: Literal["class", "device"] = "class"
    """Whether all devices of a group of the profile have the same cut layer."""
    limits: Limits = Limits()
    """``month_bytes`` and cuts; ``rounds_per_month`` is taken from the next."""
    rounds_per_day: float = Field(default=24.0, gt=0, le=MOST_ROUNDS_PER_DAY)
    labels: Path | None = None
    dataset: str | None = None
    partition: str | None = None
    data_root: Path | None = None
    check: bool = False
    check_rounds: int = Field(default=4, ge=1, le=1000)


def make_plan(asked: PlanSettings) -> dict[str, Any]:
    """The plan. Seconds, bytes and MiB as the keys say.

    Raises :class:`SettingsWrong` for what cannot be, ``DataError`` for images that are not there.
    """
    profile = load_profile(asked.profile)
    if "network" in asked.settings:
        raise SettingsWrong("--set network: use --width, --size, --channels and --classes")
    given = {**asked.settings, "network": asked.network}
    setup = simulate.Plan(asked.devices, asked.profile, asked.seed, "stub", given)
    settings = simulate.settings_of(setup, Path())
    skew = _skew(asked, settings)
    devices = profile.devices(asked.devices, World(asked.seed))
    groups = profile.groups_of(asked.devices)
    model = FleetModel(settings, devices, profile.server, message_sizes(settings))
    per_month = asked.rounds_per_day * DAYS_PER_MONTH
    limits = _with_rounds(asked.limits, per_month)
    alone = each_alone(asked.devices)
    chosen = assign(model, by_group(groups) if asked.by == "class" else alone, limits)
    compared = _compare(model, groups, chosen, asked, limits)
    found = chosen.prediction
    advice = advise(model, found, skew)
    names = [profile.names[group] for group in groups]
    to_paste = _settings(settings, asked, advice, found)
    result = {
        "profile": asked.profile,
        "devices": asked.devices,
        "seed": asked.seed,
        "by": asked.by,
        "round_s": _finite(found.round_s),
        "slowest_s": _finite(found.slowest_s),
        "deadline_s": found.deadline_s,
        "late_devices": len(found.late),
        "rounds_per_day": asked.rounds_per_day,
        "bottleneck": bottleneck(found, names, PARTS),
        "server": _server(model, found, advice, settings.strategy),
        "classes": _classes(model, found, groups, profile, per_month),
        "month_bytes": _month(model, found, per_month),
        "compared": compared,
        "skew": None if skew is None else _skew_entry(skew),
        "advice": {
            "strategy": advice.strategy,
            "aggregation": advice.aggregation,
            "reasons": advice.reasons,
            "waiting": advice.waiting,
            "helps": [{"change": change, "round_s": s} for change, s in advice.helps],
        },
        "settings": to_paste,
        "cuts": {d.name: int(cut) for d, cut in zip(devices, found.cuts, strict=True)},
        "predictions_asked": chosen.asked,
        "warnings": [
            *_warnings(model, found, asked, skew),
            *_memory_warnings(advice, to_paste["strategy"], model.server.memory_mb),
        ],
    }
    if asked.check:
        checked = check(model, found.cuts, rounds=asked.check_rounds, seed=asked.seed)
        result["check"] = {
            "predicted_s": _finite(checked.predicted_s),
            "simulated_s": _finite(checked.simulated_s),
            "error": _finite(checked.error),
            "with_failures_s": _finite(checked.with_failures_s),
        }
    return result


def automatic(model: FleetModel) -> Cuts:
    """The cuts that the coordinator would give devices that measure themselves (``cut = auto``)."""
    settings = model.settings
    sizes = model.sizes
    cuts = []
    for device in model.devices:
        block_ms = 1000 * (device.cost.forward_s + device.cost.backward_s)
        up = device.link.up_bytes_per_s
        measured = Measurement(
            batch_size=settings.batch_size,
            step_ms=[block_ms for _ in model.cuts],
            exit_ms=[0.0 for _ in model.cuts],
            memory_mb=model.memory_mb.tolist(),
            available_mb=device.memory_mb,
            cores=1,
            uplink_bytes_per_s=0.0 if math.isinf(up) else up,
        )
        cuts.append(
            choose_cut(
                measured,
                sizes.activations,
                step_budget_ms=settings.step_budget_ms,
                memory_budget_mb=settings.memory_budget_mb,
            )
        )
    return np.array(cuts)


# -- parts ----------------------------------------------------------------------------------------


def _with_rounds(limits: Limits, per_month: float) -> Limits:
    return Limits(limits.first_cut, limits.last_cut, limits.slack, limits.month_bytes, per_month)


def _compare(
    model: FleetModel, groups: Sequence[int], chosen: Found, asked: PlanSettings, limits: Limits
) -> list[dict[str, Any]]:
    rows: list[tuple[str, Prediction | None]] = [(f"planned by {asked.by}", chosen.prediction)]
    if asked.by == "device":
        rows.append(("planned by class", _if_any(model, by_group(groups), limits)))
    elif asked.devices <= COMPARED:
        rows.append(("planned by device", _if_any(model, each_alone(asked.devices), limits)))
    own = [device.cut for device in model.devices]
    automatically = automatic(model)
    mixed = [int(a) if cut == "auto" else cut for cut, a in zip(own, automatically, strict=True)]
    deepest = int(model.cuts[-1])
    rows.append(("as in the profile", model.predict([min(cut, deepest) for cut in mixed])))
    rows.append(('cut = "auto"', model.predict(automatically)))
    return [
        {
            "how": how,
            "round_s": _finite(prediction.slowest_s),
            "server_load": prediction.server_load,
            "cuts": _histogram(prediction.cuts),
        }
        for how, prediction in rows
        if prediction is not None
    ]


def _if_any(model: FleetModel, units: list[Any], limits: Limits) -> Prediction | None:
    try:
        return assign(model, units, limits).prediction
    except SettingsWrong:
        return None  # no cut that a whole class could have


def _histogram(cuts: Cuts) -> dict[str, int]:
    return {str(cut): count for cut, count in sorted(Counter(cuts.tolist()).items())}


def _server(model: FleetModel, found: Prediction, advice: Advice, strategy: str) -> dict[str, Any]:
    return {
        "load": found.server_load,
        "wait_ms": 1000 * found.wait_s,
        "memory_mb": advice.memory_mb[strategy],
        "memory_mb_by_strategy": advice.memory_mb,
        "memory_limit_mb": _finite(model.server.memory_mb),
    }


def _classes(
    model: FleetModel,
    found: Prediction,
    groups: Sequence[int],
    profile: Profile,
    per_month: float,
) -> list[dict[str, Any]]:
    up, down = model.bytes_per_round(found)
    entries = []
    for number in sorted(set(groups)):
        at = np.flatnonzero(np.asarray(groups) == number)
        seconds = found.device_s[at]
        entries.append(
            {
                "name": profile.names[number],
                "devices": len(at),
                "cuts": _histogram(found.cuts[at]),
                "batches": float(found.leg[at].mean()),
                "step_ms": float(1000 * np.median(seconds / found.leg[at])),
                "median_s": float(np.median(seconds)),
                "slowest_s": float(seconds.max()),
                "share_of_round": float(np.median(seconds) / found.device_s.max()),
                "memory_mb": float(model.memory_mb[found.cuts[at] - 1].max()),
                "memory_limit_mb": float(model.budget_mb[at].min()),
                "busy": dict(zip(PARTS, found.busy[at].mean(axis=0).tolist(), strict=True)),
                "month_up_bytes": float(up[at].mean() * per_month),
                "month_down_bytes": float(down[at].mean() * per_month),
            }
        )
    return entries


def _month(model: FleetModel, found: Prediction, per_month: float) -> dict[str, float]:
    up, down = model.bytes_per_round(found)
    return {
        "fleet_up": float(up.sum() * per_month),
        "fleet_down": float(down.sum() * per_month),
        "most_of_a_device": float((up + down).max() * per_month),
    }


def _skew(asked: PlanSettings, settings: CoordinatorSettings) -> Skew | None:
    if asked.labels is not None:
        if asked.partition is not None or asked.dataset is not None:
            raise SettingsWrong("--labels: it says all; leave --dataset and --partition out")
        return skew_of(read_counts(asked.labels))
    if asked.partition is None and asked.dataset is None:
        return None
    dataset = load_dataset(asked.dataset or simulate.DATASET, "train", root=asked.data_root)
    parts = partition(dataset.labels, asked.devices, asked.partition or "iid", settings.seed)
    counts = [np.bincount(dataset.labels[rows], minlength=len(dataset.classes)) for rows in parts]
    return skew_of(np.array(counts, np.float64))


def _skew_entry(skew: Skew) -> dict[str, Any]:
    return {
        "distance": skew.distance,
        "by_chance": skew.by_chance,
        "beyond_chance": skew.beyond_chance,
        "level": skew.level,
    }


def _settings(
    settings: CoordinatorSettings, asked: PlanSettings, advice: Advice, found: Prediction
) -> dict[str, Any]:
    """``[coordinator]`` as it would be pasted: what was given, and what is advised beside it."""
    dumped = settings.model_dump(mode="json")
    kept = {key: dumped[key] for key in asked.settings if dumped[key] is not None}
    decided = "strategy" in kept or "aggregation" in kept
    chosen = {
        "strategy": settings.strategy if decided else advice.strategy,
        "aggregation": settings.aggregation if decided else advice.aggregation,
        "codec": settings.codec,
        "window": settings.window,
        "batch_size": settings.batch_size,
        "min_devices": settings.min_devices,
        "max_devices": max(settings.max_devices, asked.devices),
        "queue_chunks": settings.queue_chunks,
    }
    if advice.buffer_size is not None and not decided:
        chosen["buffer_size"] = advice.buffer_size
    if math.isfinite(found.slowest_s) and found.slowest_s > settings.round_deadline_s / 2:
        chosen["round_deadline_s"] = float(math.ceil(3 * found.slowest_s))
    return {**chosen, **kept, "network": dumped["network"]}


def _warnings(
    model: FleetModel, found: Prediction, asked: PlanSettings, skew: Skew | None
) -> list[str]:
    warnings = []
    settings, count = model.settings, len(model.devices)
    if not math.isfinite(found.round_s):
        warnings.append(
            f"no round would close: fewer than {100 * settings.quorum:.0f} % of the devices finish "
            f"within twice the deadline of {found.deadline_s:.0f} s: raise round_deadline_s"
        )
    elif len(found.late):
        warnings.append(
            f"{len(found.late)} of {count} devices miss the deadline of {found.deadline_s:.0f} s: "
            "they will be given less work (adapt_work), which is not predicted"
        )
    elif float(found.device_s.max()) > found.deadline_s:
        warnings.append(
            f"a round is extended at its deadline of {found.deadline_s:.0f} s: "
            "too few have finished then"
        )
    if asked.network:
        warnings.append(
            "the profile's forward_s is the time of a block, whatever the network: let it be that "
            "of this one"
        )
    if asked.rounds_per_day * found.slowest_s > DAY_S:
        warnings.append(
            f"--rounds-per-day {asked.rounds_per_day:g}: a day has time for "
            f"{DAY_S / found.slowest_s:.1f}"
        )
    away = [d for d in model.devices if d.off_s or d.failure_s]
    if away:
        shares = [
            d.on_s / (d.on_s + d.off_s)
            * (d.failure_s / (d.failure_s + d.repair_s) if d.failure_s else 1.0)
            for d in model.devices
        ]  # fmt: skip
        warnings.append(
            f"{len(away)} of {count} devices fail or switch off; {sum(shares):.0f} are there at a "
            "time. Predicted is a round in which all are"
        )
    if lossy := sum(d.link.loss >= LOSSY for d in model.devices):
        warnings.append(
            f"{lossy} of {count} devices lose at least {100 * LOSSY:.0f} % of their packets: only "
            "the mean delay is predicted, rounds may take twice as long and more: see --check"
        )
    if skew is not None and skew.level != "even":
        warnings.append(
            f"labels are spread unevenly ({skew.level}): mean distance {skew.distance:.2f} to the "
            f"labels of all, {skew.by_chance:.2f} by chance; expect a less accurate network"
        )
    if settings.follow_link:
        warnings.append("follow_link lowers bytes as links call for it, which is not predicted")
    return warnings


def _memory_warnings(advice: Advice, strategy: str, limit: float) -> list[str]:
    """That what is to be pasted does not fit the server."""
    fitting = [name for name, needed in advice.memory_mb.items() if needed <= limit]
    if strategy in fitting:
        return []
    takes = mebibytes(advice.memory_mb[strategy])
    fits = f"only {' and '.join(fitting)} would fit" if fitting else "no strategy fits"
    has = f"the server has {mebibytes(limit)}, {strategy} takes {takes}"
    return [f"{has}: {fits}: raise its memory_mb, or lower --width or batch_size"]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
