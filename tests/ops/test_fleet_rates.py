from __future__ import annotations

from typing import Any

from coordinator.status import FleetStatus
from ops.fleet_rates import Meter
from tests.ops.fleet_statuses import make_device, make_status


def at(seconds: float, *, samples: int = 0, bytes_up: int = 0, **changes: Any) -> FleetStatus:
    device = make_device("a", samples=0, open_samples=samples, bytes_up=bytes_up, bytes_down=5)
    return make_status(device, uptime_s=seconds, **changes)


def test_rates_are_differences_over_the_coordinators_own_time() -> None:
    meter = Meter()
    assert meter.update(at(10)).of("a").samples is None
    rates = meter.update(at(14, samples=64, bytes_up=1000, bytes={"up/activation": 12_000_800}))
    assert rates.of("a").samples == 16
    assert (rates.of("a").up, rates.of("a").down, rates.of("a").bytes) == (250, 0, 250)
    assert rates.bytes == {"up/activation": 200}
    assert rates.predictions == {"exit": 0, "server": 0, "fallback": 0}


def test_a_device_that_is_new_has_none_yet() -> None:
    meter = Meter()
    meter.update(make_status(uptime_s=1))
    rates = meter.update(at(2))
    assert rates.of("a").up is None
    assert rates.of("a").samples is None
    assert rates.of("nobody").bytes is None


def test_a_coordinator_that_restarted_is_measured_anew() -> None:
    meter = Meter()
    meter.update(at(100, samples=640))
    assert meter.update(at(1, boot="another")).devices == {}
    assert meter.update(at(2, boot="another", samples=8)).of("a").samples == 8


def test_the_same_status_twice_says_nothing() -> None:
    meter = Meter()
    meter.update(at(1))
    assert meter.update(at(1)).devices == {}


def test_while_a_round_is_merged_sample_rates_stay_and_do_not_jump_after_it() -> None:
    meter = Meter()
    meter.update(at(0, samples=0))
    assert meter.update(at(2, samples=40)).of("a").samples == 20
    assert meter.update(at(4, samples=0, round=None)).of("a").samples == 20
    merged = make_device("a", samples=80, open_samples=0)
    rates = meter.update(make_status(merged, uptime_s=6, phase="gathering", round=None))
    assert rates.of("a").samples == 10, "40 more in the four seconds since they were last known"
