"""``splitfleet predict``: what is in these pictures? Answered by a model file, or by an agent."""

from __future__ import annotations

import json
import stat
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from edge_agent.answer_json import (
    PictureAnswer,
    PictureError,
    Predictions,
    class_name,
    top_classes,
)
from edge_agent.errors import InputError
from edge_agent.pictures import MAX_BYTES
from ops import bench_rows
from ops.errors import DataMissing
from ops.model_file import Model
from ops.units import milliseconds
from tensors.exit_rules import confidence, exits, softmax

_COLUMNS = ("file", "answer", "by", "confidence", "or else", "time")

Ask = Callable[[str, bytes], tuple[str, int, PictureAnswer]]
"""Name and content of a picture → run, version and its answer; raises :class:`InputError`."""


@dataclass(frozen=True, slots=True, eq=False)
class Local:
    """Answers pictures with a model file, all of it computed here.

    The exit at ``cut`` first, with ``threshold``; what it is not sure of, the rest of the network.
    Without a cut (no exit was trained) always the whole network, whose own confidence counts.
    """

    model: Model
    cut: int | None
    threshold: float
    top: int

    def __call__(self, name: str, data: bytes) -> tuple[str, int, PictureAnswer]:
        """See :data:`Ask`."""
        import torch

        card, network = self.model.card, self.model.network
        times = {"read": time.perf_counter()}
        image = torch.from_numpy(card.pictures.read(data)[None])
        by, sure = "network", None
        with torch.inference_mode():
            if self.cut is None:
                times["network"] = time.perf_counter()
                logits = network(image)
            else:
                times["exit"] = time.perf_counter()
                features = network(image, stop=self.cut)
                logits = network.exit(features, self.cut)
                sure = confidence(softmax(logits.numpy()), card.exit_rule)
                if exits(sure, self.threshold)[0]:
                    by = "exit"
                else:
                    times["network"] = time.perf_counter()
                    logits = network(features, start=self.cut)
        probabilities = softmax(logits.numpy())
        if sure is None:
            sure = confidence(probabilities, card.exit_rule)
        if not np.isfinite(probabilities).all():
            raise InputError("the network finds no probabilities for it: the model is of no use")
        best = top_classes(probabilities[0], card.classes, self.top)
        return (
            card.run,
            card.version,
            PictureAnswer(
                file=name,
                label=best[0].label,
                name=class_name(card.classes, best[0].label),
                by="exit" if by == "exit" else "network",
                confidence=float(sure[0]) if np.isfinite(sure[0]) else 0.0,
                top=best,
                milliseconds=_stages(times, time.perf_counter()),
            ),
        )


def _stages(began: dict[str, float], ended: float) -> dict[str, float]:
    """When each stage began → how long each took, and ``total``, in milliseconds."""
    ends = [*list(began.values())[1:], ended]
    found = {
        stage: round(1000 * (end - start), 3)
        for (stage, start), end in zip(began.items(), ends, strict=True)
    }
    return found | {"total": round(1000 * (ended - next(iter(began.values()))), 3)}


def predict(paths: Sequence[Path], ask: Ask, *, as_json: bool) -> None:
    """Answer pictures one by one and print a table, or JSON.

    Raises :class:`DataMissing` after everything is printed if a picture has no answer.
    """
    run, version = "", 0
    entries: list[PictureAnswer | PictureError] = []
    for path in paths:
        try:
            run, version, entry = ask(str(path), read_file(path))
            entries.append(entry)
        except InputError as exc:
            entries.append(PictureError(file=str(path), error=str(exc)))
    found = Predictions(run=run, version=version, predictions=entries)
    if as_json:
        print(json.dumps(found.model_dump(), indent=1))
    else:
        _show(found)
    failed = sum(isinstance(entry, PictureError) for entry in entries)
    if failed:
        raise DataMissing(f"{failed} of {len(entries)} pictures have no answer, see there")


def read_file(path: Path) -> bytes:
    """The content of a picture's file. Raises :class:`InputError`."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError("this is no file: name pictures, one by one")
        if status.st_size > MAX_BYTES:
            raise InputError(f"{status.st_size} bytes are too many: at most {MAX_BYTES} are taken")
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as exc:
        raise InputError(f"it cannot be read: {getattr(exc, 'strerror', None) or exc}") from exc


def _show(found: Predictions) -> None:
    answers = [entry for entry in found.predictions if isinstance(entry, PictureAnswer)]
    if answers:
        title = f"version {found.version} of {found.run}"
        bench_rows.show(title, _COLUMNS, [_cells(answer) for answer in answers], Console())
    for entry in found.predictions:
        if isinstance(entry, PictureError):
            print(f"{entry.file}: {entry.error}", file=sys.stderr)


def _cells(answer: PictureAnswer) -> list[str]:
    by = answer.by if answer.reason is None else f"{answer.by} ({answer.reason})"
    first, *others = [f"{one.name} {100 * one.probability:.1f}%" for one in answer.top]
    return [
        answer.file,
        first,
        by,
        f"{answer.confidence:.3f}",
        ", ".join(others),
        _times(answer.milliseconds.items()),
    ]


def _times(stages: Iterable[tuple[str, float]]) -> str:
    return ", ".join(f"{stage} {milliseconds(value)}" for stage, value in stages if value)
