"""What is written down of a run: its attempts, the history of its rounds, checkpoints, a result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from broker.training_messages import Report
from coordinator import orders
from coordinator.checkpoint import Checkpoint
from coordinator.evaluation import Evaluator
from coordinator.history import History
from coordinator.observer import Observer
from coordinator.published import Published
from coordinator.registry import Registry
from coordinator.results import device_results, round_scores
from coordinator.settings import CoordinatorSettings
from coordinator.traffic import TrafficLog
from coordinator.training import RoundInProgress


class Keeper(Protocol):
    """Where checkpoints go; ``coordinator.store.Store`` is the one on disk."""

    def announce(self, round_number: int, attempt: int) -> None: ...

    def announced(self) -> tuple[int, int]: ...

    def save(self, checkpoint: Checkpoint) -> None: ...

    def newest(self) -> tuple[int, float] | None: ...

    def save_result(self, result: dict[str, Any]) -> None: ...

    def result_version(self) -> int | None: ...


class RunRecords:
    """The books of the run ``name``, which go on from ``checkpoint``.

    ``traffic`` are the bytes of this life of the coordinator, by ``direction/role/device``.
    """

    def __init__(
        self,
        settings: CoordinatorSettings,
        name: str,
        checkpoint: Checkpoint,
        *,
        registry: Registry,
        evaluator: Evaluator | None,
        store: Keeper,
        observer: Observer,
        traffic: Callable[[], dict[str, int]],
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._name = name
        self._registry = registry
        self._evaluator = evaluator
        self._store = store
        self._observer = observer
        self._clock = clock
        self._tell_of_checkpoint()
        if checkpoint.history:
            observer.resumed(checkpoint.history[-1])
        self._history = History(name, checkpoint.history, recent=max(1, settings.staleness) + 1)
        self._traffic = TrafficLog(checkpoint.traffic, traffic)

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """Of closed rounds, oldest first."""
        return self._history.records

    def traffic(self) -> dict[str, int]:
        """Bytes over the whole run, by ``direction/role/device``."""
        return self._traffic.totals()

    # -- rounds -----------------------------------------------------------------------------------

    def last_round(self, closed: int) -> int:
        """The number to go on after, where ``closed`` is that of the checkpoint.

        An attempt announced before a crash is never announced again: its round gets a new one.
        """
        return max(closed, self._store.announced()[0] - 1)

    def begin_attempt(self, number: int) -> int:
        """The attempt at the round ``number`` that begins now, noted before anybody hears of it."""
        last_number, last_attempt = self._store.announced()
        attempt = last_attempt + 1 if last_number == number else 0
        self._store.announce(number, attempt)
        return attempt

    def begin_round(self) -> None:
        """A round opens; its devices have not reported yet."""
        self._history.begin()

    def report(self, device: str, report: Report, *, open_round: bool) -> None:
        """A device's own account of an attempt; ``open_round``: of the one that is running."""
        self._history.report(device, report, open_round=open_round)

    @property
    def unreported(self) -> bool:
        """Whether a device that finished the last round has not given its account of it."""
        return self._history.unreported

    def update(self, closed: RoundInProgress, device: str) -> None:
        """The record of a round that has closed keeps up with what its devices still do."""
        if device in closed.participants:
            self._history.update(closed.stamp, device, closed.entry(device))

    def close_round(
        self, closed: RoundInProgress, published: Published, deadline_s: float
    ) -> dict[str, Any]:
        """Enter the round that has been merged into what is published now; its record."""
        record = closed.record(self._clock())
        number = closed.stamp[1]
        record["round"], record["version"] = number, published.version
        record["learning_rate"] = orders.rate(self._settings, number)
        record["deadline_s"] = deadline_s
        record["bytes"] = self._traffic.since_mark()
        record |= round_scores(published, self._evaluator)
        self._history.close(record)
        return record

    def save(
        self,
        record: Mapping[str, Any],
        published: Published,
        *,
        policies: dict[str, Any],
        scheduler: dict[str, Any],
    ) -> None:
        """Write a checkpoint of the round with this record."""
        self._store.save(
            Checkpoint(
                version=published.version,
                round=record["round"],
                model=published.model,
                trained_cuts=sorted(published.trained),
                history=self._history.records,
                registry=self._registry.dump(),
                traffic=self._traffic.totals(),
                residual=published.residual,
                scheduler=scheduler,
                score=record.get("server_accuracy"),
                policies=policies,
            )
        )
        self._tell_of_checkpoint()

    # -- the end ----------------------------------------------------------------------------------

    def has_result(self, version: int) -> bool:
        """Whether the run ended with this version before."""
        return self._store.result_version() == version

    def save_result(self, number: int, published: Published) -> None:
        """Write what a run of ``number`` rounds came to."""
        self._store.save_result(
            {
                "run": self._name,
                "settings": self._settings.model_dump(mode="json"),
                "rounds": number,
                "version": published.version,
                "history": self._history.records,
                "traffic": self._traffic.totals(),
                "devices": device_results(
                    self._registry, published, self._evaluator, self._settings
                ),
            }
        )

    def _tell_of_checkpoint(self) -> None:
        newest = self._store.newest()
        if newest is not None:
            size, written = newest
            self._observer.checkpoint(size, written=written)
