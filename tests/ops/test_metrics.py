from __future__ import annotations

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from broker.messages import Report
from broker.telemetry import REFUSALS
from broker.topics import Address
from coordinator.traffic import Traffic
from ops.metrics import Metrics

Labels = dict[str, str]


@pytest.fixture
def traffic() -> Traffic:
    return Traffic(lambda reason: None)


@pytest.fixture
def metrics(traffic: Traffic) -> Metrics:
    return Metrics(traffic)


def values(metrics: Metrics, name: str) -> dict[tuple[tuple[str, str], ...], float]:
    """Samples of one name by their labels, as a scraper reads them."""
    text = generate_latest(metrics.registry).decode()
    return {
        tuple(sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    }


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return values(metrics, name).get(tuple(sorted(labels.items())))


def report(
    *,
    number: int = 1,
    attempt: int = 0,
    exit_loss: float | None = None,
    activations: tuple[int, int] = (0, 0),
) -> Report:
    return Report(
        run="r",
        round=number,
        attempt=attempt,
        exit_loss=exit_loss,
        activation_bytes=activations[0],
        activation_values=activations[1],
    )


def test_closed_label_sets_start_at_zero(metrics: Metrics) -> None:
    assert value(metrics, "splitfleet_rounds_total", outcome="abandoned") == 0
    assert value(metrics, "splitfleet_batches_discarded_total", reason="not_finite") == 0
    assert value(metrics, "splitfleet_messages_dropped_total", reason="malformed") == 0
    assert value(metrics, "splitfleet_devices", state="offline") == 0
    assert value(metrics, "splitfleet_message_bytes_total", direction="up", role="activation") == 0
    assert value(metrics, "splitfleet_round") == 0


def test_an_accuracy_that_is_not_known_is_absent(metrics: Metrics) -> None:
    metrics.round_ended(1, "closed", {"version": 1})
    assert values(metrics, "splitfleet_server_accuracy") == {}
    assert value(metrics, "splitfleet_parameter_version") == 1


def test_no_created_timestamps_are_exposed(metrics: Metrics) -> None:
    metrics.batch_applied(2, 32, 1.0, 0.1)
    assert "_created" not in generate_latest(metrics.registry).decode()


def test_batches_count_samples_losses_and_time_by_cut(metrics: Metrics) -> None:
    metrics.round_opened(1, 5, 0, 10)
    metrics.batch_applied(2, 32, 2.0, 0.02)
    metrics.batch_applied(2, 30, 1.0, 0.04)
    metrics.batch_applied(5, 8, 3.0, 0.01)
    assert value(metrics, "splitfleet_samples_applied_total", cut="2") == 62
    assert value(metrics, "splitfleet_batches_applied_total", cut="2") == 2
    assert value(metrics, "splitfleet_server_loss", cut="2") == 1.5
    assert value(metrics, "splitfleet_server_loss", cut="5") == 3.0
    assert value(metrics, "splitfleet_training_step_seconds_count", cut="2") == 2
    assert value(metrics, "splitfleet_training_step_seconds_sum", cut="2") == pytest.approx(0.06)


def test_server_loss_begins_anew_with_each_round(metrics: Metrics) -> None:
    metrics.round_opened(1, 5, 0, 10)
    metrics.batch_applied(2, 32, 2.0, 0.02)
    metrics.round_opened(2, 5, 0, 10)
    assert value(metrics, "splitfleet_server_loss", cut="2") == 2.0
    metrics.batch_applied(2, 32, 0.5, 0.02)
    assert value(metrics, "splitfleet_server_loss", cut="2") == 0.5
    assert value(metrics, "splitfleet_round") == 2


def test_rounds_are_counted_by_outcome_and_scores_kept(metrics: Metrics) -> None:
    closed = {"version": 3, "server_accuracy": 0.8, "exit_accuracy": {"2": 0.6, "4": 0.7}}
    metrics.round_ended(3, "closed", dict(closed))
    metrics.round_ended(4, "extended", {})
    metrics.round_ended(4, "abandoned", {})
    assert value(metrics, "splitfleet_rounds_total", outcome="closed") == 1
    assert value(metrics, "splitfleet_rounds_total", outcome="extended") == 1
    assert value(metrics, "splitfleet_rounds_total", outcome="abandoned") == 1
    assert value(metrics, "splitfleet_server_accuracy") == 0.8
    assert value(metrics, "splitfleet_exit_accuracy", cut="4") == 0.7


def test_reasons_are_counted(metrics: Metrics) -> None:
    metrics.message_dropped("malformed")
    metrics.message_dropped("something_new")
    metrics.batch_discarded("wrong_shape")
    metrics.features_answered(2, 0, "version")
    assert value(metrics, "splitfleet_messages_dropped_total", reason="malformed") == 1
    assert value(metrics, "splitfleet_messages_dropped_total", reason="something_new") == 1
    assert value(metrics, "splitfleet_batches_discarded_total", reason="wrong_shape") == 1
    assert value(metrics, "splitfleet_feature_requests_total", outcome="version") == 1


def test_answering_is_counted(metrics: Metrics) -> None:
    for reason in REFUSALS:
        assert value(metrics, "splitfleet_feature_requests_total", outcome=reason) == 0
    metrics.features_answered(2, 5, None)
    metrics.features_answered(2, 3, None)
    metrics.features_answered(4, 0, "overloaded")
    metrics.answer_waited(0.004)
    metrics.answers_computed(2, 8, 0.02)
    metrics.answers_waiting(11)
    metrics.serving(7, pinned=True)
    assert value(metrics, "splitfleet_feature_requests_total", outcome="answered") == 2
    assert value(metrics, "splitfleet_feature_requests_total", outcome="overloaded") == 1
    assert value(metrics, "splitfleet_feature_images_total", cut="2") == 8
    assert value(metrics, "splitfleet_answer_queue_seconds_sum") == 0.004
    assert value(metrics, "splitfleet_answer_batch_images_sum") == 8
    assert value(metrics, "splitfleet_answer_forward_seconds_count") == 1
    assert value(metrics, "splitfleet_answer_queue_images") == 11
    assert value(metrics, "splitfleet_serving_version") == 7
    assert value(metrics, "splitfleet_serving_pinned") == 1


def test_devices_are_online_whatever_they_do(metrics: Metrics) -> None:
    metrics.devices({"training": 3, "waiting": 1, "offline": 2})
    assert value(metrics, "splitfleet_devices", state="online") == 4
    assert value(metrics, "splitfleet_devices", state="offline") == 2
    assert value(metrics, "splitfleet_devices_by_phase", phase="training") == 3
    metrics.devices({"offline": 6})
    assert value(metrics, "splitfleet_devices", state="online") == 0
    assert value(metrics, "splitfleet_devices_by_phase", phase="training") == 0


def test_a_phase_that_a_device_made_up_makes_no_series(metrics: Metrics) -> None:
    before = len(values(metrics, "splitfleet_devices_by_phase"))
    metrics.devices({f"nonsense {number}": 1 for number in range(50)})
    assert len(values(metrics, "splitfleet_devices_by_phase")) == before
    assert value(metrics, "splitfleet_devices_by_phase", phase="other") == 50


def test_bytes_are_summed_over_devices(metrics: Metrics, traffic: Traffic) -> None:
    for device, size in (("d0", 100), ("d1", 50)):
        traffic.received(Address("device", "activations", device=device, direction="up"), size)
    traffic.sent(Address("cut", "parameters", layer=2), 7)
    traffic.sent(Address("device", "parameters", device="d0", direction="down"), 8)
    bytes_of = "splitfleet_message_bytes_total"
    assert value(metrics, bytes_of, direction="up", role="activation") == 150
    assert value(metrics, bytes_of, direction="down", role="parameter") == 15


def test_exit_loss_is_the_mean_of_the_last_reports_of_a_cut(metrics: Metrics) -> None:
    metrics.device_report("d0", 2, report(number=1, exit_loss=9.0))
    metrics.device_report("d0", 2, report(number=2, exit_loss=1.0))
    metrics.device_report("d1", 2, report(number=2, exit_loss=2.0))
    metrics.device_report("d2", 4, report(number=2, exit_loss=4.0))
    assert value(metrics, "splitfleet_exit_loss", cut="2") == 1.5
    assert value(metrics, "splitfleet_exit_loss", cut="4") == 4.0


def test_activation_bits_are_the_mean_of_the_last_reports_of_a_cut(metrics: Metrics) -> None:
    metrics.device_report("d0", 2, report(number=1, activations=(1000, 1000)))
    metrics.device_report("d0", 2, report(number=2, activations=(500, 1000)))
    metrics.device_report("d1", 2, report(number=2, activations=(250, 1000)))
    metrics.device_report("d2", 4, report(number=2))
    assert value(metrics, "splitfleet_activation_bits", cut="2") == 3.0
    assert value(metrics, "splitfleet_activation_bits", cut="4") is None


def test_the_phase_of_the_run_is_one_of_its_phases(metrics: Metrics) -> None:
    metrics.phase("training")
    metrics.phase("inference")
    phases = values(metrics, "splitfleet_run_phase")
    assert sum(phases.values()) == 1
    assert value(metrics, "splitfleet_run_phase", phase="inference") == 1
