"""When a device's early exit answers by itself.

One rule everywhere: a sample exits iff its confidence is above the threshold τ; a tie offloads.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tensors.errors import ExitRuleError

Float64s = npt.NDArray[np.float64]
ExitRule = Literal["entropy", "max_softmax", "margin"]


def softmax(logits: npt.ArrayLike) -> Float64s:
    """Softmax over the last dimension, in float64, safe for logits of any finite size."""
    values = np.asarray(logits, np.float64)
    exponentials = np.exp(values - values.max(axis=-1, keepdims=True))
    normalised: Float64s = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return normalised


def confidence(probabilities: npt.NDArray[Any], rule: ExitRule = "entropy") -> Float64s:
    """Confidence in [0, 1] of each row of class probabilities, (N, K) floats to (N,) float64.

    0 is a uniform row, 1 a row with all its mass on one class:

    - `entropy`: 1 − H(p) / ln K (Hetero-SplitEE, arXiv 2512.09313)
    - `max_softmax`: (max p − 1/K) / (1 − 1/K)
    - `margin`: the largest probability minus the second largest (0 for any tie at the top)

    A row with NaN has confidence NaN, which no threshold lets exit.
    Raises ExitRuleError for an unknown rule or fewer than two classes.
    """
    p = np.asarray(probabilities, np.float64)
    if p.ndim != 2 or p.shape[1] < 2:
        raise ExitRuleError(f"probabilities of shape {p.shape}: must be (N, K) with K >= 2")
    classes = p.shape[1]
    match rule:
        case "entropy":
            logs = np.log(p, out=np.zeros_like(p), where=p > 0)
            # A zero's logarithm stays 0, and so does the product; a NaN stays NaN.
            c = 1.0 + (p * logs).sum(axis=1) / math.log(classes)
        case "max_softmax":
            c = (p.max(axis=1) - 1.0 / classes) / (1.0 - 1.0 / classes)
        case "margin":
            top = np.partition(p, classes - 2, axis=1)
            c = top[:, -1] - top[:, -2]
        case _:
            raise ExitRuleError(f"unknown exit rule {rule!r}: write entropy, max_softmax or margin")
    clipped: Float64s = np.clip(c, 0.0, 1.0)
    return clipped


def exits(confidence: npt.ArrayLike, threshold: float) -> npt.NDArray[np.bool_]:
    """Which samples exit: confidence > threshold, elementwise; ties and NaN offload."""
    return np.asarray(np.asarray(confidence) > threshold)
