"""Rates, breaches and quarantine of a device, on a clock that is moved by hand."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.link import Framing
from broker.topics import Address, Topics
from coordinator.defences.guard import QUARANTINED, RATE_LIMITED, Bucket, Guard
from coordinator.defences.settings import DefenceSettings
from coordinator.observer import Observer
from coordinator.traffic import Traffic
from tests.tiny import Clock

TOPICS = Topics("fleet")


class Watching(Observer):
    def __init__(self) -> None:
        self.broken: Counter[str] = Counter()
        self.held = 0

    def breach(self, reason: str) -> None:
        self.broken[reason] += 1

    def quarantined(self, devices: int) -> None:
        self.held = devices


class Gate:
    def __init__(self, **settings: Any) -> None:
        self.clock = Clock()
        self.observer = Watching()
        fields: dict[str, Any] = {"breach_limit": 3}
        self.guard = Guard(
            DefenceSettings(**(fields | settings)),
            devices=4,
            observer=self.observer,
            clock=self.clock,
        )

    def send(self, device: str = "a", size: int = 100, kind: str = "activations") -> str | None:
        return self.guard.admit(Address("device", kind, device, "up"), size)

    def break_rules(self, times: int = 3, device: str = "a") -> None:
        for _ in range(times):
            self.guard.breach(device, "malformed")


# -- rates ----------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.floats(0, 5), st.floats(0, 50)), max_size=60),
    st.floats(1, 20),
    st.floats(0.5, 4),
)
def test_a_bucket_lets_through_no_more_than_its_burst_and_its_rate(
    steps: list[tuple[float, float]], rate: float, burst_s: float
) -> None:
    bucket, now, taken = Bucket(rate, burst_s), 0.0, 0.0
    for wait, amount in steps:
        now += wait
        if bucket.take(amount, now):
            taken += amount
        assert taken <= rate * (burst_s + now) * (1 + 1e-9) + 1e-6


def test_packets_beyond_the_rate_are_dropped_and_the_rest_is_not() -> None:
    gate = Gate(device_packets_per_s=10, device_burst_s=2, quarantine_s=0)
    sent = [gate.send() for _ in range(30)]
    assert sent == [None] * 20 + [RATE_LIMITED] * 10
    assert gate.send("b") is None, "each has its own"
    gate.clock.advance(0.5)
    assert [gate.send() for _ in range(6)] == [None] * 5 + [RATE_LIMITED]


def test_bytes_are_counted_too_and_0_is_no_limit() -> None:
    gate = Gate(device_bytes_per_s=1000, device_burst_s=1)
    assert gate.send(size=900) is None
    assert gate.send(size=200) == RATE_LIMITED
    free = Gate(device_bytes_per_s=0, device_packets_per_s=0)
    assert all(free.send(size=1 << 30) is None for _ in range(100))


def test_a_second_over_the_rate_is_one_breach() -> None:
    gate = Gate(device_packets_per_s=1, device_burst_s=1)
    for _ in range(100):
        gate.send()
    assert gate.observer.broken == {RATE_LIMITED: 1}
    for _ in range(2):
        gate.clock.advance(1.1)
        for _ in range(5):
            gate.send()
    assert gate.guard.is_held("a")


@pytest.mark.parametrize(
    ("scope", "sender", "kind"),
    [("claim", "claim.t1", "enrol"), ("claim", "back.a", "enrol"), ("device", "a", "renew")],
)
def test_who_asks_for_certificates_without_end_is_heard_now_and_then(
    scope: Any, sender: str, kind: str
) -> None:
    gate = Gate(device_roster_messages_per_s=2, device_burst_s=5, quarantine_s=0)

    def ask() -> str | None:
        return gate.guard.admit(Address(scope, kind, sender, "up"), 500)

    assert [ask() for _ in range(100)] == [None] * 10 + [RATE_LIMITED] * 90
    gate.clock.advance(1)
    assert [ask() for _ in range(3)] == [None] * 2 + [RATE_LIMITED]
    assert gate.send(kind="renew") == (RATE_LIMITED if sender == "a" else None), "a rate each"
    assert gate.send(kind="hello") is None


def test_answers_are_rationed_by_their_bytes() -> None:
    gate = Gate(device_answer_bytes_per_s=100, device_burst_s=10)
    assert [gate.guard.answers("a", 400) for _ in range(4)] == [True, True, False, False]
    assert gate.guard.answers("b", 10**9), "larger than all it may have at once: then all of that"
    assert not gate.guard.answers("b", 100)
    gate.clock.advance(10)
    assert gate.guard.answers("b", 10**9)
    assert not gate.observer.broken, "to ask again is no breach"


def test_what_the_fleet_says_to_all_is_nobodys() -> None:
    gate = Gate(device_packets_per_s=1, device_burst_s=1)
    for _ in range(9):
        assert gate.guard.admit(Address("all", "round"), 1000) is None


# -- quarantine -----------------------------------------------------------------------------------


def test_enough_breaches_within_the_window_and_its_messages_are_dropped() -> None:
    gate = Gate()
    gate.break_rules(2)
    assert gate.send() is None
    gate.break_rules(1)
    assert gate.send() == QUARANTINED
    assert gate.send(kind="status") is None, "whether it is there is still known"
    assert gate.send("b") is None
    assert gate.guard.remaining("a") == 60
    assert gate.guard.breaches("a") == 3


def test_breaches_far_apart_do_not_add_up() -> None:
    gate = Gate(breach_window_s=10)
    for _ in range(20):
        gate.break_rules(1)
        gate.clock.advance(6)
    assert not gate.guard.is_held("a")


def test_it_ends_and_is_twice_as_long_the_next_time_up_to_a_bound() -> None:
    gate = Gate(quarantine_s=60, quarantine_max_s=200)
    lengths = []
    for _ in range(4):
        gate.break_rules()
        lengths.append(gate.guard.remaining("a"))
        gate.clock.advance(lengths[-1])
        assert not gate.guard.is_held("a")
        assert gate.send() is None
    assert lengths == [60, 120, 200, 200]
    gate.clock.advance(201)
    gate.break_rules()
    assert gate.guard.remaining("a") == 60, "after a good while it begins anew"


def test_who_has_to_act_on_it_is_told_once() -> None:
    gate = Gate()
    assert gate.guard.due is None
    gate.break_rules()
    assert gate.guard.due == gate.clock()
    assert gate.guard.changes() == (["a"], [])
    assert gate.observer.held == 1
    assert gate.guard.due == gate.clock() + 60
    assert gate.guard.changes() == ([], [])
    gate.clock.advance(60)
    assert gate.guard.changes() == ([], ["a"])
    assert gate.observer.held == 0
    assert gate.guard.due is None


def test_breaches_can_be_counted_without_consequences() -> None:
    gate = Gate(quarantine_s=0)
    gate.break_rules(100)
    assert gate.send() is None
    assert gate.guard.breaches("a") == 100


def test_a_claim_is_shared_by_many_and_never_in_quarantine() -> None:
    gate = Gate()
    gate.break_rules(50, "claim.k3f9")
    assert gate.guard.admit(Address("claim", "enrol", "claim.k3f9", "up"), 100) is None


def test_only_so_many_are_remembered_those_in_quarantine_first() -> None:
    gate = Gate()
    gate.break_rules()
    for number in range(50):
        gate.send(f"d{number}")
    assert len(gate.guard._records) == 4
    assert gate.send() == QUARANTINED


@pytest.mark.parametrize(
    ("reason", "counts"),
    [("bad_labels", True), ("not_finite", True), ("late", False), ("outlier_loss", False)],
)
def test_what_may_befall_an_honest_device_is_no_breach(reason: str, counts: bool) -> None:
    gate = Gate()
    gate.guard.refused("a", reason)
    assert (gate.observer.broken[reason] == 1) is counts


def test_the_link_asks_and_tells() -> None:
    gate = Gate(device_packets_per_s=10, device_burst_s=1)
    dropped: list[str] = []
    traffic = Traffic(dropped.append)
    traffic.blame = gate.guard.dropped
    framing = Framing(
        TOPICS, observer=traffic, clock=gate.clock, first_id=0, admit=gate.guard.admit
    )
    topic = TOPICS.format(Address("device", "activations", "a", "up"))
    for _ in range(5):
        assert framing.open(topic, b"rubbish") is None
    assert dropped == ["malformed"] * 3 + [QUARANTINED] * 2
    assert gate.observer.broken == {"malformed": 3}
