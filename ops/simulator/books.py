"""The books of a simulated run: what devices, coordinator and model say of every batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from broker.training_messages import Report
from coordinator.checkpoint import Checkpoint
from coordinator.observer import Observer
from coordinator.settings import CoordinatorSettings
from ops.simulator.stub import APPLIED
from ops.simulator.stub_server import Witness

Attempt = tuple[int, int]
"""Round and attempt."""


class Witnesses(Observer):
    """Sees what the engines apply, and which attempt each engine belongs to.

    ``diverges`` says at which batches (device, position) the server's loss is not finite.
    """

    def __init__(self) -> None:
        self.applied: dict[Attempt, Counter[tuple[str, int]]] = {}
        """(device, position) → how often, by attempt."""
        self.diverging: set[tuple[str, int]] = set()
        self.outcomes: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.discarded: Counter[str] = Counter()
        self.late: Counter[str] = Counter()
        """Samples of late contributions, by what became of them."""
        self.work_changes = 0
        self._latest: Counter[tuple[str, int]] = Counter()

    def new(self) -> Witness:
        """The witness of the next engine."""
        seen = self._latest = Counter()

        def witness(device: str, position: int) -> bool:
            if (device, position) in self.diverging:
                return False
            seen[device, position] += 1
            return True

        return witness

    def round_opened(self, number: int, rounds: int, attempt: int, quota: int) -> None:
        """The engine made last is this attempt's."""
        del rounds, quota
        self.applied[number, attempt] = self._latest

    def round_ended(self, number: int, outcome: str, record: dict[str, object]) -> None:
        """Count it."""
        del number, record
        self.outcomes[outcome] += 1

    def message_dropped(self, reason: str) -> None:
        """Count it."""
        self.dropped[reason] += 1

    def batch_discarded(self, reason: str) -> None:
        """Count it."""
        self.discarded[reason] += 1

    def late_work(self, outcome: str, samples: int) -> None:
        """Count it."""
        self.late[outcome] += samples

    def work_changed(self, device: str, cut: int, share: float) -> None:
        """Count it."""
        del device, cut, share
        self.work_changes += 1

    def by_device(self, attempt: Attempt) -> Counter[str]:
        """How many batches of each device were applied in an attempt."""
        count: Counter[str] = Counter()
        for (device, _), times in self.applied.get(attempt, {}).items():
            count[device] += times
        return count


@dataclass(slots=True)
class Books:
    """What became of every batch. ``problems`` are sentences; none is as it should be."""

    rounds: int
    coordinator: dict[Attempt, dict[str, dict[str, Any]]]
    """The coordinator's account of each device in each round that closed."""
    devices: dict[tuple[str, Attempt], Report]
    """The last report of each device on each attempt, whether it arrived or not."""
    applied: int
    """Batches that engines were trained on, abandoned attempts included."""
    in_model: int
    """Batches that the last model contains, as it counts itself (stubs only)."""
    problems: list[str] = field(default_factory=list)

    def totals(self) -> dict[str, Any]:
        """Sums of the coordinator's accounts."""
        discarded: Counter[str] = Counter()
        total = Counter({"produced": 0, "applied": 0, "expired": 0})
        for accounts in self.coordinator.values():
            for account in accounts.values():
                discarded.update(account["discarded"])
                total.update({key: account[key] for key in ("produced", "applied", "expired")})
        return {**total, "discarded": dict(sorted(discarded.items()))}

    def check(self) -> None:
        """Raise ``AssertionError`` with everything that is wrong."""
        assert not self.problems, "\n".join(self.problems)


def balanced(account: Mapping[str, Any]) -> bool:
    """Whether produced = applied + Σ discarded + expired, and none is negative."""
    parts = (account["applied"], *account["discarded"].values(), account["expired"])
    return bool(account["produced"] == sum(parts) and min(parts) >= 0)


def audit(
    checkpoint: Checkpoint,
    reports: Mapping[tuple[str, Attempt], Report],
    witnesses: Witnesses,
    *,
    stub: CoordinatorSettings | None,
) -> Books:
    """Compare what everybody says; ``stub`` are the settings of a fleet that only counts."""
    accounts = {
        (int(record["round"]), int(record["attempt"])): {
            name: entry["account"] for name, entry in record["devices"].items()
        }
        for record in checkpoint.history
    }
    state = checkpoint.model.state
    books = Books(
        rounds=checkpoint.round,
        coordinator=accounts,
        devices=dict(reports),
        applied=sum(sum(seen.values()) for seen in witnesses.applied.values()),
        in_model=int(state[APPLIED]) if stub is not None else 0,
    )
    books.problems = [
        *(f"not finite: {name}" for name, values in state.items() if not np.isfinite(values).all()),
        *_twice(witnesses),
        *_of_devices(books),
        *_of_coordinator(books, witnesses if stub is not None else None),
    ]
    if stub is not None:
        expected = folded_batches(checkpoint, witnesses, stub)
        if books.in_model != expected:
            books.problems.append(f"the model counts {books.in_model} batches, not {expected}")
    return books


def _twice(witnesses: Witnesses) -> Iterator[str]:
    for attempt, seen in witnesses.applied.items():
        for (device, position), times in seen.items():
            if times > 1:
                yield f"round {attempt}: {position} of {device} was applied {times} times"


def _of_devices(books: Books) -> Iterator[str]:
    for (device, attempt), report in books.devices.items():
        account = report.model_dump()
        if not balanced(account):
            yield f"round {attempt}: {device} does not balance: {account}"
        known = books.coordinator.get(attempt, {}).get(device)
        if known is not None and report.applied > known["applied"]:
            yield (
                f"round {attempt}: {device} says {report.applied} applied, "
                f"the coordinator {known['applied']}"
            )


def _of_coordinator(books: Books, witnesses: Witnesses | None) -> Iterator[str]:
    for attempt, devices in books.coordinator.items():
        seen = witnesses.by_device(attempt) if witnesses is not None else None
        for device, account in devices.items():
            if not balanced(account):
                yield f"round {attempt}: {device} does not balance at the coordinator: {account}"
            if seen is not None and seen[device] != account["applied"]:
                yield (
                    f"round {attempt}: {device} has {account['applied']} applied in the books, "
                    f"{seen[device]} in the engine"
                )


def folded_batches(
    checkpoint: Checkpoint, witnesses: Witnesses, settings: CoordinatorSettings
) -> int:
    """How many batches the model must contain: all whose work was folded in, each once."""
    if settings.strategy == "averaging":
        return int(sum(device["samples"] for device in checkpoint.registry)) // settings.batch_size
    closed = [(int(record["round"]), int(record["attempt"])) for record in checkpoint.history]
    return sum(sum(witnesses.applied[attempt].values()) for attempt in closed)
