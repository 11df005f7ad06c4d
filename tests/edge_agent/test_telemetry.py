from __future__ import annotations

from pathlib import Path

import pytest

from broker.envelopes import decode_message, encode_message, up
from broker.messages import Coordinator, Telemetry
from broker.serving_messages import Features
from broker.topics import Address
from edge_agent.meters import Distribution, Meters
from edge_agent.readings import LinkMeters, hottest, read_process, resident_bytes
from edge_agent.telemetry import Reporter
from tests.fake_device import DEVICE, Harness, every, exam, make_parameters
from tests.tiny import Clock, make_assignment, make_hello, make_round, make_serving

# -- meters ---------------------------------------------------------------------------------------


def test_a_value_on_a_bound_belongs_below_it() -> None:
    found = Distribution((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 9.0):
        found.observe(value)
    assert found.counts == [2, 2, 1]
    assert found.total == 14.0


def test_distributions_add_up() -> None:
    one, other = Distribution((1.0,)), Distribution((1.0,))
    one.observe(0.5)
    other.observe(2.0)
    one.add(other)
    assert (one.counts, one.total) == ([1, 1], 2.5)


def test_what_is_not_in_the_table_cannot_be_counted() -> None:
    meters = Meters()
    with pytest.raises(KeyError):
        meters.count("cats")
    with pytest.raises(KeyError):
        meters.count("predictions", 1, "oracle")


def test_what_is_0_is_not_said() -> None:
    reporter = Reporter("boot", clock=Clock())
    silent = reporter.report(3)
    assert (silent.counters, silent.histograms) == ({}, {})
    assert list(silent.gauges) == ["uptime_seconds"]
    reporter.own.count("predictions", 2, "exit")
    reporter.own.distribution("round_trip_seconds").observe(0.3)
    said = reporter.report(3)
    assert said.counters == {"predictions": {"exit": 2}}
    assert list(said.histograms) == ["round_trip_seconds"]
    assert said.histograms["round_trip_seconds"][""].total == 0.3


def test_a_report_survives_the_wire() -> None:
    reporter = Reporter("boot", clock=Clock(), device_class="raspberry-pi-4", radio="wifi")
    reporter.own.count("answering_cpu_seconds", 0.25)
    reporter.own.distribution("prediction_seconds", "exit").observe(0.002)
    reporter.add(lambda meters: meters.gauge("exit_threshold", 0.7))
    said = reporter.report(2)
    envelope = up(DEVICE, said)
    assert decode_message(envelope.address, b"".join(encode_message(said))) == said


def test_sources_are_added_to_what_the_reporter_counts_itself() -> None:
    clock = Clock()
    reporter = Reporter("boot", clock=clock, period_s=20.0)
    reporter.own.count("predictions", 1, "exit")
    for amount in (2, 3):
        reporter.add(lambda meters, amount=amount: meters.count("predictions", amount, "exit"))  # type: ignore[misc]
    clock.advance(5)
    first, second = reporter.report(None), reporter.report(1)
    assert first.counters == second.counters == {"predictions": {"exit": 6}}
    assert (first.number, second.number) == (0, 1)
    assert (first.cut, second.cut) == (0, 1)
    assert first.uptime_s == 5
    assert reporter.due == clock.now + 20


# -- readings ------------------------------------------------------------------------------------


def test_the_link_is_counted_and_reasons_stay_few() -> None:
    link, meters = LinkMeters(), Meters()
    address = Address("all", "round")
    link.sent(address, 100)
    link.received(address, 7)
    for reason in ("malformed", "malformed", "sunspots"):
        link.dropped(reason, None)
    link.meter(meters)
    assert meters.counters["agent_message_bytes"] == {"up": 100, "down": 7}
    dropped = {reason: n for reason, n in meters.counters["agent_messages_dropped"].items() if n}
    assert dropped == {"malformed": 2, "other": 1}


def test_a_process_has_used_a_processor_and_memory() -> None:
    meters = Meters()
    read_process(meters)
    assert meters.counters["agent_cpu_seconds"][""] > 0
    assert meters.gauges["agent_memory_bytes"][""] > 1e6


def test_memory_is_unknown_where_nobody_says(tmp_path: Path) -> None:
    assert resident_bytes(tmp_path / "statm") is None
    (tmp_path / "statm").write_text("1234")
    assert resident_bytes(tmp_path / "statm") is None


def test_the_hottest_sensor_that_is_connected_counts(tmp_path: Path) -> None:
    for number, text in enumerate(("45500", "61000\n", "-274000", "999999", "broken")):
        (tmp_path / f"{number}").write_text(text)
    assert hottest([*tmp_path.iterdir(), tmp_path / "none"]) == 61.0
    assert hottest([]) is None


# -- in the state machine ------------------------------------------------------------------------


def test_a_device_reports_every_period() -> None:
    device = Harness()
    device.connect()
    assert device.told == []
    device.wait(59.0)
    assert device.told == []
    device.wait(2.0)
    assert [report.number for report in device.told] == [0]
    device.wait(60.0)
    assert [report.uptime_s for report in device.told] == [60.0, 120.0]


def test_a_coordinator_that_was_restarted_hears_at_once_where_to_count_from() -> None:
    device = Harness()
    device.connect()
    device.hear(Coordinator(state="online", boot="first"))
    device.hear(make_assignment())
    device.core.reporter.own.count("predictions", 5, "exit")
    before = len(device.told)
    device.hear(Coordinator(state="online", boot="second"))
    assert device.told[-1].counters["predictions"] == {"exit": 5}
    device.hear(Coordinator(state="online", boot="second"))
    assert len(device.told) == before + 1


def test_without_a_connection_it_says_nothing() -> None:
    device = Harness()
    device.connect()
    device.disconnect()
    device.wait(200.0)
    assert device.told == []
    device.connect()
    device.wait(60.0)
    assert len(device.told) == 1


def test_the_counts_of_a_cut_are_said_before_the_next_one_begins() -> None:
    device = Harness()
    device.connect()
    device.hear(make_assignment(cut=2))
    device.core.reporter.own.count("predictions", 5, "exit")
    device.hear(make_assignment(cut=3))
    cuts = [(report.cut, report.counters.get("predictions")) for report in device.told]
    assert cuts == [(2, None), (2, {"exit": 5}), (3, {"exit": 5})]


def test_answers_to_test_images_are_counted_once() -> None:
    device = Harness(data=exam((1, 1.0, 1), (0, 0.0, 2), (0, 0.0, 3)))
    device.connect()
    device.hear(make_assignment(), make_serving(7), make_round(3, phase="inference", version=7))
    device.hear(make_parameters(7))
    assert len(every(Features, device.work())) == 2
    device.wait(100)
    device.work()
    told = device.told[-1].counters
    assert told["predictions"] == {"exit": 1, "fallback": 2}
    assert told["offloads"] == {"timeout": 2}
    device.hear(make_round(3, phase="finished", version=7))
    device.wait(60)
    assert device.told[-1].counters == told
    assert sum(device.told[-1].histograms["prediction_seconds"]["exit"].counts) == 3


def test_what_was_counted_stays_so_if_the_test_images_are_given_up() -> None:
    device = Harness(data=exam((1, 1.0, 1), (0, 0.0, 2), (0, 0.0, 3)))
    device.connect()
    device.hear(make_assignment(), make_serving(7), make_round(3, phase="inference", version=7))
    device.hear(make_parameters(7))
    device.work()
    device.hear(make_assignment(run="another"))
    assert device.told[-1].counters["offloads_requested"] == {"": 2}


def test_connections_after_the_first_are_counted() -> None:
    device = Harness()
    for _ in range(3):
        device.connect()
        device.disconnect()
    assert device.core.reporter.meters().counters["reconnects"] == {"": 2}


def test_a_farewell_is_a_report_of_all_that_was_counted() -> None:
    device = Harness(hello=make_hello(boot="b7"))
    device.connect()
    device.core.reporter.own.count("predictions", 5, "exit")
    said = device.core.telemetry().message
    assert isinstance(said, Telemetry)
    assert (said.boot, said.counters) == ("b7", {"predictions": {"exit": 5}})
