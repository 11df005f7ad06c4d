"""How long a round may take, who takes part, and who is given less work: the rules."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.rounds import (
    ENOUGH_PACES,
    SHORTEST_S,
    Load,
    Verdict,
    deadline,
    judge_buffer,
    most_devices,
    next_load,
    sample_devices,
)

NAMES = [f"d{i}" for i in range(10)]


# -- the deadline ---------------------------------------------------------------------------------


def test_a_round_may_take_median_plus_so_many_deviations() -> None:
    paces = {2: [1.0, 2.0, 3.0, 4.0, 5.0]}  # median 3, deviations 2 1 0 1 2: MAD 1
    assert deadline(paces, {2: 10}, mads=4, ceiling_s=600) == pytest.approx(10 * (3 + 4 * 1))


def test_the_slowest_cut_decides() -> None:
    paces = {2: [1.0] * 5, 5: [3.0] * 5}
    assert deadline(paces, {2: 10, 5: 10}, mads=0, ceiling_s=600) == pytest.approx(30)
    assert deadline(paces, {2: 10}, mads=0, ceiling_s=600) == pytest.approx(10)


def test_devices_that_are_all_alike_are_still_given_some_room() -> None:
    assert deadline({2: [1.0] * 5}, {2: 10}, mads=8, ceiling_s=600) == pytest.approx(18)


def test_one_that_is_very_slow_does_not_move_it() -> None:
    usual = deadline({2: [1.0, 1.1, 0.9, 1.0]}, {2: 10}, mads=8, ceiling_s=600)
    assert deadline({2: [1.0, 1.1, 0.9, 1.0, 1000.0]}, {2: 10}, mads=8, ceiling_s=600) < 2 * usual


def test_no_hiccup_of_the_network_ends_a_round() -> None:
    assert deadline({2: [0.0] * 5}, {2: 10}, mads=8, ceiling_s=600) == SHORTEST_S


@pytest.mark.parametrize(
    ("paces", "mads"),
    [({2: [100.0] * 5}, 8), ({2: [1.0] * 5}, None), ({2: [1.0] * (ENOUGH_PACES - 1)}, 8), ({}, 8)],
    ids=["above it", "not adaptive", "too little known", "nothing known"],
)
def test_the_configured_deadline_holds_if(
    paces: dict[int, list[float]], mads: float | None
) -> None:
    assert deadline(paces, {2: 10}, mads=mads, ceiling_s=600) == 600


# -- who takes part -------------------------------------------------------------------------------


def draw(
    fraction: float,
    names: list[str] = NAMES,
    *,
    number: int = 1,
    attempt: int = 0,
    most: int = 100,
) -> list[str]:
    return sample_devices(names, fraction, most=most, seed=7, round_number=number, attempt=attempt)


def test_a_share_of_the_devices_rounded_up_at_least_one() -> None:
    assert [len(draw(fraction)) for fraction in (0.01, 0.25, 0.3, 1.0)] == [1, 3, 3, 10]


def test_never_more_than_fit_the_brokers_queue() -> None:
    assert most_devices(batch_chunks=3, queue_chunks=15) == 4
    assert len(draw(1.0, most=4)) == 4
    assert draw(0.2, most=4) == draw(0.2)


def test_a_draw_is_the_same_whatever_the_order_of_the_names() -> None:
    assert draw(0.5) == draw(0.5, NAMES[::-1])


def test_every_round_and_every_attempt_draws_anew_and_nobody_is_left_out_for_ever() -> None:
    draws = [tuple(draw(0.3, number=number)) for number in range(1, 40)]
    assert len(set(draws)) > 20
    assert {name for drawn in draws for name in drawn} == set(NAMES)
    assert draw(0.3, attempt=0) != draw(0.3, attempt=1)


# -- how much work --------------------------------------------------------------------------------


def after(*rounds: str, load: Load | None = None) -> tuple[Load, int]:
    """The load after rounds that were late, in time or early; and how often it became shallower."""
    load, shallower = load or Load(), 0
    for outcome in rounds:
        load, step = next_load(load, finished=outcome != "late", spare=outcome == "early")
        shallower += step
    return load, shallower


def test_late_twice_in_a_row_is_half_the_work() -> None:
    assert after("late")[0].share == 1.0
    assert after("late", "late")[0].share == 0.5
    assert after("late", "in time", "late")[0].share == 1.0


def test_after_an_eighth_the_cut_becomes_shallower_and_half_the_work_begins() -> None:
    assert after(*["late"] * 6) == (Load(1 / 8), 0)
    assert after(*["late"] * 8) == (Load(1 / 2), 1)


def test_early_three_times_in_a_row_is_twice_the_work_but_never_more_than_all() -> None:
    quarter = Load(0.25)
    assert after(*["early"] * 2, load=quarter)[0].share == 0.25
    assert after(*["early"] * 3, load=quarter)[0].share == 0.5
    assert after(*["early"] * 20, load=quarter) == (Load(1.0), 0)


def test_in_time_with_nothing_to_spare_is_right_as_it_is() -> None:
    assert after(*["in time"] * 20, load=Load(0.5)) == (Load(0.5), 0)


@given(st.lists(st.sampled_from(["late", "in time", "early"]), max_size=60))
def test_the_share_stays_between_an_eighth_and_all(rounds: list[str]) -> None:
    load, _ = after(*rounds)
    assert 1 / 8 <= load.share <= 1


# -- without a barrier ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("contributions", "overdue", "verdict"),
    [
        (3, False, Verdict.CLOSE),
        (4, True, Verdict.CLOSE),
        (2, False, Verdict.WAIT),
        (1, True, Verdict.CLOSE),
        (0, True, Verdict.EXTEND),
        (0, False, Verdict.WAIT),
    ],
)
def test_a_buffer_closes_when_it_is_full_or_at_its_deadline_with_anything(
    contributions: int, overdue: bool, verdict: Verdict
) -> None:
    assert judge_buffer(contributions=contributions, wanted=3, overdue=overdue) is verdict
