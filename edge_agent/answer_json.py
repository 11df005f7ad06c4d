"""An answer to pictures as JSON: what the HTTP API sends and ``splitfleet predict`` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from edge_agent.answers import Answer

MAX_TOP = 100
Share = Annotated[float, Field(ge=0, le=1)]


class ClassProbability(BaseModel):
    """A class and how likely it is."""

    model_config = ConfigDict(frozen=True)

    label: int
    name: str
    probability: Share


class PictureAnswer(BaseModel):
    """The answer to one picture."""

    model_config = ConfigDict(frozen=True)

    file: str
    label: int
    name: str
    """Of the class; its number where classes have no names."""
    by: Literal["exit", "server", "fallback", "network"]
    """exit: the device was sure. server: the device asked. fallback: it wanted to ask and could
    not, the answer is the exit's. network: the whole network was computed in one place."""
    reason: str | None = None
    """Of a fallback: timeout, offline, budget, latency, busy, superseded, refused:REASON."""
    confidence: Share
    """Of the exit."""
    top: list[ClassProbability]
    """The most likely classes, the first of them is ``label``."""
    milliseconds: dict[str, float]
    """By stage; pictures of one request go through them together."""


class PictureError(BaseModel):
    """Why one picture has no answer."""

    model_config = ConfigDict(frozen=True)

    file: str
    error: str


class Predictions(BaseModel):
    """The answers to a request, in its order, and the parameters they were made with."""

    model_config = ConfigDict(frozen=True)

    run: str
    version: int
    predictions: list[PictureAnswer | PictureError]


class Problem(BaseModel):
    """Why a request was refused as a whole, and what to do."""

    model_config = ConfigDict(frozen=True)

    error: str


class HealthReport(BaseModel):
    """Whether a device can answer, and with what."""

    model_config = ConfigDict(frozen=True)

    ready: bool
    """There are trained parameters to answer with."""
    run: str | None = None
    version: int | None = None
    cut: int | None = None
    online: bool = False
    """The coordinator is asked when the exit is unsure."""
    waiting: int = 0
    """Images that nobody has looked at yet."""
    asked: int = 0
    """Images the coordinator is being asked about."""
    threshold: float | None = None
    """What the coordinator gave."""
    threshold_in_force: float | None = None
    """What is used: tighter than that where the audited answers have drifted."""


def class_name(classes: Sequence[str], label: int) -> str:
    """The name of a class; its number if it has none."""
    return classes[label] if label < len(classes) else str(label)


def top_classes(
    probabilities: NDArray[np.floating], classes: Sequence[str], top: int
) -> list[ClassProbability]:
    """The ``top`` most likely classes of one picture (K,), the first of equals first."""
    order = np.argsort(-probabilities, kind="stable")[:top]
    return [
        ClassProbability(
            label=int(label),
            name=class_name(classes, int(label)),
            probability=min(1.0, max(0.0, float(probabilities[label]))),
        )
        for label in order
    ]


def picture_answers(
    answer: Answer, files: Sequence[str], classes: Sequence[str], top: int
) -> list[PictureAnswer]:
    """An :class:`Answer` to these pictures, one entry for each."""
    milliseconds = {stage: round(1000 * seconds, 3) for stage, seconds in answer.seconds.items()}
    return [
        PictureAnswer(
            file=file,
            label=int(answer.labels[row]),
            name=class_name(classes, int(answer.labels[row])),
            by=answer.by[row],
            reason=answer.reasons[row],
            confidence=min(1.0, max(0.0, float(answer.confidence[row]))),
            top=top_classes(answer.probabilities[row], classes, top),
            milliseconds=milliseconds,
        )
        for row, file in enumerate(files)
    ]
