from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from broker.envelopes import down
from broker.training_messages import Gradients, Receipt, from_ranges
from coordinator.ledger import Ledger

QUOTA = 10


def make_ledger(keep: int = 2) -> Ledger:
    return Ledger(QUOTA, keep_answers=keep, credits=2)


def gradients(batch: int) -> Gradients:
    return Gradients(run="r", round=1, attempt=0, batch=batch, loss=1.0, correct=0, tensor=b"")


def test_news_are_told_once_and_everything_when_asked() -> None:
    ledger = make_ledger()
    ledger.apply(0, 8)
    ledger.discard(1, "late")
    assert ledger.unreported == 2
    assert ledger.report(everything=False) == ([(0, 0)], {"late": [(1, 1)]})
    assert ledger.unreported == 0
    ledger.apply(2, 8)
    assert ledger.report(everything=False) == ([(2, 2)], {})
    assert ledger.report(everything=False) == ([], {})
    assert ledger.report(everything=True) == ([(0, 0), (2, 2)], {"late": [(1, 1)]})


def test_samples_are_those_of_applied_batches() -> None:
    ledger = make_ledger()
    ledger.apply(0, 8)
    ledger.discard(1, "late")
    ledger.apply(2, 5)
    assert ledger.samples == 13


def test_the_next_batch_is_behind_all_that_were_seen() -> None:
    ledger = make_ledger()
    assert ledger.next_batch == 0
    ledger.discard(4, "late")
    ledger.apply(2, 8)
    assert ledger.next_batch == 5


def test_only_the_last_answers_are_kept() -> None:
    ledger = make_ledger(keep=2)
    for batch in range(4):
        ledger.apply(batch, 8)
        ledger.remember(batch, down("device", gradients(batch)))
    assert [ledger.answer(batch) is not None for batch in range(4)] == [False, False, True, True]


OUTCOMES = st.one_of(
    st.tuples(st.just("apply"), st.integers(0, QUOTA - 1)),
    st.tuples(st.just("discard"), st.integers(0, QUOTA - 1), st.sampled_from(["late", "bad"])),
    st.tuples(st.just("report"), st.booleans()),
    st.tuples(st.just("finish"), st.integers(0, QUOTA)),
    st.tuples(st.just("extend"), st.integers(1, 3)),
)


@given(st.lists(OUTCOMES, max_size=40))
def test_the_books_balance_and_receipts_name_every_outcome(events: list[tuple[Any, ...]]) -> None:
    ledger = make_ledger()
    outcomes: dict[int, str] = {}
    told: dict[int, str] = {}
    fresh = 0
    for event in events:
        match event:
            case ("apply", batch) if not ledger.seen(batch):
                ledger.apply(batch, 8)
                outcomes[batch] = "applied"
            case ("discard", batch, reason) if not ledger.seen(batch):
                ledger.discard(batch, reason)
                outcomes[batch] = reason
            case ("report", everything):
                applied, discarded = ledger.report(everything=everything)
                Receipt(
                    run="r", round=1, attempt=0, credits=1, applied=applied, discarded=discarded
                )
                named = dict.fromkeys(from_ranges(applied, limit=QUOTA), "applied")
                for reason, ranges in discarded.items():
                    named |= dict.fromkeys(from_ranges(ranges, limit=QUOTA), reason)
                told |= named
                assert told == outcomes
                assert not everything or named == outcomes
            case ("finish", claim):
                fresh += ledger.finish(claim)
                assert fresh == ledger.samples, "each sample is new once"
            case ("extend", quota) if ledger.finished:
                start = ledger.next_batch
                ledger.extend(quota)
                assert (ledger.quota, ledger.finished) == (start + quota, False)
        account = ledger.account()
        assert account.expired >= 0
        assert (
            account.produced == account.applied + sum(account.discarded.values()) + account.expired
        )
        assert account.applied == list(outcomes.values()).count("applied")
