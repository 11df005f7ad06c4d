"""One device's batches in one attempt, on the coordinator: each is applied at most once."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

from broker.envelopes import Envelope
from broker.messages import Range, to_ranges

Stamp = tuple[str, int, int]


@dataclass(frozen=True, slots=True)
class Account:
    """``produced = applied + Σ discarded + expired``; batches."""

    produced: int
    applied: int
    discarded: Mapping[str, int]
    expired: int

    def as_dict(self) -> dict[str, object]:
        """For records and reports."""
        return {
            "produced": self.produced,
            "applied": self.applied,
            "discarded": dict(self.discarded),
            "expired": self.expired,
        }


@dataclass(slots=True)
class Ledger:
    """One device in one attempt. ``answers`` caches the last gradients for redelivered batches."""

    quota: int
    keep_answers: int
    credits: int
    produced: int | None = None
    samples: int = 0
    _applied: set[int] = field(default_factory=set)
    _discarded: dict[int, str] = field(default_factory=dict)
    _news: list[int] = field(default_factory=list)
    _answers: OrderedDict[int, Envelope] = field(default_factory=OrderedDict)

    @property
    def finished(self) -> bool:
        """Whether the device has uploaded its parameters."""
        return self.produced is not None

    @property
    def next_batch(self) -> int:
        """The first number above all that were seen."""
        return max((*self._applied, *self._discarded), default=-1) + 1

    def seen(self, batch: int) -> bool:
        """Whether this batch has its outcome already."""
        return batch in self._applied or batch in self._discarded

    def apply(self, batch: int, samples: int) -> None:
        """This batch was trained on."""
        assert not self.seen(batch)
        self._applied.add(batch)
        self._news.append(batch)
        self.samples += samples

    def discard(self, batch: int, reason: str) -> None:
        """This batch was refused."""
        assert not self.seen(batch)
        self._discarded[batch] = reason
        self._news.append(batch)

    def remember(self, batch: int, answer: Envelope) -> None:
        """Keep an answer for a redelivered batch; only the last few are."""
        self._answers[batch] = answer
        while len(self._answers) > self.keep_answers:
            self._answers.popitem(last=False)

    def answer(self, batch: int) -> Envelope | None:
        """The answer this batch had, if it is still kept."""
        return self._answers.get(batch)

    @property
    def unreported(self) -> int:
        """Outcomes that no receipt has named yet."""
        return len(self._news)

    def report(self, *, everything: bool) -> tuple[list[Range], dict[str, list[Range]]]:
        """Ranges of applied and of discarded batches: the news since the last call, or all."""
        chosen = set(self._applied) | set(self._discarded) if everything else set(self._news)
        self._news.clear()
        by_reason: dict[str, list[int]] = {}
        for batch in chosen & self._discarded.keys():
            by_reason.setdefault(self._discarded[batch], []).append(batch)
        return to_ranges(chosen & self._applied), {
            reason: to_ranges(batches) for reason, batches in by_reason.items()
        }

    def account(self) -> Account:
        """The books; what was seen was produced, whatever the device says when it has finished."""
        produced = max(self.next_batch, self.produced or 0)
        return Account(
            produced,
            len(self._applied),
            dict(Counter(self._discarded.values())),
            produced - len(self._applied) - len(self._discarded),
        )
