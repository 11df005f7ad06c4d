"""One device's batches in one attempt, on the coordinator: each is applied at most once."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

from broker.envelopes import Envelope
from broker.fields import Range
from broker.training_messages import to_ranges

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
    """One device in one attempt. ``answers`` caches the last gradients for redelivered batches.

    A device that comes back to the same round for another leg goes on with the next number.
    """

    quota: int
    keep_answers: int
    credits: int
    finished: bool = False
    """Whether the device has uploaded its parameters."""
    samples: int = 0
    next_batch: int = 0
    """The first number above all that were seen, or that the device said it has produced."""
    _taken: int = 0
    _waiting: set[int] = field(default_factory=set)
    _applied: set[int] = field(default_factory=set)
    _discarded: dict[int, str] = field(default_factory=dict)
    _news: list[int] = field(default_factory=list)
    _answers: OrderedDict[int, Envelope] = field(default_factory=OrderedDict)

    def seen(self, batch: int) -> bool:
        """Whether this batch has arrived before."""
        return batch in self._applied or batch in self._discarded or batch in self._waiting

    def wait(self, batch: int) -> None:
        """This batch has arrived and will be trained on together with others."""
        assert not self.seen(batch)
        self._waiting.add(batch)
        self.next_batch = max(self.next_batch, batch + 1)

    def apply(self, batch: int, samples: int) -> None:
        """This batch was trained on."""
        self._settle(batch)
        self._applied.add(batch)
        self.samples += samples

    def discard(self, batch: int, reason: str) -> None:
        """This batch was refused."""
        self._settle(batch)
        self._discarded[batch] = reason

    def _settle(self, batch: int) -> None:
        self._waiting.discard(batch)
        self._answers.pop(batch, None)
        assert not self.seen(batch)
        self._news.append(batch)
        self.next_batch = max(self.next_batch, batch + 1)

    def finish(self, produced: int) -> int:
        """The device has uploaded what it learnt; the samples that are new since the last time.

        ``produced`` is its claim of how many batches it made.
        """
        self.finished = True
        self.next_batch = max(self.next_batch, min(produced, self.quota))
        fresh, self._taken = self.fresh, self.samples
        return fresh

    @property
    def fresh(self) -> int:
        """Samples applied since the last :meth:`finish`."""
        return self.samples - self._taken

    def extend(self, quota: int) -> None:
        """Another leg, of ``quota`` more batches."""
        self.finished = False
        self.quota = self.next_batch + quota

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
        return Account(
            self.next_batch,
            len(self._applied),
            dict(Counter(self._discarded.values())),
            self.next_batch - len(self._applied) - len(self._discarded),
        )
