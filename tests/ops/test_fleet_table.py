from __future__ import annotations

import io

import pytest
from rich.console import Console

from coordinator.health import Health
from coordinator.status import FleetStatus, ServingStatus
from ops.fleet_order import Order, ordered
from ops.fleet_rates import DeviceRates, Rates
from ops.fleet_table import lines_around, page, show
from tests.ops.fleet_statuses import make_device, make_round, make_status


def lines(status: FleetStatus, *, rates: Rates | None = None, width: int = 80) -> list[str]:
    file = io.StringIO()
    show(status, Console(file=file, width=width), order=Order.name, rates=rates)
    return [line.rstrip() for line in file.getvalue().splitlines()]


def test_a_fleet_in_80_columns() -> None:
    found = lines(
        make_status(
            make_device("cam-1"),
            make_device("cam-2", cut=None, exit_loss=None, predictions={}, heard_s=None),
            make_device("a-name-that-is-much-too-long-for-this", state="answering", heard_s=7300),
        )
    )
    assert found == [
        "fleet demo, run 20261121-201503-1a74, training, version 2",
        "3 of 3 devices online; version 2 serves; broker connected; up 1 min 40 s",
        "round 3 of 6, 120 of 400 batches, 1 of 2 devices done, 8.0 s, 9 min 52 s left",
        "whole network's loss 2: 1.25  5: 1.50",
        "after round 2: full network 80.1 %, exits 2: 70.0 %  5: 75.0 %",
        "images answered: exit 60, server 30, fallback 10",
        "bytes up: activation 12 MB",
        "bytes down: gradient 3.4 MB",
        "device                cut      state  heard  samples  loss  exits     up    down",
        "a-name-that-is-much…    2  answering    2 h    9,320  0.51   60 %  12 MB  3.4 MB",
        "cam-1                   2   training    3 s    9,320  0.51   60 %  12 MB  3.4 MB",
        "cam-2                   –   training      –    9,320     –      –  12 MB  3.4 MB",
    ]


def test_rates_stand_in_place_of_totals() -> None:
    rates = Rates({"cam-1": DeviceRates(150.4, 2e6, 512.0)}, {"up/activation": 2e6}, {"exit": 2.5})
    found = lines(make_status(make_device("cam-1"), make_device("cam-2")), rates=rates)
    assert "bytes up/s: activation 2 MB" in found
    assert "images answered/s: exit 2.5" in found
    assert found[-3].split()[-2:] == ["up/s", "down/s"]
    assert "samples/s" in found[-3]
    assert found[-2].split()[5:] == ["150", "0.51", "60", "%", "2", "MB", "512", "B"]
    assert found[-1].split()[-2:] == ["–", "–"], "not known yet"


def test_what_is_wrong_stands_out() -> None:
    ill = Health(ok=False, problem="no connection to the broker")
    found = lines(make_status(health=ill, round=None, closed=None, bytes={}, predictions={}))
    assert "broker away" in found[1]
    assert found[2] == "problem: no connection to the broker"


def test_devices_in_quarantine_say_for_how_long_and_lite_ones_that_they_are() -> None:
    """Also where there is least room: with rates, in 80 columns."""
    found = lines(
        make_status(
            make_device("cam-1", breaches=3),
            make_device("cam-2", breaches=1240, quarantine_s=3540.2),
            make_device("cam-3", frozen=True),
            make_device("cam-4", breaches=20, quarantine_s=41.7, state="offline"),
            quarantined=2,
        ),
        rates=Rates({f"cam-{n}": DeviceRates(1500.4, 123_400.0, 123_400.0) for n in range(1, 5)}),
    )
    assert "3 of 4 devices online, 2 in quarantine; version 2 serves" in found[1]
    assert "breaches: cam-2 1,240 (held 59 min), cam-4 20 (held 42 s), cam-1 3" in found
    assert found[-5:] == [
        "device           cut        state  heard  samples/s  loss  exits    up/s  down/s",
        "cam-1              2     training    3 s      1,500  0.51   60 %  123 kB  123 kB",
        "cam-2              2  held 59 min    3 s      1,500  0.51   60 %  123 kB  123 kB",
        "cam-3         2 lite     training    3 s      1,500  0.51   60 %  123 kB  123 kB",
        "cam-4              2    held 42 s    3 s      1,500  0.51   60 %  123 kB  123 kB",
    ]


def test_only_some_of_many_that_broke_rules_are_named() -> None:
    found = lines(make_status(*(make_device(f"d{number}", breaches=1) for number in range(7))))
    assert "breaches: d0 1, d1 1, d2 1, d3 1, d4 1, 2 more" in found


def test_a_repeated_attempt_and_a_pinned_version_are_said() -> None:
    serving = ServingStatus(version=1, pinned=True, waiting_images=0)
    found = lines(make_status(round=make_round(attempt=2, deadline_s=None), serving=serving))
    assert "version 1 serves, pinned" in found[1]
    assert found[2].startswith("round 3 of 6, attempt 3, 120 of 400 batches")
    assert "left" not in found[2]


def test_a_page_has_as_many_lines_as_there_is_room_for() -> None:
    status = make_status(*(make_device(f"d{number:02}") for number in range(50)))
    height = 24
    file = io.StringIO()
    console = Console(file=file, width=80)
    rows = height - lines_around(status, width=80)
    console.print(page(status, order=Order.name, rows=rows))
    found = file.getvalue().splitlines()
    assert len(found) <= height
    assert found[-1] == f"and {50 - rows} more"


@pytest.mark.parametrize(
    ("order", "names"),
    [
        (Order.name, ["a", "b", "c"]),
        (Order.state, ["c", "a", "b"]),
        (Order.cut, ["b", "a", "c"]),
        (Order.heard, ["b", "c", "a"]),
        (Order.samples, ["c", "a", "b"]),
        (Order.loss, ["c", "b", "a"]),
        (Order.bytes, ["b", "c", "a"]),
        (Order.breaches, ["c", "a", "b"]),
    ],
)
def test_devices_are_sorted_by_what_is_wanted(order: Order, names: list[str]) -> None:
    devices = [
        make_device("b", state="waiting", cut=1, heard_s=9, samples=1, bytes_up=9e7, exit_loss=1),
        make_device("a", state="offline", cut=2, heard_s=None, samples=2, bytes_up=1, exit_loss=0),
        make_device(
            "c", state="answering", cut=None, samples=3, bytes_up=2, exit_loss=2, breaches=1
        ),
    ]
    assert [device.name for device in ordered(devices, order, None)] == names


def test_with_rates_devices_are_sorted_by_those() -> None:
    devices = [make_device("a", samples=10), make_device("b", samples=1), make_device("c")]
    rates = Rates({"a": DeviceRates(1, 1, 1), "b": DeviceRates(5, 5, 5)})
    for order in (Order.samples, Order.bytes):
        assert [d.name for d in ordered(devices, order, rates)] == ["b", "a", "c"]
