"""How far a run is: bars on a terminal, lines elsewhere or in the log, nothing if quiet."""

# ruff: noqa: ARG002 (an observer is told more than it needs)

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import IO, Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
)
from rich.table import Column

from coordinator.observer import Observer

log = logging.getLogger("splitfleet.progress")

SMOOTHING = 0.9


class Silence(Observer):
    """Shows nothing. The others are used the same way: ``with`` around the run."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Nothing to put away."""


class Lines(Silence):
    """One plain line per round that ended, for ``say`` to take somewhere."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._rounds = 0

    def round_opened(self, number: int, rounds: int, attempt: int, quota: int) -> None:
        self._rounds = rounds

    def round_ended(self, number: int, outcome: str, record: dict[str, object]) -> None:
        what = describe(record) if outcome == "closed" else outcome
        self._say(f"round {number}/{self._rounds}: {what}")


class Bars(Silence):
    """Two bars: the rounds, and the batches of this round with speed and losses by cut."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn(
                "{task.fields[note]}",
                style="dim",
                table_column=Column(no_wrap=True, overflow="ellipsis"),
            ),
            console=console,
        )
        self._losses: dict[int, float] = {}
        self._samples = 0
        self._opened = 0.0
        self._answered = 0
        self._rounds: TaskID = self._progress.add_task("waiting for devices", total=None, note="")
        self._batches: TaskID = self._progress.add_task("", total=None, note="", visible=False)
        self._borrowed: list[tuple[logging.StreamHandler[Any], Any]] = []

    def __enter__(self) -> Self:
        before = sys.stderr
        self._progress.start()
        # A handler made earlier writes past the bars and tears them; rich's stand-in does not.
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is before:
                handler.setStream(sys.stderr)
                self._borrowed.append((handler, before))
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()
        for handler, stream in self._borrowed:
            handler.setStream(stream)
        self._borrowed.clear()

    def devices(self, by_state: dict[str, int]) -> None:
        if self._progress.tasks[self._rounds].total is None:
            online = sum(by_state.values()) - by_state.get("offline", 0)
            self._progress.update(self._rounds, note=f"{online} online")

    def round_opened(self, number: int, rounds: int, attempt: int, quota: int) -> None:
        self._samples, self._opened = 0, self._clock()
        self._losses.clear()
        self._progress.update(
            self._rounds, description="rounds", total=rounds, completed=number - 1
        )
        again = f", attempt {attempt + 1}" if attempt else ""
        self._progress.update(
            self._batches,
            description=f"round {number}{again}",
            total=quota,
            completed=0,
            note="",
            visible=True,
        )

    def batch_applied(self, cut: int, images: int, loss: float | None, seconds: float) -> None:
        self._samples += images
        if loss is not None:
            smooth = self._losses.get(cut, loss)
            self._losses[cut] = SMOOTHING * smooth + (1 - SMOOTHING) * loss
        elapsed = max(1e-9, self._clock() - self._opened)
        losses = " ".join(f"{c}:{value:.2f}" for c, value in sorted(self._losses.items()))
        by_cut = f", loss by cut {losses}" if losses else ""
        self._progress.update(
            self._batches,
            advance=1,
            note=f"{self._samples / elapsed:,.0f} samples/s{by_cut}",
        )

    def round_ended(self, number: int, outcome: str, record: dict[str, object]) -> None:
        if outcome == "extended":
            return
        note = describe(record) if outcome == "closed" else f"round {number} {outcome}"
        self._progress.update(self._rounds, completed=number, note=note)

    def phase(self, phase: str) -> None:
        if phase in ("inference", "finished"):
            self._progress.update(self._batches, visible=False)
        if phase == "inference":
            self._progress.update(self._rounds, description="devices answer test images")

    def features_answered(self, cut: int, images: int, refused: str | None) -> None:
        self._answered += images
        self._progress.update(self._rounds, note=f"{self._answered:,} images offloaded")


def progress_observer(
    *,
    quiet: bool = False,
    logged: bool = False,
    file: IO[str] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Silence:
    """What suits ``file`` (standard error if not given): bars on a terminal, else lines.

    If it shall be ``logged``, lines of the log.
    """
    if quiet:
        return Silence()
    if logged:
        return Lines(partial(log.info, "%s"))
    console = Console(file=sys.stderr if file is None else file)
    if console.is_terminal:
        return Bars(console, clock)
    return Lines(partial(print, file=console.file, flush=True))


def describe(record: dict[str, object]) -> str:
    """A closed round in one line."""
    parts = []
    if isinstance(record.get("server_accuracy"), float):
        parts.append(f"full network {record['server_accuracy']:.1%}")
    exits = record.get("exit_accuracy")
    if isinstance(exits, dict) and exits:
        parts.append("exits " + " ".join(f"{cut}:{value:.1%}" for cut, value in exits.items()))
    devices, seconds = record.get("devices"), record.get("seconds")
    if isinstance(devices, dict) and isinstance(seconds, float):
        samples = sum(device["samples"] for device in devices.values())
        parts.append(f"{samples / max(1e-9, seconds):,.0f} samples/s")
        parts.append(f"{seconds:.0f} s")
    return ", ".join(parts)
