from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from edge_agent.exit_policy import (
    ALARM,
    LONGEST_S,
    MOST_AGREEMENT,
    PROBE_S,
    STEP,
    TIGHTEST,
    WINDOW,
    ExitPolicy,
    Limits,
    Policy,
    RoundTrip,
    TokenBucket,
    chance_of_at_most,
    policy_of,
)
from tests.tiny import Array, Clock, make_serving


def make(
    *, clock: Callable[[], float] | None = None, limits: Limits | None = None, **changes: Any
) -> ExitPolicy:
    fields: dict[str, Any] = {"rule": "entropy", "threshold": 0.5, "timeout_s": 1.0}
    decider = ExitPolicy(limits or Limits(), seed=0, clock=clock or Clock())
    decider.use(Policy(**(fields | changes)), run="run", version=1)
    return decider


def at_once(*confidence: float) -> tuple[Array, Array]:
    return np.array(confidence), np.zeros(len(confidence))


def test_nothing_is_waited_for_longer_than_the_protocol_allows() -> None:
    policy = policy_of(make_serving(offload_timeout_s=1e300), 2)
    assert policy is not None
    assert policy.timeout_s == LONGEST_S


def test_only_above_the_threshold_an_exit_is_sure() -> None:
    decision = make().decide(*at_once(0.4, 0.5, math.nextafter(0.5, 1), math.nan))
    assert decision.exits.tolist() == [False, False, True, False]
    assert not decision.late.any()
    assert not decision.audits.any()


def test_audits_are_the_wanted_share_of_sure_images_and_the_same_for_the_same_seed() -> None:
    confidence = np.tile([0.1, 0.9], 5000)
    first, again = (make(audit_share=0.1).decide(confidence, confidence * 0) for _ in range(2))
    np.testing.assert_array_equal(first.audits, again.audits)
    assert not first.audits[::2].any()
    assert 400 < first.audits.sum() < 600
    assert make(audit_share=1.0).decide(*at_once(0.9)).audits.all()


# -- what an hour may cost ------------------------------------------------------------------------


@given(
    per_h=st.floats(0, 1e5),
    burst_s=st.floats(0, 1000),
    steps=st.lists(st.tuples(st.floats(0, 500), st.floats(0.1, 50)), max_size=50),
)
def test_no_stretch_of_time_costs_more_than_granted(
    per_h: float, burst_s: float, steps: list[tuple[float, float]]
) -> None:
    clock = Clock()
    bucket = TokenBucket(per_h, burst_s, clock)
    taken: list[tuple[float, float]] = []
    for seconds, amount in steps:
        clock.advance(seconds)
        if bucket.tokens > 0:
            bucket.take(amount)
            taken.append((clock.now, amount))
    burst = max(1.0, per_h / 3600 * burst_s) if per_h else 0.0
    for first in range(len(taken)):
        for last in range(first, len(taken)):
            amounts = [amount for _, amount in taken[first : last + 1]]
            time = taken[last][0] - taken[first][0]
            assert sum(amounts) <= burst + per_h / 3600 * time + max(amounts) + 1e-6


def test_requests_are_granted_by_the_hour_with_a_burst() -> None:
    clock = Clock()
    decider = make(clock=clock, limits=Limits(requests_per_h=60, burst_s=120))
    for _ in range(2):
        assert decider.affords
        decider.sent(100)
    assert not decider.affords
    clock.advance(59)
    assert not decider.affords
    clock.advance(1.001)
    assert decider.affords


def test_bytes_are_saved_up_for_a_message_that_was_larger() -> None:
    clock = Clock()
    decider = make(clock=clock, limits=Limits(bytes_per_h=3600, burst_s=10))
    decider.sent(110)
    clock.advance(99.9)
    assert not decider.affords
    clock.advance(0.2)
    assert decider.affords


def test_nothing_is_granted_where_nothing_may_be_spent() -> None:
    assert not make(limits=Limits(requests_per_h=0)).affords
    assert not make(limits=Limits(bytes_per_h=0)).affords


# -- how long an answer may take ------------------------------------------------------------------


def test_a_steady_round_trip_is_expected_as_it_is_and_a_shaky_one_longer() -> None:
    steady, shaky = RoundTrip(), RoundTrip()
    for i in range(200):
        steady.returned(0.1)
        shaky.returned(0.05 if i % 2 else 0.15)
    assert steady.expected_s == pytest.approx(0.1)
    assert shaky.expected_s is not None
    assert 0.2 < shaky.expected_s < 0.4


