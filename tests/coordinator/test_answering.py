from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from broker.serving_messages import Features, Prediction
from broker.training_messages import Report, Round
from coordinator.run import REPORTS_S
from tensors.codecs import encode_exact
from tensors.decoding import decode
from tensors.networks import build_network, write_state
from tests.fake_coordinator import Harness, inference_report, only
from tests.server_side import (
    FP32,
    SHAPES,
    features_at,
    poisoned_features,
)
from tests.tiny import SPEC


def trained_server() -> Harness:
    server = Harness(rounds=1, inference=True, min_devices=2)
    server.join("a", 2, test_samples=4)
    server.join("b", 5, test_samples=4)
    server.train("a", "b")
    return server


def features_of(server: Harness, tensor: bytes, **changes: Any) -> Features:
    fields: dict[str, Any] = {
        "run": server.round.run,
        "request": 3,
        "version": server.round.version,
        "deadline_ms": 1000,
        "tensor": tensor,
    }
    return Features(**(fields | changes))


def test_features_are_answered_by_the_merged_network() -> None:
    server = trained_server()
    assert server.round.phase == "inference"
    features = features_at(2, seed=9, size=5)
    said = server.hear("a", features_of(server, FP32.encode(features)))
    prediction = only(Prediction, said, "a")
    assert prediction.tensor is not None
    network = build_network(SPEC)
    write_state(network, server.checkpoint().model.state)
    with torch.no_grad():
        expected = network.eval()(torch.from_numpy(features), start=2).softmax(1).numpy()
    np.testing.assert_allclose(decode(prediction.tensor), expected, rtol=1e-4, atol=1e-6)
    assert (prediction.request, prediction.version) == (3, 1)
    assert server.observer.answers == [(2, 5, None)]


def test_answering_does_not_wait_for_the_end_of_training() -> None:
    server = Harness(rounds=2)
    server.join("a", 2)
    server.train("a")
    server.send("a", 0)
    tensor = FP32.encode(features_at(2))
    one = only(Prediction, server.hear("a", features_of(server, tensor)))
    server.send("a", 1)
    two = only(Prediction, server.hear("a", features_of(server, tensor)))
    assert one.tensor == two.tensor, "training does not show before its round is closed"
    assert one.refused is None


BAD_FEATURES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "bad_tensor"),
    "rubbish": (b"rubbish", "bad_tensor"),
    "of another cut": (FP32.encode(features_at(5)), "wrong_shape"),
    "no image": (FP32.encode(features_at(2)[:0]), "wrong_shape"),
    "one image without its dimension": (FP32.encode(features_at(2)[0]), "wrong_shape"),
    "a number": (FP32.encode(np.array(3, np.float32)), "wrong_shape"),
    "double precision": (encode_exact(np.ones((2, *SHAPES[1]), np.float64)), "wrong_shape"),
    "whole numbers": (encode_exact(np.ones((2, *SHAPES[1]), np.int64)), "wrong_shape"),
    "not a number": (poisoned_features(), "not_finite"),
    "more than a batch": (FP32.encode(features_at(2, size=9)), "bad_tensor"),
}


@pytest.mark.parametrize("what", BAD_FEATURES)
def test_features_that_cannot_be_answered_are_refused_with_a_reason(
    what: str,
) -> None:
    tensor, reason = BAD_FEATURES[what]
    server = trained_server()
    prediction = only(Prediction, server.hear("a", features_of(server, tensor)), "a")
    assert prediction.tensor is None
    assert prediction.refused == reason
    assert server.observer.answers[0][2] == reason


def test_features_of_a_version_that_is_not_there_are_refused() -> None:
    server = trained_server()
    features = features_of(server, FP32.encode(features_at(2)), version=2)
    assert only(Prediction, server.hear("a", features), "a").refused == "version"


def test_before_anything_is_trained_nothing_is_answered() -> None:
    server = trained_server()
    features = features_of(server, FP32.encode(features_at(2)), version=0)
    assert only(Prediction, server.hear("a", features), "a").refused == "untrained"


def test_a_cut_whose_exit_nobody_trained_is_answered_by_the_blocks_behind_it() -> None:
    server = trained_server()
    server.join("c", 3)
    said = server.hear("c", features_of(server, FP32.encode(features_at(3))))
    assert only(Prediction, said, "c").tensor is not None


def test_a_device_that_never_said_hello_is_told_so() -> None:
    server = trained_server()
    said = server.hear("d", features_of(server, FP32.encode(features_at(2))))
    assert only(Prediction, said, "d").refused == "unknown_device"
    assert server.core._registry.find("d") is None, "questions do not fill the registry"


def test_the_run_ends_when_all_have_reported() -> None:
    server = trained_server()
    server.hear("a", inference_report(server))
    assert not server.core.finished
    said = server.hear("b", inference_report(server, images=7))
    assert server.core.finished
    assert only(Round, said).phase == "finished"
    (path,) = server.folder.glob("*/result.json")
    result = json.loads(path.read_text())
    assert [d["device"] for d in result["devices"]] == ["a", "b"]
    assert [d["inference"]["images"] for d in result["devices"]] == [4, 7]
    assert [d["samples"] for d in result["devices"]] == [24, 24]
    assert result["rounds"] == 1
    assert len(result["history"]) == 1
    assert result["traffic"] == {"up/activation/a": 7}


def test_the_run_ends_at_the_deadline_without_those_who_do_not_report() -> None:
    server = trained_server()
    server.hear("a", inference_report(server))
    server.wait(server.settings.inference_deadline_s + 1)
    assert server.core.finished


def test_a_device_that_leaves_is_not_waited_for() -> None:
    server = trained_server()
    server.hear("a", inference_report(server))
    server.offline("b")
    assert server.core.finished


def test_a_report_about_other_parameters_does_not_count() -> None:
    server = trained_server()
    report = inference_report(server, version=0)
    server.hear("a", report)
    server.hear("b", report)
    assert not server.core.finished


def test_without_inference_the_run_ends_with_its_last_round() -> None:
    server = Harness(rounds=1, inference=False)
    server.join("a", 2)
    server.train("a")
    assert not server.core.finished, "the device has not given its account"
    said = server.wait(REPORTS_S)
    assert only(Round, said).phase == "finished"
    assert server.core.finished
    assert server.core.next_tick is None


def test_a_run_without_inference_ends_with_the_last_account() -> None:
    server = Harness(rounds=1, inference=False)
    server.join("a", 2)
    run, number, attempt = server.round.stamp
    server.train("a")
    said = server.hear("a", Report(run=run, round=number, attempt=attempt, produced=3, applied=3))
    assert only(Round, said).phase == "finished"
    assert server.checkpoint().history[0]["devices"]["a"]["finished"]
