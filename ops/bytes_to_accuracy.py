"""Bytes to reach an accuracy: what a run had moved, and trained on, when it was good enough."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ops.errors import SettingsWrong

SERVER = "server"
HELD = 2
"""Scored rounds in a row that must be good enough, so that one lucky round does not count."""


class Reached(NamedTuple):
    """A run up to and with the round in which it became good enough.

    ``bytes_up`` and ``bytes_down`` are all application payload over the coordinator's link, of
    abandoned rounds too; ``samples`` what was applied in the rounds that closed, ``seconds`` what
    those took.
    """

    round: int
    accuracy: float
    samples: int
    bytes_up: int
    bytes_down: int
    seconds: float


def bytes_to_accuracy(
    history: Sequence[Mapping[str, Any]],
    accuracy: float,
    *,
    of: str | int = SERVER,
    held: int = HELD,
) -> Reached | None:
    """The first round that reached ``accuracy`` (0 to 1) and, with those after it, held it.

    ``history`` is that of ``result.json``. ``of`` is ``"server"`` for the full network or a cut
    for its exit. ``held`` rounds in a row have to be good enough, the first included; rounds
    without a score do not count either way. None if that never happened: also if the run was good
    enough but ended before it had held it.

    Raises :class:`SettingsWrong` for an accuracy that is not a share, or ``held`` below 1.
    """
    if not 0 <= accuracy <= 1:
        raise SettingsWrong(f"accuracy = {accuracy}: it must be between 0 and 1")
    if held < 1:
        raise SettingsWrong(f"held = {held}: it must be at least 1")
    scored = [
        (index, score)
        for index, record in enumerate(history)
        if (score := _score(record, of)) is not None
    ]
    for position in range(len(scored) - held + 1):
        if all(score >= accuracy for _, score in scored[position : position + held]):
            index, score = scored[position]
            return _until(history[: index + 1], score)
    return None


def _score(record: Mapping[str, Any], of: str | int) -> float | None:
    if of == SERVER:
        score = record.get("server_accuracy")
    else:
        score = (record.get("exit_accuracy") or {}).get(str(of))
    return score if score is not None and math.isfinite(score) else None


def _until(records: Sequence[Mapping[str, Any]], score: float) -> Reached:
    moved = {
        direction: sum(
            size
            for record in records
            for key, size in record.get("bytes", {}).items()
            if key.split("/")[0] == direction
        )
        for direction in ("up", "down")
    }
    return Reached(
        round=records[-1]["round"],
        accuracy=score,
        samples=sum(
            device.get("samples", 0) for record in records for device in record["devices"].values()
        ),
        bytes_up=moved["up"],
        bytes_down=moved["down"],
        seconds=sum(record.get("seconds", 0.0) for record in records),
    )
