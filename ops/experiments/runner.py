"""All trainings of an experiment, several at a time, each in a process of its own."""

from __future__ import annotations

import logging
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

from coordinator.errors import CoordinatorError
from ops import workers
from ops.errors import FleetFailed
from ops.experiments.one_run import Record, claim, is_finished, read_history, run_training
from ops.experiments.spec import Training
from ops.units import percent, seconds
from tensors.errors import TensorsError

log = logging.getLogger("splitfleet.experiment")


@dataclass(slots=True)
class Progress:
    """What has been trained in this call, and what is left of it."""

    left: int
    """Batches of all devices together."""
    clock: Callable[[], float] = time.monotonic
    done: int = 0
    _since: float = field(init=False)

    def __post_init__(self) -> None:
        self._since = self.clock()

    def note(self, batches: int) -> str:
        """So many more are done: the time that is left at the pace so far."""
        self.done += batches
        self.left -= batches
        if self.left <= 0:
            return "nothing left to train"
        pace = (self.clock() - self._since) / max(1, self.done)
        return f"about {seconds(pace * self.left)} left"


def folder_of(out: Path, training: Training) -> Path:
    """Where a training lives."""
    return out / "arms" / training.arm / f"seed-{training.seed}"


def run_all(
    trainings: Sequence[Training],
    out: Path,
    *,
    data_root: Path | None,
    jobs: int,
    batches: Callable[[Training], int],
    until: float | None,
    say: Callable[[str], None],
    finished: Callable[[], None],
) -> bool:
    """Train what is not finished yet, ``jobs`` at a time; whether all are now.

    ``batches`` are those of one round of a training. ``until`` is on ``time.monotonic()``: then
    each stops after its round. ``finished`` is called after each training that has come to its end.

    Raises what :func:`run_training` raises, and ``FleetFailed`` if a process dies. One that fails
    keeps none of the others from its end.
    """
    watched = {training: _Watched(folder_of(out, training)) for training in trainings}
    todo = [training for training, folder in watched.items() if not folder.finished]
    progress = Progress(sum((t.settings.rounds - watched[t].rounds) * batches(t) for t in todo))
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        min(jobs, len(todo)) or 1, context, _begin_worker, (out / "log.txt",)
    )

    def look() -> None:
        for index, training in enumerate(trainings, 1):
            for record in watched[training].news():
                left = progress.note(batches(training))
                say(f"{index}/{len(trainings)} {describe(training, record)}; {left}")

    ended, failed = list[bool](), list[str]()
    try:
        running: set[Future[bool]] = {
            pool.submit(
                _run, training, folder_of(out, training), data_root, until, first=index < jobs
            )
            for index, training in enumerate(todo)
        }
        while running:
            done, running = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            look()
            for future in done:
                try:
                    ended.append(future.result())
                except FleetFailed as exc:
                    failed.append(str(exc))
                    log.error("%s", exc)  # noqa: TRY400 the message says it all
                finished()
    except BrokenProcessPool:
        raise FleetFailed(
            "a process died, maybe for lack of memory; start again, with fewer --jobs if need be: "
            f"every training goes on from its last round in {out}"
        ) from None
    finally:
        workers.end_now(pool)
    if failed:
        raise FleetFailed("; ".join(failed))
    return all(ended)


def require_same(trainings: Sequence[Training], out: Path) -> None:
    """Raise ``SettingsWrong`` if ``out`` holds other trainings where these belong."""
    for training in trainings:
        folder = folder_of(out, training)
        if (folder / "training.json").exists():
            claim(training, folder)


def describe(training: Training, record: Record) -> str:
    """A round in one line."""
    line = f"{training.arm} seed {training.seed} round {record['round']}/{training.settings.rounds}"
    if "full" not in record:
        return line
    exits = " ".join(f"{cut}:{percent(value)}" for cut, value in record["exits"].items())
    return f"{line}: full network {percent(record['full'])}, exits {exits}"


class _Watched:
    """A training's folder, as another process fills it."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "history.json"
        self._changed = 0
        self.finished = is_finished(folder)
        self.rounds = 0
        self.rounds = len(self.news())

    def news(self) -> list[Record]:
        """The rounds that were closed since it was last asked."""
        try:
            changed = self._file.stat().st_mtime_ns
        except OSError:
            return []
        if changed == self._changed:
            return []
        self._changed = changed
        records = read_history(self._file.parent)
        new = records[self.rounds :]
        self.rounds = len(records)
        return new


def _begin_worker(log_file: Path) -> None:
    workers.begin()
    logging.basicConfig(
        filename=log_file,
        level=logging.INFO,
        format="%(asctime)s %(process)d %(levelname).1s %(name)s: %(message)s",
    )


def _run(
    training: Training,
    folder: Path,
    data_root: Path | None,
    until: float | None,
    *,
    first: bool,
) -> bool:
    """Whether the training has come to its end. The ``first`` ones get on by a round at least."""

    def over() -> bool:
        return until is not None and time.monotonic() >= until

    def tell(record: Record) -> None:
        log.info("%s", describe(training, record))

    if over() and not first:
        return False
    try:
        result = run_training(
            training, folder, data_root=data_root, told=tell, stop=over, must_advance=first
        )
    except (CoordinatorError, TensorsError) as exc:
        raise FleetFailed(f"{training.arm} seed {training.seed}: {exc}") from exc
    return result is not None
