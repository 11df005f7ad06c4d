from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from broker.logs import LogLevel
from broker.messages import Assignment, Command, Hello, Request
from broker.training_messages import Activations
from edge_agent.errors import AssignmentError
from edge_agent.learning import Learner
from edge_agent.phases import Phase
from edge_agent.probe import PROBE_WAIT_S
from tensors.errors import NetworkError
from tests.fake_device import (
    DEVICE,
    Harness,
    MemorySnapshots,
    every,
    finish,
    make_parameters,
    only,
    receipt_of,
)
from tests.tiny import make_assignment, make_hello, make_round

# -- its own memory -------------------------------------------------------------------------------


def test_a_restarted_device_needs_no_download() -> None:
    snapshots = MemorySnapshots()
    first = Harness(snapshots=snapshots)
    first.join()
    first.work()
    second = Harness(snapshots=snapshots)
    second.connect()
    second.hear(make_assignment())
    assert only(Request, second.hear(make_round())).what == "join"
    second.hear(receipt_of(make_round(), complete=True, next_batch=2, applied=[(0, 1)]))
    assert [m.batch for m in every(Activations, second.work())] == [2, 3]
    assert second.learner.weight == 10


def test_a_restarted_device_of_an_old_version_fetches_the_new_one() -> None:
    snapshots = MemorySnapshots()
    Harness(snapshots=snapshots).join()
    second = Harness(snapshots=snapshots)
    second.connect()
    second.hear(make_assignment())
    assert only(Request, second.hear(make_round(2, version=1))).what == "parameters"


def test_a_broken_disk_costs_the_memory_but_not_the_training() -> None:
    device = Harness(snapshots=MemorySnapshots(broken=True))
    device.join()
    assert finish(device, make_round()).applied == 4


# -- what cannot be done --------------------------------------------------------------------------


def refuse(error: Exception) -> Callable[[Assignment], Learner]:
    def build(assignment: Assignment) -> Learner:
        raise error

    return build


@pytest.mark.parametrize("error", [AssignmentError("not allowed"), NetworkError("no such cut")])
def test_an_assignment_it_cannot_follow_ends_the_device_with_the_reason(error: Exception) -> None:
    device = Harness(build=refuse(error), stay=True)
    device.connect()
    device.hear(make_assignment(), make_round())
    assert device.core.finished
    assert device.core.problem == str(error)


@pytest.mark.parametrize("key", ["activation_codec", "parameter_codec"])
def test_a_codec_it_does_not_know_ends_the_device_with_the_reason(key: str) -> None:
    device = Harness()
    device.connect()
    device.hear(make_assignment(**{key: "int9"}), make_round())
    assert device.core.finished
    assert "int9" in str(device.core.problem)


def test_a_device_logs_with_the_level_that_is_ordered_and_trains_on() -> None:
    device = Harness()
    device.join()
    device.hear(Command(command="log_level", level="debug"))  # nobody looks after its log
    levels: list[LogLevel | None] = []
    device.core.on_log_level = levels.append
    device.hear(Command(command="log_level", level="debug"))
    device.hear(Command(command="log_level"))
    assert levels == ["debug", None]
    assert device.core.phase is Phase.TRAINING


def test_where_a_device_is_for_its_log() -> None:
    device = Harness()
    assert device.core.place == {"device": DEVICE}
    device.join()
    announced = make_round()
    assert device.core.place == {"device": DEVICE, "run": announced.run, "round": announced.round}


def test_a_device_that_is_refused_stops_with_the_reason() -> None:
    device = Harness(stay=True)
    device.connect()
    device.hear(Command(command="stop", reason="it has no training images"))
    assert device.core.finished
    assert device.core.problem == "it has no training images"


@pytest.mark.parametrize("stay", [True, False])
def test_after_the_run_a_device_stays_or_goes(stay: bool) -> None:
    device = Harness(stay=stay)
    device.join()
    finish(device, make_round())
    device.hear(make_round(3, phase="finished"))
    assert device.core.phase is Phase.FINISHED
    assert device.core.finished is not stay
    assert device.core.problem is None


def test_a_device_that_stays_takes_part_in_the_next_run() -> None:
    device = Harness(stay=True)
    device.join()
    device.hear(make_round(3, phase="finished"))
    device.hear(make_assignment(run="next"), make_round(run="next"))
    device.hear(make_parameters(0, run="next"), receipt_of(make_round(run="next"), complete=True))
    assert {m.run for m in every(Activations, device.work())} == {"next"}


def test_a_budget_for_a_codec_without_levels_is_a_problem() -> None:
    device = Harness()
    device.connect()
    device.hear(make_assignment(activation_codec="fp32", bytes_per_sample=100.0))
    assert device.core.problem is not None
    assert "no levels" in device.core.problem


# -- cut auto -------------------------------------------------------------------------------------


def test_a_device_without_a_cut_measures_itself_and_its_uplink() -> None:
    device = Harness(hello=make_hello(cut=None))
    device.connect()
    probe = only(Request, device.hear(make_assignment(cut=None)))
    assert probe.what == "probe"
    assert len(probe.padding) > 64 << 10
    assert not device.core.has_work, "the probe is still on its way"
    device.uplink = 1e6
    hello = only(Hello, device.work())
    assert hello.measurement is not None
    assert hello.measurement.uplink_bytes_per_s == 1e6
    device.hear(make_assignment(cut=4), make_round())
    assert device.core.phase is Phase.FETCHING


def test_a_probe_that_is_lost_does_not_hold_up_the_measurement() -> None:
    device = Harness(hello=make_hello(cut=None))
    device.connect()
    device.hear(make_assignment(cut=None))
    device.wait(PROBE_WAIT_S - 0.1)
    assert not device.core.has_work
    device.wait(0.2)
    hello = only(Hello, device.work())
    assert hello.measurement is not None
    assert hello.measurement.uplink_bytes_per_s == 0


def test_a_device_that_cannot_measure_says_why() -> None:
    def measure(assignment: Assignment) -> Any:
        raise AssignmentError("not allowed")

    device = Harness(measure=measure)
    device.connect()
    device.hear(make_assignment(cut=None))
    device.uplink = 1.0
    device.work()
    assert device.core.finished
    assert device.core.problem == "not allowed"