def test_round_trips_that_are_missed_double_the_expectation_until_one_returns() -> None:
    trip = RoundTrip()
    trip.missed(0.5)
    assert trip.expected_s == 0.5
    trip.missed(0.1)
    assert trip.expected_s == 1.0
    for _ in range(20):
        trip.missed(0.1)
    assert trip.expected_s == 600
    trip.returned(0.1)
    assert trip.expected_s == pytest.approx(0.3)


def test_nothing_is_offloaded_that_would_come_too_late() -> None:
    decider = make(limits=Limits(latency_s=0.2))
    assert not decider.decide(*at_once(0.1)).late.any(), "nothing is measured yet: try"
    for _ in range(100):
        decider.round_trip.returned(0.1)
    decider.decide(np.array([0.1]), np.array([0.15]))  # a probe
    decision = decider.decide(np.array([0.1, 0.1, 0.9]), np.array([0.05, 0.15, 0.15]))
    assert decision.late.tolist() == [False, True, False]


def test_while_round_trips_take_too_long_one_is_tried_now_and_then() -> None:
    clock = Clock()
    decider = make(clock=clock, limits=Limits(latency_s=0.2))
    decider.round_trip.returned(1.0)
    assert not decider.decide(*at_once(0.1)).late.any()
    assert decider.decide(*at_once(0.1)).late.all()
    clock.advance(PROBE_S)
    assert not decider.decide(*at_once(0.1)).late.any()
    clock.advance(PROBE_S)
    over = decider.decide(np.array([0.1]), np.array([0.3]))
    assert over.late.all(), "what is too late already is no probe"
    assert decider.decide(*at_once(0.9)).exits.all()
    assert not decider.decide(*at_once(0.1)).late.any(), "nor is what the exit is sure of"


def test_a_slow_first_round_trip_is_soon_forgotten_when_others_are_quick() -> None:
    clock = Clock()
    decider = make(clock=clock, limits=Limits(latency_s=0.25))
    decider.returned(0.14)  # expected are three times that
    held = 0
    for _ in range(100):
        if decider.decide(*at_once(0.1)).late.all():
            held += 1
        else:
            clock.advance(0.03)
            decider.returned(0.03)
        clock.advance(0.1)
    assert held == 0
    assert decider.round_trip.expected_s is not None
    assert decider.round_trip.expected_s < 0.05
    decider.round_trip.missed(0.3)
    assert not decider.decide(*at_once(0.1)).late.any()
    decider.returned(0.3)
    assert decider.decide(*at_once(0.1)).late.all(), "that one was not back in time"


# -- drift ----------------------------------------------------------------------------------------


@given(trials=st.integers(0, 40), share=st.floats(0, 1), p=st.floats(0.01, 1))
def test_the_binomial_test_is_exact(trials: int, share: float, p: float) -> None:
    k = int(share * trials)
    exact = Fraction(min(p, MOST_AGREEMENT))
    expected = sum(
        math.comb(trials, i) * exact**i * (1 - exact) ** (trials - i) for i in range(k + 1)
    )
    assert chance_of_at_most(k, trials, p) == pytest.approx(float(expected), rel=1e-9, abs=1e-100)


def audit(decider: ExitPolicy, agreed: int, of: int) -> None:
    for number in range(of):
        decider.audited(agreed=number * agreed % of < agreed)


