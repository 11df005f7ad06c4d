"""The report of a run: ``summary.json`` for programs, ``report.html`` for people."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ops.errors import DiskTrouble
from ops.report_page import render_page

PURPOSES = {
    "activation": "training",
    "gradient": "training",
    "parameter": "parameters",
    "feature": "evaluation",
    "prediction": "evaluation",
    "control": "control",
}
"""Role of a message → what its bytes were spent on."""

_COUNTS = (
    "images",
    "exits",
    "offloads",
    "answered",
    "refused",
    "timeouts",
    "correct",
    "exit_correct",
    "bytes_up",
    "bytes_down",
)


def write_report(folder: Path, result: Mapping[str, Any], *, wall_seconds: float) -> Path:
    """Write ``summary.json`` and ``report.html`` into ``folder``; the path of the latter.

    ``result`` is what the coordinator leaves in ``result.json``; numbers in it that are not finite
    become null.

    Raises:
        DiskTrouble: the files cannot be written.
    """
    result = finite(result)
    summary = summarize(result, wall_seconds=wall_seconds)
    page = folder / "report.html"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(summary, indent=1, allow_nan=False)
        (folder / "summary.json").write_text(text + "\n", "utf-8")
        page.write_text(render_page(summary, result), "utf-8")
    except OSError as exc:
        raise DiskTrouble(
            f"the report cannot be written to {folder} ({exc.strerror}): free space there, or "
            "choose another folder"
        ) from exc
    return page


def summarize(result: Mapping[str, Any], *, wall_seconds: float) -> dict[str, Any]:
    """The numbers of a run; shares are 0 to 1, what was not measured is None.

    ``bytes_up`` and ``bytes_down`` are all application payload over the coordinator's link; a
    broadcast counts once there, and for each device it is addressed to in the device's own number.
    ``bytes_up_per_sample`` is that of activations alone. Of each device ``activation_bits`` are the
    bits a value of activations took, encoded, and ``activation_levels`` to how many levels values
    were rounded, as it reports itself: means over the values it sent, None for no report or floats.
    """
    settings, history = result["settings"], result["history"]
    roles = _by_role(result["traffic"])
    samples = sum(device["samples"] for r in history for device in r["devices"].values())
    seconds = sum(record["seconds"] for record in history)
    devices = [_device(entry, history, result["traffic"]) for entry in result["devices"]]
    last = history[-1] if history else {}
    return {
        "run": result["run"],
        "strategy": settings["strategy"],
        "feedback": settings["feedback"],
        "dataset": settings["dataset"],
        "codec": settings["codec"],
        "seed": settings["seed"],
        "rounds": len(history),
        "rounds_abandoned": result["rounds"] - len(history),
        "version": result["version"],
        "wall_seconds": wall_seconds,
        "training_seconds": seconds,
        "samples": samples,
        "samples_per_second": samples / seconds if seconds else 0.0,
        "server_accuracy": last.get("server_accuracy"),
        "bytes_up": _sum(roles, direction="up"),
        "bytes_down": _sum(roles, direction="down"),
        "bytes_up_per_sample": roles.get("up/activation", 0) / samples if samples else 0.0,
        "bytes_by_role": roles,
        "bytes_by_purpose": {
            purpose: {
                direction: _sum(roles, direction=direction, purpose=purpose)
                for direction in ("up", "down")
            }
            for purpose in dict.fromkeys(PURPOSES.values())
        },
        "devices": devices,
        "inference": _total([d["inference"] for d in devices if d["inference"] is not None]),
        "inference_by_cut": _by_cut(devices),
        **({"security": result["security"]} if "security" in result else {}),
        "exit_sweep": mean_sweep(
            [d["exit_sweep"] for d in result["devices"] if d.get("exit_sweep")]
        ),
    }


def mean_sweep(sweeps: Sequence[Sequence[Mapping[str, float]]]) -> list[dict[str, float]]:
    """Exit rate and accuracy per threshold, each the mean over ``sweeps`` that all have it."""
    by_threshold: dict[float, list[Mapping[str, float]]] = {}
    for sweep in sweeps:
        for point in sweep:
            by_threshold.setdefault(point["threshold"], []).append(point)
    return [
        {
            "threshold": threshold,
            "exit_rate": _mean(point["exit_rate"] for point in points),
            "accuracy": _mean(point["accuracy"] for point in points),
        }
        for threshold, points in sorted(by_threshold.items())
        if len(points) == len(sweeps)
    ]


def finite(value: Any) -> Any:
    """The same with None for NaN and infinities, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return value


