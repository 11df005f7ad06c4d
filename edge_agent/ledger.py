"""What a device knows of its batches in one attempt: every number ends in exactly one account."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from broker.training_messages import Receipt, from_ranges


@dataclass(frozen=True, slots=True)
class Account:
    """``produced = applied + Σ discarded + expired``; batches."""

    produced: int
    applied: int
    discarded: Mapping[str, int]
    expired: int


class Ledger:
    """Batch numbers ``0 … produced-1`` and what the coordinator said became of them."""

    def __init__(self, *, limit: int, produced: int = 0) -> None:
        self._limit = limit
        self._applied: set[int] = set()
        self._discarded: dict[int, str] = {}
        self.produced = produced

    def produce(self) -> int:
        """The next batch number."""
        self.produced += 1
        return self.produced - 1

    def applied(self, batches: Iterable[int]) -> None:
        """The coordinator trained on these; a number never produced here is ignored."""
        for batch in batches:
            if 0 <= batch < self.produced:
                self._applied.add(batch)
                self._discarded.pop(batch, None)

    def discarded(self, batches: Iterable[int], reason: str) -> None:
        """These were refused; what was applied stays applied."""
        for batch in batches:
            if 0 <= batch < self.produced and batch not in self._applied:
                self._discarded[batch] = reason

    def settle(self, receipt: Receipt) -> set[int]:
        """Enter a receipt; the numbers it names. Raises ``MessageError`` for implausible ranges."""
        named = from_ranges(receipt.applied, limit=self._limit)
        self.applied(named)
        for reason, ranges in receipt.discarded.items():
            refused = from_ranges(ranges, limit=self._limit)
            self.discarded(refused, reason)
            named |= refused
        return named

    def is_applied(self, batch: int) -> bool:
        """Whether the coordinator trained on this batch."""
        return batch in self._applied

    def account(self) -> Account:
        """The books as they stand: what has no receipt counts as expired."""
        return Account(
            self.produced,
            len(self._applied),
            dict(Counter(self._discarded.values())),
            self.produced - len(self._applied) - len(self._discarded),
        )
