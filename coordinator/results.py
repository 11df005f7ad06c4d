"""What a round and a run came to, for history and result."""

from __future__ import annotations

from typing import Any

from coordinator.evaluation import CutScores, Evaluator
from coordinator.published import Published
from coordinator.registry import Registry
from coordinator.settings import CoordinatorSettings


def round_scores(published: Published, evaluator: Evaluator | None) -> dict[str, Any]:
    """The published model on the held-out images; nothing without any."""
    if evaluator is None:
        return {}
    scores = evaluator.scores(published.model.state, sorted(published.trained))
    return {
        "server_accuracy": scores.server_accuracy,
        "server_loss": scores.server_loss,
        "exit_accuracy": {str(cut): value for cut, value in scores.exit_accuracy.items()},
    }


def device_results(
    registry: Registry,
    published: Published,
    evaluator: Evaluator | None,
    settings: CoordinatorSettings,
) -> list[dict[str, Any]]:
    """Each device's part in the run, by name, with the scores of its cut."""
    results = []
    by_cut: dict[int, CutScores] = {}
    for device in sorted(registry.devices.values(), key=lambda d: d.name):
        if device.hello is None or device.cut is None:
            continue
        entry: dict[str, Any] = {
            "device": device.name,
            "cut": device.cut,
            "samples": device.samples,
            "rounds": device.rounds,
            "inference": device.inference.model_dump() if device.inference else None,
        }
        if evaluator is not None and device.cut in published.trained:
            if device.cut not in by_cut:
                by_cut[device.cut] = evaluator.cut_scores(
                    published.model.state, device.cut, settings.codec, settings.exit_rule
                )
            scores = by_cut[device.cut]
            entry["exit_accuracy"] = scores.exit_accuracy
            entry["server_accuracy"] = scores.server_accuracy
            entry["exit_sweep"] = scores.sweep
        results.append(entry)
    return results
