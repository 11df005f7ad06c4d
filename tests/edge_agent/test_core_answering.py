from __future__ import annotations

from broker.serving_messages import Features, Prediction
from broker.training_messages import Activations, Report
from edge_agent.phases import Phase
from tests.fake_device import (
    Harness,
    every,
    exam,
    make_parameters,
    only,
    probabilities_of,
    receipt_of,
)
from tests.tiny import make_assignment, make_round, make_serving


def start_answering(device: Harness) -> None:
    device.connect()
    device.hear(make_assignment(), make_serving(7), make_round(3, phase="inference", version=7))
    device.hear(make_parameters(7))


def test_it_answers_by_its_exit_or_asks_and_reports_until_the_run_is_over() -> None:
    device = Harness(data=exam((1, 1.0, 1), (0, 0.0, 2), (0, 0.0, 3)))
    start_answering(device)
    first, second = every(Features, device.work())
    assert first.version == 7
    right, wrong = probabilities_of(2), probabilities_of(2)
    device.hear(Prediction(request=second.request, version=7, tensor=wrong))
    device.hear(Prediction(request=first.request, version=7, tensor=right))
    report = only(Report, device.work())
    assert report.inference is not None
    assert report.inference.images == 3
    assert (report.inference.exits, report.inference.offloads) == (1, 2)
    assert report.inference.correct == 2
    assert device.core.phase is Phase.REPORTING
    assert every(Report, device.wait(10)), "reports are not acknowledged: it says it again"
    assert device.hear(make_round(3, phase="inference", version=7)) == []
    device.hear(make_round(3, phase="finished", version=7))
    assert not every(Report, device.wait(100))
    assert device.core.finished


def test_without_an_answer_the_exits_own_counts() -> None:
    device = Harness(data=exam((2, 0.1, 2)))
    start_answering(device)
    device.work()
    device.wait(6)
    report = only(Report, device.work())
    assert report.inference is not None
    assert (report.inference.timeouts, report.inference.correct) == (1, 1)


def test_a_round_that_follows_all_the_same_ends_the_answering() -> None:
    device = Harness(data=exam((0, 0.0, 2), (0, 0.0, 3)))
    start_answering(device)
    assert every(Features, device.work())
    device.hear(make_round(4, version=7), receipt_of(make_round(4), complete=True))
    assert {m.round for m in every(Activations, device.work())} == {4}


def test_a_device_without_test_images_reports_at_once() -> None:
    device = Harness()
    start_answering(device)
    report = only(Report, device.work())
    assert report.inference is not None
    assert report.inference.images == 0


def test_it_waits_until_it_knows_how_images_are_answered() -> None:
    device = Harness(data=exam((1, 1.0, 1), (0, 0.0, 2)))
    device.connect()
    device.hear(make_assignment(), make_round(3, phase="inference", version=7))
    device.hear(make_parameters(7), make_serving(7, run="another"))
    assert device.core.phase is Phase.WAITING
    device.hear(make_serving(7))
    device.hear(make_parameters(7))
    assert every(Features, device.work())


def test_an_exit_that_nobody_trained_asks_about_all() -> None:
    device = Harness(data=exam((1, 1.0, 1)))
    device.connect()
    announced = make_round(3, phase="inference", version=7)
    device.hear(make_assignment(), make_serving(7, cuts={}), announced)
    device.hear(make_parameters(7))
    assert every(Features, device.work())
