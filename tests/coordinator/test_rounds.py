from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.rounds import (
    Verdict,
    choose_cut,
    credits_of,
    judge,
    learning_rate,
    quorum_of,
    quota_of,
)
from tests.fake_device import make_measurement


def verdict(finished: int, *, overdue: bool = False, extended: bool = False) -> Verdict:
    return judge(participants=4, finished=finished, quorum=2, overdue=overdue, extended=extended)


def test_a_round_closes_when_all_have_finished() -> None:
    assert verdict(4) is Verdict.CLOSE
    assert verdict(3) is Verdict.WAIT
    assert verdict(0) is Verdict.WAIT


def test_at_the_deadline_it_closes_with_quorum() -> None:
    assert verdict(2, overdue=True) is Verdict.CLOSE
    assert verdict(3, overdue=True, extended=True) is Verdict.CLOSE


def test_below_quorum_it_is_extended_once_then_abandoned() -> None:
    assert verdict(1, overdue=True) is Verdict.EXTEND
    assert verdict(1, extended=True) is Verdict.WAIT
    assert verdict(1, overdue=True, extended=True) is Verdict.ABANDON


@pytest.mark.parametrize(
    ("participants", "fraction", "quorum"),
    [(4, 0.5, 2), (5, 0.5, 3), (1, 0.5, 1), (10, 0.01, 1), (3, 1.0, 3), (0, 0.5, 1)],
)
def test_a_quorum_is_rounded_up_and_never_nobody(
    participants: int, fraction: float, quorum: int
) -> None:
    assert quorum_of(participants, fraction) == quorum


def test_the_learning_rate_falls_from_the_first_round_on() -> None:
    rates = [learning_rate(0.1, number, 5, "cosine") for number in range(1, 6)]
    assert rates[0] == 0.1
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] > 0
    assert rates[2] == pytest.approx(0.05 * (1 + math.cos(math.pi * 2 / 5)))
    assert learning_rate(0.1, 9, 5, "cosine") == pytest.approx(0)
    assert {learning_rate(0.1, number, 5, "constant") for number in range(1, 6)} == {0.1}


def test_the_quota_is_a_pass_over_the_devices_images_unless_it_is_fixed() -> None:
    assert quota_of(100, 32, None) == 3
    assert quota_of(31, 32, None) == 1
    assert quota_of(100, 32, 7) == 7


def test_no_claim_of_a_device_makes_a_quota_that_fills_memory() -> None:
    assert quota_of(2**53, 1, None) <= 65_536


@given(
    window=st.integers(1, 64),
    devices=st.integers(1, 500),
    batch_chunks=st.integers(1, 100),
    queue_chunks=st.integers(1, 5000),
)
def test_credits_stay_below_the_brokers_queue(
    window: int, devices: int, batch_chunks: int, queue_chunks: int
) -> None:
    granted = credits_of(
        window=window, devices=devices, batch_chunks=batch_chunks, queue_chunks=queue_chunks
    )
    assert 1 <= granted <= window
    assert granted == 1 or granted * devices * batch_chunks <= 0.8 * queue_chunks


def test_credits_are_the_window_where_the_queue_has_room() -> None:
    assert credits_of(window=3, devices=4, batch_chunks=10, queue_chunks=1000) == 3


# -- cut auto -------------------------------------------------------------------------------------

BYTES = [1000] * 9


def choose(budget_ms: float = 1e9, budget_mb: float | None = 1e9, **measured: Any) -> int:
    return choose_cut(
        make_measurement(**measured), BYTES, step_budget_ms=budget_ms, memory_budget_mb=budget_mb
    )


def test_the_deepest_cut_that_fits_the_time() -> None:
    assert choose() == 9
    assert choose(budget_ms=4.0, step_ms=[1.0] * 9, exit_ms=[1.0] * 9) == 3
    assert choose(budget_ms=3.9, step_ms=[1.0] * 9, exit_ms=[1.0] * 9) == 2


def test_the_upload_is_part_of_the_step() -> None:
    assert choose(budget_ms=4.0, uplink_bytes_per_s=1e6) == 2  # one millisecond goes to the upload


def test_the_deepest_cut_that_fits_the_memory() -> None:
    sizes = [10.0 * (i + 1) for i in range(9)]
    assert choose(budget_mb=45, memory_mb=sizes) == 4
    assert choose(budget_mb=None, memory_mb=sizes, available_mb=100.0) == 5, "half of it"


def test_a_device_for_which_nothing_fits_gets_the_shallowest_cut() -> None:
    assert choose(budget_ms=0.1) == 1


@given(
    *[st.lists(st.floats(0, 100), max_size=12) for _ in range(3)],
)
def test_any_measurement_gives_a_cut_the_network_has(
    step: list[float], exit_: list[float], memory: list[float]
) -> None:
    measured = make_measurement(step_ms=step, exit_ms=exit_, memory_mb=memory)
    assert 1 <= choose_cut(measured, BYTES, step_budget_ms=50, memory_budget_mb=50) <= 9
