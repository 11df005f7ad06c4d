from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import MessageError
from broker.training_messages import Receipt, to_ranges
from edge_agent.ledger import Ledger

QUOTA = 12
BATCHES = st.sets(st.integers(0, QUOTA - 1))


def receipt(
    applied: Iterable[int] = (), discarded: dict[str, Iterable[int]] | None = None
) -> Receipt:
    return Receipt(
        run="run",
        round=1,
        attempt=0,
        credits=1,
        applied=to_ranges(applied),
        discarded={reason: to_ranges(b) for reason, b in (discarded or {}).items()},
    )


def produced(count: int) -> Ledger:
    ledger = Ledger(limit=QUOTA)
    assert [ledger.produce() for _ in range(count)] == list(range(count))
    return ledger


def test_what_has_no_receipt_has_expired() -> None:
    ledger = produced(5)
    assert ledger.settle(receipt([0, 1, 3], {"late": [2]})) == {0, 1, 2, 3}
    account = ledger.account()
    assert (account.produced, account.applied, account.expired) == (5, 3, 1)
    assert account.discarded == {"late": 1}


def test_what_was_applied_stays_applied() -> None:
    ledger = produced(2)
    ledger.settle(receipt([0]))
    ledger.settle(receipt([], {"late": [0, 1]}))
    assert ledger.is_applied(0)
    assert not ledger.is_applied(1)
    assert ledger.account().discarded == {"late": 1}


def test_a_batch_applied_in_the_end_is_no_longer_discarded() -> None:
    ledger = produced(1)
    ledger.discarded([0], "not_finite")
    ledger.applied([0])
    account = ledger.account()
    assert (account.applied, dict(account.discarded), account.expired) == (1, {}, 0)


def test_numbers_that_were_never_produced_do_not_count() -> None:
    ledger = produced(2)
    ledger.settle(receipt([1, 5], {"late": [7]}))
    account = ledger.account()
    assert (account.applied, dict(account.discarded), account.expired) == (1, {}, 1)


@pytest.mark.parametrize("ranges", [[(5, 2)], [(0, QUOTA)], [(0, 2**53)], [(0, 6), (0, 9)]])
def test_ranges_that_make_no_sense(ranges: list[tuple[int, int]]) -> None:
    for fields in ({"applied": ranges}, {"discarded": {"late": ranges}}):
        with pytest.raises(MessageError) as caught:
            produced(3).settle(receipt().model_copy(update=fields))
        assert caught.value.reason == "invalid"


@given(
    st.lists(
        st.one_of(
            st.just("produce"),
            st.tuples(BATCHES, st.dictionaries(st.sampled_from(["late", "bad"]), BATCHES)),
        ),
        max_size=40,
    )
)
def test_the_books_always_balance(events: list[str | tuple[set[int], dict[str, set[int]]]]) -> None:
    ledger = Ledger(limit=QUOTA)
    for event in events:
        if isinstance(event, tuple):
            applied, discarded = event
            ledger.settle(receipt(applied, dict(discarded)))
        elif ledger.produced < QUOTA:
            ledger.produce()
        account = ledger.account()
        assert account.expired >= 0
        assert (
            account.produced
            == account.applied + sum(account.discarded.values()) + account.expired
            == ledger.produced
        )