def test_an_exit_that_stops_agreeing_is_trusted_less_step_by_step_and_then_again() -> None:
    decider = make(agreement=0.95, audit_share=0.1)
    audit(decider, 95, of=100)
    assert not decider.drift.drifting
    assert decider.threshold_in_force == 0.5
    levels = []
    for _ in range(20):
        audit(decider, 8, of=STEP)
        levels.append(decider.drift.level)
    assert decider.drift.level == TIGHTEST
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert decider.threshold_in_force == pytest.approx(1 - 0.5 ** (TIGHTEST + 1))
    assert decider.decide(*at_once(0.9)).exits.tolist() == [False]
    for _ in range(WINDOW // STEP + TIGHTEST + 1):
        audit(decider, STEP, of=STEP)
    assert not decider.drift.drifting
    assert decider.threshold_in_force == 0.5


def test_without_an_expectation_nothing_is_judged() -> None:
    decider = make(agreement=None, audit_share=0.1)
    audit(decider, 0, of=100)
    assert (decider.drift.level, decider.drift.chance) == (0, 1.0)


def test_a_fair_exit_is_seldom_doubted() -> None:
    rng = np.random.default_rng(1)
    decider = make(agreement=0.9)
    doubted = 0
    for agreed in rng.random(20_000) < 0.9:
        decider.audited(agreed=bool(agreed))
        doubted += decider.threshold_in_force > 0.5
    assert doubted < 0.02 * 20_000
    assert ALARM < 0.02


def test_audits_are_drawn_from_what_was_served_however_tight_it_is() -> None:
    decider = make(agreement=0.95, audit_share=1.0)
    for _ in range(10):
        audit(decider, 0, of=STEP)
    decision = decider.decide(*at_once(0.6, 0.4, 0.999))
    assert decision.exits.tolist() == [False, False, True]
    assert decision.audits.tolist() == [True, False, True]


def test_a_new_version_is_judged_anew_but_not_trusted_more_at_once() -> None:
    decider = make(agreement=0.95, audit_share=0.1)
    audit(decider, 0, of=STEP)
    assert decider.drift.level == 1
    policy = decider.policy
    decider.use(policy, run="run", version=1)
    assert decider.drift.audits == STEP, "nothing new"
    decider.use(policy, run="run", version=2)
    assert (decider.drift.audits, decider.drift.level) == (0, 1)
    decider.use(policy, run="another", version=2)
    assert decider.drift.level == 0


def test_without_audits_nothing_stays_tight() -> None:
    decider = make(agreement=0.95, audit_share=0.1)
    audit(decider, 0, of=STEP)
    assert decider.drift.level == 1
    decider.use(replace(decider.policy, audit_share=0.0), run="run", version=1)
    assert decider.drift.level == 0


class Deciding(RuleBasedStateMachine):
    """Whatever happens, limits hold and the threshold lies between the served one and 1."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.limits = Limits(requests_per_h=600, bytes_per_h=36_000, burst_s=30, latency_s=0.5)
        self.decider = make(clock=self.clock, limits=self.limits, agreement=0.9, audit_share=0.3)
        self.began = self.clock.now
        self.sent = self.size = 0
        self.version = 1

    @rule(seconds=st.floats(0, 100))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(
        confidence=st.lists(st.one_of(st.floats(0, 1), st.just(math.nan)), max_size=5),
        elapsed=st.floats(0, 1),
    )
    def decide(self, confidence: list[float], elapsed: float) -> None:
        sure = np.array(confidence, np.float64)
        decision = self.decider.decide(sure, np.full(len(sure), elapsed))
        tau = self.decider.threshold_in_force
        np.testing.assert_array_equal(decision.exits, sure > tau)
        assert not (decision.audits & ~(sure > self.decider.policy.threshold)).any()
        assert not (decision.late & decision.exits).any()
        if elapsed >= 0.5:
            assert (decision.late | decision.exits).all()

    @precondition(lambda self: self.decider.affords)
    @rule(size=st.integers(1, 500))
    def send(self, size: int) -> None:
        self.decider.sent(size)
        self.sent += 1
        self.size += size

    @rule(seconds=st.floats(0, 5), returned=st.booleans())
    def come_back(self, seconds: float, *, returned: bool) -> None:
        trip = self.decider.round_trip
        (trip.returned if returned else trip.missed)(seconds)
        assert trip.expected_s is not None
        assert trip.expected_s >= 0

    @rule(agreed=st.booleans(), times=st.integers(1, 2 * STEP))
    def audit(self, times: int, *, agreed: bool) -> None:
        level = self.decider.drift.level
        for _ in range(times):
            self.decider.audited(agreed=agreed)
        assert abs(self.decider.drift.level - level) <= math.ceil(times / STEP)

    @rule(threshold=st.floats(-1, 1), agreement=st.one_of(st.none(), st.floats(0, 1)))
    def use(self, threshold: float, agreement: float | None) -> None:
        self.version += 1
        policy = Policy(
            rule="entropy",
            threshold=threshold,
            timeout_s=1,
            audit_share=0.3,
            agreement=agreement,
        )
        self.decider.use(policy, run="run", version=self.version)

    @invariant()
    def within_limits(self) -> None:
        hours = (self.clock.now - self.began) / 3600
        assert self.sent <= 5 + 600 * hours + 1e-6
        assert self.size <= 300 + 36_000 * hours + 500 + 1e-6

    @invariant()
    def between_served_and_one(self) -> None:
        served = self.decider.policy.threshold
        assert served <= self.decider.threshold_in_force <= 1
        assert 0 <= self.decider.drift.level <= TIGHTEST
        assert 0 <= self.decider.drift.agreed <= self.decider.drift.audits <= WINDOW


TestDeciding = Deciding.TestCase
TestDeciding.settings = settings(max_examples=50, stateful_step_count=40)
