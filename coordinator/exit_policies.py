"""Which threshold every exit gets after a round, and what it should come to.

The mathematics is in ``tensors.calibration``; here it is asked with held-out images.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from broker.serving_messages import CutPolicy
from tensors.calibration import (
    ANSWER_ALL,
    OFFLOAD_ALL,
    Choice,
    for_accuracy,
    for_offload_rate,
    offload_curve,
    share_interval,
    top_answers,
)
from tensors.exit_rules import ExitRule, confidence, exits

if TYPE_CHECKING:
    from coordinator.evaluation import CutAnswers, Evaluator
    from coordinator.settings import CoordinatorSettings
    from tensors.networks import State

log = logging.getLogger("splitfleet.coordinator")

Kind = Literal["threshold", "accuracy", "offload"]
Policies = Mapping[int, CutPolicy]


@dataclass(frozen=True, slots=True)
class ExitPolicy:
    """What thresholds are chosen for.

    ``threshold``: for nothing, it is given. ``accuracy``: the fewest offloads with an accuracy of
    ``wanted`` of device and server together. ``offload``: at most a share ``wanted`` offloaded.
    """

    kind: Kind
    wanted: float = 0.0


def parse_exit_policy(text: str) -> ExitPolicy:
    """``threshold``, ``accuracy:0.9`` or ``offload:0.2``. Raises ``ValueError`` for another."""
    kind, separator, value = text.partition(":")
    if kind == "threshold" and not separator:
        return ExitPolicy("threshold")
    if kind in get_args(Kind)[1:]:
        try:
            wanted = float(value)
        except ValueError:
            wanted = -1.0
        if 0 <= wanted <= 1:
            return ExitPolicy(kind, wanted)  # type: ignore[arg-type]
    raise ValueError(
        f"{text!r} is no exit policy: write threshold, accuracy:SHARE or offload:SHARE, "
        "with a share from 0 to 1"
    )


def clamped(threshold: float) -> float:
    """A threshold that does the same and lies where confidences can."""
    return min(OFFLOAD_ALL, max(ANSWER_ALL, threshold))


def calibrate(
    answers: CutAnswers,
    labels: np.ndarray,
    *,
    policy: ExitPolicy,
    threshold: float,
    rule: ExitRule,
) -> CutPolicy:
    """The policy of a cut, from what exit and server answer (N, K) for images with ``labels`` (N,).

    What is wanted and cannot be had gets the nearest to it.
    """
    server = top_answers(answers.server)
    curve = offload_curve(answers.exit, server, labels, rule)
    choice: Choice
    match policy.kind:
        case "threshold":
            choice = curve.choice(curve.index(threshold))
            threshold = clamped(threshold)
        case "accuracy":
            choice = for_accuracy(curve, policy.wanted)
            threshold = choice.threshold
        case "offload":
            choice = for_offload_rate(curve, policy.wanted)
            threshold = choice.threshold
    sure = exits(confidence(answers.exit, rule), threshold)
    same = top_answers(answers.exit)[sure] == server[sure]
    promised = share_interval(int(same.sum()), len(same))[0] if len(same) else None
    return CutPolicy(
        threshold=threshold,
        agreement=promised,
        accuracy=choice.accuracy,
        offload_rate=choice.offload_rate,
    )


def policies_of(
    settings: CoordinatorSettings,
    evaluator: Evaluator | None,
    state: State,
    trained: Iterable[int],
) -> dict[int, CutPolicy]:
    """The policies of all cuts that are ``trained``; without held-out images the threshold alone.

    Takes a forward pass over at most ``calibration_images`` images for each cut.
    """
    cuts = sorted(trained)
    if evaluator is None or not settings.calibration_images:
        return {cut: CutPolicy(threshold=clamped(settings.threshold)) for cut in cuts}
    policy, found = parse_exit_policy(settings.exit_policy), {}
    for cut in cuts:
        rows = evaluator.sample(settings.calibration_images)
        seen = evaluator.cut_answers(state, cut, settings.codec, rows=rows)
        found[cut] = calibrate(
            seen,
            evaluator.labels[rows],
            policy=policy,
            threshold=settings.threshold,
            rule=settings.exit_rule,
        )
    return found


# -- in a checkpoint ------------------------------------------------------------------------------


def dump(settings: CoordinatorSettings, policies: Policies) -> dict[str, Any]:
    """For a checkpoint."""
    cuts = {str(cut): policy.model_dump() for cut, policy in sorted(policies.items())}
    return {"basis": basis(settings), "cuts": cuts}


def restore(
    settings: CoordinatorSettings, dumped: Mapping[str, Any], trained: Iterable[int]
) -> tuple[dict[int, CutPolicy], bool]:
    """What a checkpoint has for its ``trained`` cuts, and whether it was made with these settings.

    If not, only thresholds are left of it: those of the settings, or, where they are to be chosen,
    those that were.
    """
    cuts = sorted(trained)
    try:
        stored = {int(cut): CutPolicy(**fields) for cut, fields in dumped["cuts"].items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        stored = {}
    if dumped.get("basis") == basis(settings) and stored.keys() == set(cuts):
        return stored, True
    default = CutPolicy(threshold=clamped(settings.threshold))
    if settings.exit_policy == "threshold":
        return dict.fromkeys(cuts, default), False
    return {cut: CutPolicy(threshold=stored.get(cut, default).threshold) for cut in cuts}, False


def basis(settings: CoordinatorSettings) -> dict[str, Any]:
    """The settings that policies depend on."""
    keys = {"exit_policy", "exit_rule", "threshold", "codec", "dataset", "calibration_images"}
    return settings.model_dump(mode="json", include=keys)
