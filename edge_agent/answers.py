"""What a device answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

By = Literal["exit", "server", "fallback"]


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a request of N images, of K classes.

    ``labels`` int64 (N,); ``probabilities`` float32 (N, K). ``by`` says for each image who gave
    them: the exit because it was sure, the server, or the exit as a fallback, for which ``reasons``
    has the reason (None for the others). ``confidence`` float64 (N,) is the exit's, in [0, 1].
    ``version`` of ``run`` are the parameters; ``seconds`` are those spent by stage: ``queue``,
    ``exit``, ``encode``, ``round_trip`` and ``total``.
    """

    labels: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    by: tuple[By, ...]
    confidence: NDArray[np.float64]
    reasons: tuple[str | None, ...]
    version: int
    run: str
    seconds: dict[str, float]