def _device(
    entry: Mapping[str, Any], history: Sequence[Mapping[str, Any]], traffic: Mapping[str, int]
) -> dict[str, Any]:
    inference = entry.get("inference")
    return {
        "device": entry["device"],
        "cut": entry["cut"],
        "samples": entry["samples"],
        "rounds": entry["rounds"],
        **_rate([r["devices"].get(entry["device"], {}).get("reported", {}) for r in history]),
        "exit_accuracy": entry.get("exit_accuracy"),
        "server_accuracy": entry.get("server_accuracy"),
        "exit_rate": _share(inference["exits"], inference["images"]) if inference else None,
        "bytes_up": _of_parties(traffic, "up", {entry["device"]}),
        "bytes_down": _of_parties(traffic, "down", {entry["device"], f"cut-{entry['cut']}", "all"}),
        "inference": None if inference is None else _with_rates(inference),
    }


def _rate(reports: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """What a device's reports say of its activations, together."""
    sent = [report for report in reports if report.get("activation_values")]
    values = sum(report["activation_values"] for report in sent)
    rounded = [report for report in sent if report["activation_levels"] is not None]
    weights = sum(report["activation_values"] for report in rounded)
    levels = sum(r["activation_levels"] * r["activation_values"] for r in rounded)
    return {
        "activation_bits": _share(8 * sum(r["activation_bytes"] for r in sent), values),
        "activation_levels": levels / weights if weights else None,
    }


def _with_rates(inference: Mapping[str, Any]) -> dict[str, Any]:
    images = inference["images"]
    return {
        **inference,
        "accuracy": _share(inference["correct"], images),
        "exit_rate": _share(inference["exits"], images),
    }


def _total(inferences: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The fleet as one; times are means per image answered and per image offloaded."""
    if not inferences:
        return None
    total: dict[str, Any] = {key: sum(i[key] for i in inferences) for key in _COUNTS}
    for key, weight in (("exit_ms", "images"), ("offload_ms", "offloads")):
        spent = sum((i[key] or 0.0) * i[weight] for i in inferences)
        total[key] = spent / total[weight] if total[weight] else 0.0
    return _with_rates(total)


def _by_cut(devices: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[int, list[Mapping[str, Any]]] = {}
    for device in devices:
        if device["inference"] is not None:
            found.setdefault(device["cut"], []).append(device["inference"])
    return {str(cut): _total(inferences) for cut, inferences in sorted(found.items())}


def _by_role(traffic: Mapping[str, int]) -> dict[str, int]:
    roles: Counter[str] = Counter()
    for key, size in traffic.items():
        direction, role, _ = key.split("/")
        roles[f"{direction}/{role}"] += size
    return dict(sorted(roles.items()))


def _sum(roles: Mapping[str, int], *, direction: str, purpose: str | None = None) -> int:
    parts = ((key.split("/"), size) for key, size in roles.items())
    return sum(
        size
        for (way, role), size in parts
        if way == direction and purpose in (None, PURPOSES.get(role, "control"))
    )


def _of_parties(traffic: Mapping[str, int], direction: str, parties: set[str]) -> int:
    parts = ((key.split("/"), size) for key, size in traffic.items())
    return sum(size for (way, _, party), size in parts if way == direction and party in parties)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
