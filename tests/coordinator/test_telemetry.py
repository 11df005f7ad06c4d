from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.messages import Buckets, Telemetry
from broker.telemetry import METRICS
from coordinator.telemetry import BOOTS, SLACK_S, Gain, TelemetryLedger
from tests.fake_coordinator import Harness
from tests.tiny import Clock

EXIT = "predictions", "exit"
TRIPS = len(METRICS["round_trip_seconds"].bounds) + 1


class Desk:
    """A ledger of a coordinator that began an hour ago."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.ledger = TelemetryLedger(cuts=5, clock=self.clock)
        self.clock.advance(3600)
        self.number = 0

    def tell(self, exits: float | None = None, device: str = "d0", **changes: Any) -> Gain | None:
        self.clock.advance(10)
        self.number += 1
        counters = {} if exits is None else {"predictions": {"exit": exits}}
        fields = {
            "boot": "b",
            "number": self.number,
            "uptime_s": 10.0 * self.number,
            "cut": 2,
            "counters": counters,
        }
        return self.ledger.enter(device, Telemetry.model_validate(fields | changes))

    def gained(self, exits: float, **changes: Any) -> float | None:
        gain = self.tell(exits, **changes)
        return None if gain is None else gain.counters.get(EXIT)


def trips(*counts: int, total: float) -> dict[str, dict[str, Buckets]]:
    whole = [*counts, *[0] * (TRIPS - len(counts))]
    return {"round_trip_seconds": {"": Buckets(counts=whole, total=total)}}


# -- differences ----------------------------------------------------------------------------------


def test_what_is_new_is_added() -> None:
    desk = Desk()
    assert [desk.gained(total) for total in (5, 5, 12)] == [5, 0, 7]


def test_a_device_is_known_by_its_name() -> None:
    desk = Desk()
    assert desk.gained(5, device="a") == 5
    assert desk.gained(3, device="b") == 3


def test_a_new_boot_counts_from_0() -> None:
    desk = Desk()
    assert desk.gained(50) == 50
    assert desk.gained(3, boot="c", number=0, uptime_s=1.0) == 3


def test_of_a_boot_before_the_coordinators_only_what_follows_counts() -> None:
    desk = Desk()
    assert desk.gained(1000, uptime_s=1e6) is None
    assert desk.gained(1004, uptime_s=1e6 + 10) == 4


def test_a_report_again_or_overtaken_changes_nothing() -> None:
    desk = Desk()
    assert desk.gained(5, number=5) == 5
    assert desk.gained(5, number=5) is None
    assert desk.gained(2, number=3) is None
    assert desk.gained(6, number=6) == 1


def test_a_report_of_an_earlier_boot_that_comes_late_changes_nothing() -> None:
    desk = Desk()
    assert desk.gained(50, number=5) == 50
    assert desk.gained(3, boot="c", number=0, uptime_s=1.0) == 3
    assert desk.gained(50, number=5) is None
    assert desk.gained(4, boot="c", number=1, uptime_s=1.0) == 1


def test_few_boots_are_remembered() -> None:
    desk = Desk()
    for boot in range(100):
        desk.gained(1, boot=f"b{boot}", number=0, uptime_s=1.0)
    assert len(desk.ledger._lives["d0"]) == BOOTS


def test_histograms_gain_by_bucket() -> None:
    desk = Desk()
    desk.tell(histograms=trips(1, 2, total=0.5))
    gain = desk.tell(histograms=trips(1, 5, 1, total=2.0))
    assert gain is not None
    counts, total = gain.histograms["round_trip_seconds", ""]
    assert counts[:4] == [0, 3, 1, 0]
    assert total == 1.5


def test_gauges_are_as_they_are() -> None:
    gain = Desk().tell(gauges={"exit_threshold": {"": -0.5}})
    assert gain is not None
    assert gain.gauges == {("exit_threshold", ""): -0.5}
    assert (gain.cut, gain.device_class, gain.radio) == (2, "generic", "none")


def test_a_cut_that_the_network_does_not_have_is_none() -> None:
    gain = Desk().tell(cut=6)
    assert gain is not None
    assert gain.cut == 0


# -- nonsense -------------------------------------------------------------------------------------


def test_a_count_that_falls_is_left_out_until_it_is_above_the_last_again() -> None:
    desk = Desk()
    desk.gained(50)
    fallen = desk.tell(20)
    assert fallen is not None
    assert (fallen.counters, fallen.faults) == ({}, {"implausible_telemetry"})
    assert desk.gained(51) == 1


def test_a_sum_of_seconds_may_be_rounded() -> None:
    desk = Desk()
    desk.tell(histograms=trips(1, total=0.3))
    gain = desk.tell(histograms=trips(1, total=0.3 - 1e-12))
    assert gain is not None
    assert gain.histograms["round_trip_seconds", ""][1] == 0
    assert not gain.faults


def test_a_jump_that_no_device_can_do_is_left_out() -> None:
    desk = Desk()
    most = METRICS["predictions"].most_per_s * (10 + SLACK_S)
    desk.gained(5)
    jumped = desk.tell(most + 6)
    assert jumped is not None
    assert (jumped.counters, jumped.faults) == ({}, {"implausible_telemetry"})
    assert desk.gained(6) == 1


def test_a_device_cannot_have_done_much_since_a_boot_just_now() -> None:
    gain = Desk().tell(METRICS["predictions"].most_per_s * (2 + SLACK_S), uptime_s=1.0)
    assert gain is not None
    assert gain.faults == {"implausible_telemetry"}


@pytest.mark.parametrize(
    "odd",
    [
        {"counters": {"cats": {"": 1.0}}},
        {"counters": {"predictions": {"oracle": 1.0}}},
        {"counters": {"exit_threshold": {"": 1.0}}},
        {"gauges": {"predictions": {"exit": 1.0}}},
        {"histograms": {"round_trip_seconds": {"": Buckets(counts=[1, 2], total=1.0)}}},
        {"histograms": {"predictions": {"exit": Buckets(counts=[1], total=1.0)}}},
    ],
)
def test_what_is_not_known_is_left_out_and_named_once(odd: dict[str, Any]) -> None:
    desk = Desk()
    first, second = desk.tell(**odd), desk.tell(**odd)
    assert first is not None
    assert second is not None
    assert (first.counters, first.gauges, first.histograms) == ({}, {}, {})
    assert first.faults == {"unknown_telemetry"}
    assert second.faults == set()


@given(st.lists(st.tuples(st.integers(0, 9), st.floats(0, 1e308)), max_size=20))
def test_counters_never_fall_and_never_exceed_what_was_said(
    reports: list[tuple[int, float]],
) -> None:
    desk, total = Desk(), 0.0
    for number, exits in reports:
        gained = desk.gained(exits, number=number) or 0.0
        assert gained >= 0
        total += gained
    assert total <= max((exits for _, exits in reports), default=0.0)


# -- in the coordinator ---------------------------------------------------------------------------


def test_the_coordinator_passes_on_what_is_new() -> None:
    server = Harness()
    report = Telemetry(
        boot="b", number=0, uptime_s=0.0, cut=2, counters={"predictions": {"exit": 3}}
    )
    server.hear("a", report, report)
    (gain,) = server.observer.gains
    assert (gain.device, gain.counters) == ("a", {EXIT: 3})
    assert server.observer.dropped["redelivered"] == 1
    server.hear("a", report.model_copy(update={"number": 1, "gauges": {"cats": {"": 1.0}}}))
    assert server.observer.dropped["unknown_telemetry"] == 1


def test_coding_checkpoints_and_connections_are_watched() -> None:
    server = Harness(batches_per_round=1, rounds=1)
    (first,) = server.observer.checkpoints
    assert first > 0
    server.join("a", 3)
    for envelope in server.train("a"):
        _ = envelope.message  # what is made when it is sent
    assert server.observer.coded == {"decode": 1, "encode": 1}
    assert len(server.observer.checkpoints) == 2
    server.core.disconnected()
    assert server.observer.up == [True, False]
