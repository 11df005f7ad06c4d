from __future__ import annotations

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from broker.serving_messages import CutPolicy
from broker.telemetry import REFUSALS
from broker.topics import Address
from coordinator.settings import CoordinatorSettings
from coordinator.traffic import Traffic
from ops.metrics import Metrics
from tests.tiny import Clock

Labels = dict[str, str]


@pytest.fixture
def traffic() -> Traffic:
    return Traffic(lambda reason: None)


@pytest.fixture
def metrics(traffic: Traffic) -> Metrics:
    return Metrics(traffic, CoordinatorSettings(codec="int3", parameter_codec="fp16"))


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


def test_closed_label_sets_start_at_zero(metrics: Metrics) -> None:
    assert value(metrics, "splitfleet_rounds_total", outcome="abandoned") == 0
    assert value(metrics, "splitfleet_batches_discarded_total", reason="not_finite") == 0
    assert value(metrics, "splitfleet_messages_dropped_total", reason="malformed") == 0
    assert value(metrics, "splitfleet_devices", state="offline") == 0
    flow = {"direction": "up", "role": "activation", "codec": "int3"}
    assert value(metrics, "splitfleet_message_bytes_total", **flow) == 0
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


def test_a_run_that_goes_on_has_what_its_last_round_came_to(metrics: Metrics) -> None:
    metrics.resumed({"round": 8, "version": 7, "server_accuracy": 0.8, "exit_accuracy": {"2": 0.6}})
    assert value(metrics, "splitfleet_round") == 8
    assert value(metrics, "splitfleet_parameter_version") == 7
    assert value(metrics, "splitfleet_server_accuracy") == 0.8
    assert value(metrics, "splitfleet_exit_accuracy", cut="2") == 0.6
    assert value(metrics, "splitfleet_rounds_total", outcome="closed") == 0


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
    policy = CutPolicy(threshold=0.75, agreement=0.9)
    metrics.serving(6, pinned=False, cuts={"3": policy})
    metrics.serving(7, pinned=True, cuts={"2": policy})
    assert values(metrics, "splitfleet_served_threshold") == {(("cut", "2"),): 0.75}
    assert values(metrics, "splitfleet_served_agreement_ratio") == {(("cut", "2"),): 0.9}
    assert values(metrics, "splitfleet_served_accuracy_ratio") == {}
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
    assert value(metrics, bytes_of, direction="up", role="activation", codec="int3") == 150
    assert value(metrics, bytes_of, direction="down", role="parameter", codec="fp16") == 15


def test_rounds_are_timed_and_late_work_has_an_age(metrics: Metrics) -> None:
    late = [{"staleness": 1}, {"staleness": 3}]
    metrics.round_ended(1, "closed", {"version": 1, "seconds": 4.0, "late": late})
    assert value(metrics, "splitfleet_round_seconds_sum") == 4
    assert value(metrics, "splitfleet_late_versions_count") == 2
    assert value(metrics, "splitfleet_late_versions_bucket", le="1.0") == 1


def test_the_newest_checkpoint_has_a_size_and_a_time(metrics: Metrics) -> None:
    metrics.checkpoint(5000, written=1.7e9)
    assert value(metrics, "splitfleet_checkpoint_bytes") == 5000
    assert value(metrics, "splitfleet_checkpoint_timestamp_seconds") == 1.7e9


def test_the_broker_is_up_as_long_as_there_is_a_connection(metrics: Metrics) -> None:
    assert value(metrics, "splitfleet_broker_up") == 0
    for up in (True, False, True):
        metrics.connection(up=up)
    assert value(metrics, "splitfleet_broker_up") == 1
    metrics.connection(up=False)
    assert value(metrics, "splitfleet_broker_up") == 0
    assert value(metrics, "splitfleet_coordinator_connections_total") == 2


def test_what_the_broker_says_of_itself_is_shown(metrics: Metrics, traffic: Traffic) -> None:
    assert values(metrics, "splitfleet_broker_messages_dropped_total") == {}
    traffic.system("$SYS/broker/publish/messages/dropped", b"12")
    traffic.system("$SYS/broker/clients/connected", b"3")
    for topic, payload in (
        ("$SYS/broker/clients/connected", b"many"),
        ("$SYS/broker/clients/connected", b"9" * 50),
        ("$SYS/broker/version", b"7"),
    ):
        traffic.system(topic, payload)
    assert value(metrics, "splitfleet_broker_messages_dropped_total") == 12
    assert value(metrics, "splitfleet_broker_clients") == 3
    traffic.overruns = lambda: 4
    assert value(metrics, "splitfleet_link_overruns_total") == 4


def test_bytes_have_the_codec_of_their_role(traffic: Traffic) -> None:
    metrics = Metrics(traffic, CoordinatorSettings(codec="int3", gradient_codec="int8"))
    traffic.received(Address("device", "activations", device="d0", direction="up"), 100)
    labels = {"direction": "up", "role": "activation", "codec": "int3"}
    assert value(metrics, "splitfleet_message_bytes_total", **labels) == 100
    labels = {"direction": "down", "role": "control", "codec": "none"}
    assert value(metrics, "splitfleet_message_bytes_total", **labels) == 0


def test_a_round_that_runs_has_an_age(traffic: Traffic) -> None:
    clock = Clock()
    metrics = Metrics(traffic, CoordinatorSettings(round_deadline_s=60.0), clock=clock)
    assert value(metrics, "splitfleet_round_deadline_seconds") == 60
    assert value(metrics, "splitfleet_round_age_seconds") == 0
    metrics.round_opened(1, 5, 0, 10)
    clock.advance(70)
    metrics.round_ended(1, "extended", {})
    assert value(metrics, "splitfleet_round_age_seconds") == 70
    metrics.connection(up=False)
    clock.advance(5000)
    metrics.connection(up=False)
    assert value(metrics, "splitfleet_round_age_seconds") == 70
    metrics.connection(up=True)
    clock.advance(1)
    assert value(metrics, "splitfleet_round_age_seconds") == 71
    metrics.round_ended(1, "abandoned", {})
    assert value(metrics, "splitfleet_round_age_seconds") == 0


def test_coding_is_timed(metrics: Metrics) -> None:
    assert value(metrics, "splitfleet_server_codec_seconds_count", stage="encode") == 0
    metrics.codec_took("decode", 0.25)
    assert value(metrics, "splitfleet_server_codec_seconds_sum", stage="decode") == 0.25


def test_the_phase_of_the_run_is_one_of_its_phases(metrics: Metrics) -> None:
    metrics.phase("training")
    metrics.phase("inference")
    phases = values(metrics, "splitfleet_run_phase")
    assert sum(phases.values()) == 1
    assert value(metrics, "splitfleet_run_phase", phase="inference") == 1
