"""Thresholds of early exits: chosen on one part of the held-out images, judged on the other.

:func:`judge_exits` does it for any model; ``splitfleet exits`` for that of a coordinator's folder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from coordinator.evaluation import CutAnswers, Evaluator
from tensors.calibration import (
    Choice,
    Curve,
    for_accuracy,
    for_offload_rate,
    offload_curve,
    share_interval,
    top_answers,
)
from tensors.datasets import Dataset
from tensors.errors import DataError
from tensors.exit_rules import ExitRule, confidence, exits
from tensors.networks import NetworkSpec, State, build_network
from tensors.privacy import GaussianMechanism
from tensors.probabilities import (
    apply_temperature,
    calibration_error,
    ensemble,
    fit_ensemble,
    fit_temperature,
)
from tensors.training import Compute

Share = Annotated[float, Field(ge=0, le=1)]
Open = Annotated[float, Field(gt=0, lt=1)]
Row = dict[str, Any]
Rows = npt.NDArray[np.int64]


class ExitSettings(BaseModel):
    """What thresholds are calibrated to, and on which part of the images."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    accuracy: Share | None = None
    """Wanted of device and server together."""
    offload: Share | None = None
    """Wanted share of images that the server is asked for."""
    loss: Share = 0.01
    """Where neither is wanted: the accuracy may be so much below that of always asking."""
    level: Open | None = None
    """The probability, e.g. 0.95, with which what is wanted shall hold for all images, not only
    for those calibrated on."""
    rule: ExitRule = "entropy"
    calibration_share: Open = 0.5
    """Of the held-out images; the rest judges."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Of the split into both."""

    @model_validator(mode="after")
    def _check_wanted(self) -> Self:
        if self.accuracy is not None and self.offload is not None:
            raise ValueError("accuracy and offload exclude each other: give one of them")
        if self.level is not None and self.accuracy is None and self.offload is None:
            raise ValueError("level makes a promise of accuracy or offload: give one of them too")
        return self


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """A cut's row in the table, and its curve over the test part."""

    row: Row
    curve: Curve


def judge_exits(
    state: State,
    spec: NetworkSpec,
    cuts: Sequence[int],
    dataset: Dataset,
    codec: str,
    *,
    settings: ExitSettings | None = None,
    compute: Compute | None = None,
    mechanism: GaussianMechanism | None = None,
) -> list[Judged]:
    """For each cut its threshold, what that does to images it was not chosen on, and the curve.

    ``state`` holds every block and exit head of the network ``spec``; ``dataset`` are held-out
    images, ``codec`` is that of activations, and ``mechanism`` the noise on them. In a row
    accuracies and rates are shares, 0 to 1:

    - ``wanted`` (accuracy, offload), ``wanted_value``, ``level``; ``reached``, whether on the
      calibration part; ``calibration_offload_rate`` and ``calibration_accuracy`` there
    - ``threshold``, and on the test part ``offload_rate``, ``accuracy``, ``accuracy_low`` and
      ``accuracy_high`` (exact 95 % interval), ``exit_accuracy`` and ``server_accuracy`` (alone)
    - ``ece`` and ``ece_equal_mass`` of the exit, ``temperature``, and both with it (``_scaled``)
    - ``ensemble_weight`` of the exit in what is offloaded, ``ensemble_accuracy`` and
      ``ensemble_gain`` ± ``ensemble_gain_half`` (paired 95 % interval)

    Raises ``NetworkError``, ``CodecError``, ``ExitRuleError``; ``DataError`` for too few images.
    """
    settings = settings or ExitSettings()
    first, second = _split(len(dataset), settings)
    evaluator = Evaluator(
        build_network(spec), compute or Compute("cpu"), dataset, mechanism=mechanism
    )
    return [
        _judge(
            cut, evaluator.cut_answers(state, cut, codec), dataset.labels, (first, second), settings
        )
        for cut in cuts
    ]


def _split(images: int, settings: ExitSettings) -> tuple[Rows, Rows]:
    order = np.random.default_rng(settings.seed).permutation(images)
    first = round(settings.calibration_share * images)
    if not 0 < first < images:
        raise DataError(
            f"{images} held-out images cannot be split into a part of {first} to calibrate on and "
            "one to judge by: take more images, or another calibration_share"
        )
    return np.sort(order[:first]), np.sort(order[first:])


def _judge(
    cut: int,
    seen: CutAnswers,
    labels: npt.NDArray[np.int64],
    parts: tuple[Rows, Rows],
    settings: ExitSettings,
) -> Judged:
    server = top_answers(seen.server)
    fit, test = (
        offload_curve(seen.exit[part], server[part], labels[part], settings.rule) for part in parts
    )
    first, second = parts
    wanted, value, choice = _choose(fit, settings)
    outcome = test.choice(test.index(choice.threshold))
    low, high = share_interval(outcome.correct, outcome.samples)
    temperature = fit_temperature(seen.exit[first], labels[first])
    scaled = apply_temperature(seen.exit[second], temperature)
    errors = {
        f"{name}{suffix}": calibration_error(p, labels[second], equal_mass=name != "ece")
        for suffix, p in (("", seen.exit[second]), ("_scaled", scaled))
        for name in ("ece", "ece_equal_mass")
    }
    return Judged(
        {
            "cut": cut,
            "rule": settings.rule,
            "calibration_images": len(first),
            "test_images": len(second),
            "wanted": wanted,
            "wanted_value": value,
            "level": settings.level,
            "reached": choice.reached,
            "calibration_offload_rate": choice.offload_rate,
            "calibration_accuracy": choice.accuracy,
            "threshold": choice.threshold,
            "offload_rate": outcome.offload_rate,
            "accuracy": outcome.accuracy,
            "accuracy_low": low,
            "accuracy_high": high,
            "exit_accuracy": float((top_answers(seen.exit) == labels)[second].mean()),
            "server_accuracy": float((server == labels)[second].mean()),
            "temperature": temperature,
            **errors,
            **_ensemble(seen, labels, parts, choice.threshold, settings.rule, outcome.accuracy),
        },
        test,
    )


def _choose(
    curve: Curve, settings: ExitSettings
) -> tuple[Literal["accuracy", "offload"], float, Choice]:
    if settings.offload is not None:
        chosen = for_offload_rate(curve, settings.offload, level=settings.level)
        return "offload", settings.offload, chosen
    wanted = settings.accuracy
    if wanted is None:
        wanted = max(0.0, float(curve.accuracy[0]) - settings.loss)
    return "accuracy", wanted, for_accuracy(curve, wanted, level=settings.level)


def _ensemble(
    seen: CutAnswers,
    labels: npt.NDArray[np.int64],
    parts: tuple[Rows, Rows],
    threshold: float,
    rule: ExitRule,
    accuracy: float,
) -> Row:
    """What the exit's answer adds to the server's where the server is asked."""
    asked = ~exits(confidence(seen.exit, rule), threshold)
    first, second = (part[asked[part]] for part in parts)
    weight = fit_ensemble(seen.exit[first], seen.server[first], labels[first])
    mixed = top_answers(ensemble(seen.exit[second], seen.server[second], weight))
    images = len(parts[1])
    changes = np.zeros(images)
    changes[: len(second)] = (mixed == labels[second]).astype(np.int64) - (
        top_answers(seen.server[second]) == labels[second]
    )
    gain = float(changes.mean())
    return {
        "ensemble_weight": weight,
        "ensemble_accuracy": accuracy + gain,
        "ensemble_gain": gain,
        "ensemble_gain_half": 1.96 * float(changes.std()) / math.sqrt(images),
    }
