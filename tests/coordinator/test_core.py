from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.messages import (
    Assignment,
    Command,
    Coordinator,
    Envelope,
    Features,
    Gradients,
    Inference,
    Manifest,
    Message,
    Parameters,
    Prediction,
    Receipt,
    Report,
    Request,
    Round,
    Status,
)
from coordinator.errors import ResumeError
from tensors.codecs import decode, encode_exact, parse_codec
from tensors.networks import build_network, write_state
from tensors.parameters import unpack_parameters
from tests.fake_coordinator import Harness, every, only
from tests.fake_device import make_measurement
from tests.server_side import (
    SHAPES,
    STATE,
    features_at,
    make_activations,
    make_upload,
    trained_half,
)
from tests.tiny import CLASSES, SPEC, assert_same, differs, make_hello

FP32 = parse_codec("fp32")


def closed(server: Harness) -> int:
    return server.checkpoint().round


def inference_report(server: Harness, **changes: Any) -> Report:
    fields: dict[str, Any] = dict.fromkeys(
        [name for name, field in Inference.model_fields.items() if name != "threshold"], 0
    )
    fields |= {"version": server.round.version, "threshold": 0.5, "images": 4, "exits": 4}
    run, number, attempt = server.round.stamp
    return Report(run=run, round=number, attempt=attempt, inference=Inference(**fields | changes))


# -- devices come ---------------------------------------------------------------------------------


def test_a_hello_is_answered_with_an_assignment_and_the_manifest() -> None:
    server = Harness(min_devices=2)
    said = server.join("a", 3)
    assignment = only(Assignment, said, "a")
    assert assignment.cut == 3
    assert assignment.quota == 3
    assert assignment.network.name == "resnet18"
    assert only(Manifest, said).version == 0
    assert server.round.phase == "gathering"


def test_the_quota_without_a_fixed_one_is_a_pass_over_the_devices_images() -> None:
    server = Harness(batches_per_round=None, min_devices=2)
    assert only(Assignment, server.join("a", 3, samples=50), "a").quota == 6


def test_a_device_without_a_cut_is_measured_first() -> None:
    server = Harness(step_budget_ms=5.0, memory_budget_mb=100)
    said = server.online("a") + server.hear("a", make_hello(cut=None))
    assert only(Assignment, said).cut is None
    assert not every(Round, said), "it cannot take part yet"
    measured = make_hello(cut=None, measurement=make_measurement())
    said = server.hear("a", measured)
    assert only(Assignment, said).cut == 4, "four blocks and the exit take five milliseconds"
    assert server.round.phase == "training"
    said = server.hear("a", make_hello(cut=None))
    assert only(Assignment, said).cut == 4, "it keeps the cut it has"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"image": (3, 8, 8)}, r"images are \(3, 8, 8\)"),
        ({"image": (1, 28, 28)}, "the network takes"),
        ({"classes": CLASSES + 1}, "5 classes"),
        ({"samples": 0}, "no training images"),
        ({"cut": 10}, "cuts 1 to 9"),
    ],
)
def test_a_device_that_does_not_fit_is_told_why(changes: dict[str, Any], reason: str) -> None:
    server = Harness()
    said = server.online("a") + server.hear("a", make_hello(**changes))
    command = only(Command, said, "a")
    assert command.command == "stop"
    assert re.search(reason, command.reason)
    assert not every(Round, said)
    said = server.hear("a", make_hello(cut=2))
    assert only(Assignment, said).cut == 2, "when it has been put right it may come in"


def test_a_round_opens_when_enough_devices_are_there() -> None:
    server = Harness(min_devices=2)
    assert not every(Round, server.join("a", 2))
    said = server.join("b", 5)
    announced = only(Round, said)
    assert announced.phase == "training"
    assert (announced.round, announced.attempt, announced.version) == (1, 0, 0)


def test_devices_that_are_not_online_do_not_count() -> None:
    server = Harness()
    server.hear("a", make_hello())
    assert server.round.phase == "gathering"
    server.online("a")
    assert server.round.phase == "training"


def test_a_last_will_of_an_earlier_connection_says_nothing() -> None:
    server = Harness(min_devices=2)
    server.join("a", 2)
    server.online("a", "c2")
    server.offline("a", "c1")
    server.join("b", 5)
    assert server.round.phase == "training"


def test_a_full_fleet_takes_nobody_more() -> None:
    server = Harness(max_devices=1, min_devices=1)
    server.online("a")
    assert server.join("b", 2) == []
    assert server.observer.dropped["fleet_full"] == 2


def test_a_reconnected_coordinator_says_everything_that_is_retained_again() -> None:
    server = Harness()
    server.join("a", 3)
    said = server.core.connected()
    assert only(Coordinator, said).state == "online"
    assert only(Assignment, said, "a").cut == 3
    assert only(Manifest, said).version == 0
    assert only(Round, said) == server.round
    retained = [e for e in said if e.address.retained]
    assert retained == said, "and only that"


def test_no_tensor_is_retained() -> None:
    server = Harness()
    server.join("a", 2)
    server.train("a")
    server.hear("a", Request(what="parameters"))
    for envelope in server.said:
        if envelope.address.retained:
            assert not isinstance(envelope.message, (Parameters, Gradients, Prediction))


# -- parameters -----------------------------------------------------------------------------------


def test_parameters_are_those_of_the_devices_half_and_match_the_manifest() -> None:
    server = Harness()
    server.join("a", 3)
    said = server.hear("a", Request(what="parameters"))
    parameters, manifest = only(Parameters, said, "a"), only(Manifest, said)
    assert manifest.sha256 == hashlib.sha256(parameters.state).hexdigest()
    assert manifest.size == len(parameters.state)
    assert (manifest.version, manifest.trained) == (0, False)
    assert_same(
        unpack_parameters(parameters.state), {n: STATE[n] for n in trained_half(3)}
    )


def test_a_stranger_gets_no_parameters_and_a_probe_no_answer() -> None:
    server = Harness()
    assert server.hear("a", Request(what="parameters")) == []
    assert server.hear("a", Request(what="probe", padding=bytes(1000))) == []


# -- a round --------------------------------------------------------------------------------------


def test_joining_the_round_is_answered_with_a_receipt_and_another_with_the_announcement() -> None:
    server = Harness()
    server.join("a", 2)
    run, number, attempt = server.round.stamp
    join = Request(what="join", run=run, round=number, attempt=attempt)
    receipt = only(Receipt, server.hear("a", join), "a")
    assert receipt.participant
    assert receipt.stamp == server.round.stamp
    for stale in (
        join.model_copy(update={"attempt": 9}),
        join.model_copy(update={"round": 7}),
        join.model_copy(update={"run": "other"}),
    ):
        assert only(Round, server.hear("a", stale)) == server.round
    assert server.observer.dropped == {"stale_join": 3}


def test_a_device_that_comes_during_a_round_waits_for_the_next() -> None:
    server = Harness()
    server.join("a", 2)
    server.join("b", 5)
    run, number, attempt = server.round.stamp
    join = Request(what="join", run=run, round=number, attempt=attempt)
    assert not only(Receipt, server.hear("b", join), "b").participant
    server.train("a")
    run, number, attempt = server.round.stamp
    join = Request(what="join", run=run, round=number, attempt=attempt)
    assert only(Receipt, server.hear("b", join), "b").participant


def test_a_round_in_which_all_finish_is_closed_merged_and_followed_by_the_next() -> None:
    server = Harness(min_devices=2, rounds=2)
    server.join("a", 2)
    server.join("b", 5)
    said = server.train("a", "b")
    checkpoint = server.checkpoint()
    assert (checkpoint.round, checkpoint.version) == (1, 1)
    assert checkpoint.trained_cuts == [2, 5]
    assert_same(
        {"x": checkpoint.model.state["heads.5.0.fc.weight"]},
        {"x": trained_half(5)["heads.5.0.fc.weight"]},
    )
    assert len(every(Gradients, said, "a")) == 3
    assert [r.final for r in every(Receipt, said, "b")][-1]
    broadcast = {p.cut: p for p in every(Parameters, said)}
    assert broadcast.keys() == {2, 5}
    for cut, parameters in broadcast.items():
        assert_same(
            unpack_parameters(parameters.state),
            {n: checkpoint.model.state[n] for n in trained_half(cut)},
        )
    announced = only(Round, said)
    assert (announced.round, announced.version, announced.phase) == (2, 1, "training")
    assert server.observer.outcomes == [(1, "closed")]


def test_messages_of_another_attempt_or_run_change_nothing() -> None:
    server = Harness()
    server.join("a", 2)
    stamp = server.round.stamp
    for other in ((stamp[0], 1, 7), (stamp[0], 2, 0), ("other", 1, 0)):
        assert server.hear("a", make_activations(other, 0, cut=2, version=0)) == []
        assert server.hear("a", make_upload(other, cut=2, version=0, produced=3)) == []
    assert server.observer.discarded == {"stale_attempt": 2, "foreign_run": 1}
    assert server.observer.dropped == {"stale_attempt": 3}
    assert closed(server) == 0


def test_below_quorum_a_round_is_extended_once_then_abandoned_and_the_weights_restored() -> None:
    server = Harness(min_devices=3, quorum=0.6, rounds=3, round_deadline_s=100)
    for name in "abc":
        server.join(name, 2)
    server.send("a", 0, 1, 2)
    server.upload("a")
    server.wait(150)
    assert server.observer.outcomes == [(1, "extended")]
    said = server.wait(60)
    assert server.observer.outcomes == [(1, "extended"), (1, "abandoned")]
    announced = only(Round, said)
    assert (announced.round, announced.version) == (2, 0), "another round, the same weights"
    assert closed(server) == 0
    server.train("a", "b", "c")
    fresh = Harness(min_devices=3)
    for name in "abc":
        fresh.join(name, 2)
    fresh.train("a", "b", "c")
    assert_same(server.checkpoint().model.state, fresh.checkpoint().model.state)


def test_an_extended_round_may_still_close() -> None:
    server = Harness(min_devices=2, quorum=1.0, round_deadline_s=100)
    server.join("a", 2)
    server.join("b", 2)
    server.send("a", 0)
    server.upload("a")
    server.wait(150)
    server.send("b", 0)
    server.upload("b")
    assert server.observer.outcomes == [(1, "extended"), (1, "closed")]


def test_at_the_deadline_quorum_is_enough() -> None:
    server = Harness(min_devices=2, quorum=0.5, round_deadline_s=100)
    server.join("a", 2)
    server.join("b", 5)
    server.send("a", 0, 1, 2)
    server.upload("a")
    server.send("b", 0)
    server.wait(99)
    assert closed(server) == 0
    server.wait(2)
    assert closed(server) == 1
    history = server.checkpoint().history
    books = {n: d["account"] for n, d in history[0]["devices"].items()}
    assert books["b"]["applied"] == 1
    assert not history[0]["devices"]["b"]["finished"]


def test_an_upload_that_is_too_late_is_answered_but_not_merged() -> None:
    server = Harness(min_devices=2, quorum=0.5, round_deadline_s=100, rounds=3)
    server.join("a", 2)
    server.join("b", 5)
    server.send("b", 0)
    late = make_upload(server.round.stamp, cut=5, version=0, produced=3)
    server.upload("a")
    server.wait(101)
    merged = server.checkpoint().model.state
    receipt = only(Receipt, server.hear("b", late), "b")
    assert receipt.final
    assert server.observer.dropped["late_parameters"] == 1
    assert_same(server.checkpoint().model.state, merged)


def test_an_abandoned_round_without_devices_says_that_it_waits_for_some() -> None:
    server = Harness(min_devices=1, round_deadline_s=100)
    server.join("a", 2)
    server.offline("a")
    said = server.wait(201)
    assert only(Round, said).phase == "gathering"
    server.wait(1000)
    assert only(Round, server.online("a")).phase == "training"


def test_a_closed_round_without_devices_for_the_next_says_so_too() -> None:
    server = Harness(min_devices=2, quorum=1.0)
    server.join("a", 2)
    server.join("b", 2)
    server.send("a", 0)
    server.send("b", 0)
    server.upload("a")
    server.offline("b")
    said = server.upload("b")
    assert only(Round, said).phase == "gathering"
    assert only(Round, said).version == 1
    server.wait(1000)


# -- a restart ------------------------------------------------------------------------------------


def test_a_restarted_coordinator_raises_the_attempt_and_starts_from_the_last_closed_round() -> None:
    first = Harness(min_devices=2, rounds=3)
    first.join("a", 2)
    first.join("b", 5)
    first.train("a", "b")
    first.send("a", 0, 1)
    interrupted = first.round
    assert (interrupted.round, interrupted.attempt) == (2, 0)
    kept = first.checkpoint().model.state

    second = Harness(first.folder, min_devices=2, rounds=3)
    assert second.round.phase == "gathering"
    assert second.round.run == interrupted.run
    assert second.round.version == interrupted.version
    assert_same(second.checkpoint().model.state, kept)
    said = second.join("a", 2) + second.join("b", 5)
    announced = only(Round, said)
    assert (announced.round, announced.attempt, announced.version) == (2, 1, 1)
    second.hear("a", make_activations(interrupted.stamp, 2, cut=2, version=1))
    assert second.observer.discarded == {"stale_attempt": 1}
    second.train("a", "b")
    assert second.checkpoint().version == 2

    third = Harness(first.folder, min_devices=2, rounds=3)
    said = third.join("a", 2) + third.join("b", 5)
    assert only(Round, said).stamp == (announced.run, 3, 1)


def test_the_result_of_a_repeated_attempt_is_that_of_an_undisturbed_one() -> None:
    calm, restarted = Harness(rounds=2), Harness(rounds=2)
    calm.join("a", 2)
    calm.train("a")
    calm.train("a")
    restarted.join("a", 2)
    restarted.train("a")
    restarted.send("a", 0, 1)
    restarted = Harness(restarted.folder, rounds=2)
    restarted.join("a", 2)
    restarted.train("a")
    assert_same(restarted.checkpoint().model.state, calm.checkpoint().model.state)
    assert_same(restarted.checkpoint().model.momentum, calm.checkpoint().model.momentum)


def test_after_a_restart_known_devices_are_waited_for_but_not_for_ever() -> None:
    first = Harness(min_devices=2, rounds=3, quorum=0.5)
    first.join("a", 2)
    first.join("b", 5)
    first.train("a", "b")
    second = Harness(first.folder, min_devices=2, rounds=3, quorum=0.5, return_wait_s=15)
    second.online("a")
    assert second.round.phase == "gathering"
    second.cuts = first.cuts
    second.wait(14)
    assert second.round.phase == "gathering"
    second.wait(2)
    assert second.round.phase == "training"
    second.train("a")
    assert second.checkpoint().version == 2


def test_after_a_restart_without_any_device_it_waits_in_peace() -> None:
    first = Harness()
    first.join("a", 2)
    first.train("a")
    second = Harness(first.folder)
    second.wait(1000)
    second.online("a")
    assert second.round.phase == "training"


def test_what_devices_did_before_a_restart_is_remembered() -> None:
    first = Harness(rounds=2)
    first.join("a", 2, samples=64)
    first.train("a")
    second = Harness(first.folder, rounds=2)
    second.join("a", 2)
    second.train("a")
    (device,) = second.checkpoint().registry
    assert (device["name"], device["rounds"], device["samples"]) == ("a", 2, 48)
    assert len(second.checkpoint().history) == 2
    assert second.checkpoint().traffic == {"up/activation/a": 14}


def test_another_configuration_does_not_resume() -> None:
    first = Harness()
    with pytest.raises(ResumeError, match=r"strategy = 'averaging'.*'sequential'.*--fresh"):
        Harness(first.folder, strategy="sequential")


def test_fresh_starts_over_and_keeps_the_old_run() -> None:
    first = Harness()
    first.join("a", 2)
    first.train("a")
    second = Harness(first.folder, fresh=True, strategy="sequential")
    assert second.round.run != first.round.run
    assert second.round.version == 0
    assert second.checkpoint().round == 0
    assert len([p for p in first.folder.iterdir() if p.is_dir()]) == 2


def test_a_restart_after_the_last_round_goes_on_with_the_inference() -> None:
    first = Harness(rounds=1, inference=True)
    first.join("a", 2, test_samples=4)
    first.train("a")
    second = Harness(first.folder, rounds=1, inference=True)
    assert second.round.phase == "inference"
    second.online("a")
    second.wait(60)
    second.hear("a", inference_report(second))
    assert second.core.finished


# -- answering ------------------------------------------------------------------------------------


def trained_server() -> Harness:
    server = Harness(rounds=1, inference=True, min_devices=2)
    server.join("a", 2, test_samples=4)
    server.join("b", 5, test_samples=4)
    server.train("a", "b")
    return server


def features_of(server: Harness, tensor: bytes, **changes: Any) -> Features:
    fields = {"request": 3, "version": server.round.version, "deadline_ms": 1000, "tensor": tensor}
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
    assert one == two, "training does not show before its round is closed"
    assert one.refused is None


def poisoned() -> bytes:
    features = features_at(2)
    features[0] = np.nan
    return FP32.encode(features)


BAD_FEATURES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "bad_tensor"),
    "rubbish": (b"rubbish", "bad_tensor"),
    "of another cut": (FP32.encode(features_at(5)), "wrong_shape"),
    "no image": (FP32.encode(features_at(2)[:0]), "wrong_shape"),
    "one image without its dimension": (FP32.encode(features_at(2)[0]), "wrong_shape"),
    "a number": (FP32.encode(np.array(3, np.float32)), "wrong_shape"),
    "double precision": (encode_exact(np.ones((2, *SHAPES[1]), np.float64)), "wrong_shape"),
    "whole numbers": (encode_exact(np.ones((2, *SHAPES[1]), np.int64)), "wrong_shape"),
    "not a number": (poisoned(), "not_finite"),
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


def test_features_for_other_parameters_are_refused() -> None:
    server = trained_server()
    features = features_of(server, FP32.encode(features_at(2)), version=0)
    assert only(Prediction, server.hear("a", features), "a").refused == "version"


def test_a_cut_that_nobody_trained_never_answers() -> None:
    server = trained_server()
    server.join("c", 3)
    said = server.hear("c", features_of(server, FP32.encode(features_at(3))))
    assert only(Prediction, said, "c").refused == "untrained"


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
    said = server.train("a")
    assert only(Round, said).phase == "finished"
    assert server.core.finished
    assert server.core.next_tick is None


# -- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["averaging", "sequential"])
@pytest.mark.parametrize("feedback", ["gradient", "none"])
def test_every_strategy_and_feedback_trains_both_halves(strategy: str, feedback: str) -> None:
    server = Harness(rounds=1, min_devices=2, strategy=strategy, feedback=feedback)
    server.join("a", 2)
    server.join("b", 5)
    said = server.train("a", "b")
    assert bool(every(Gradients, said)) is (feedback == "gradient")
    changed = differs(server.checkpoint().model.state, STATE)
    assert {"blocks.0.conv.weight", "blocks.3.conv1.weight", "blocks.9.fc.weight"} <= changed


# -- anything, in any order -----------------------------------------------------------------------

STAMPS = st.tuples(
    st.sampled_from(["current", "current", "other"]), st.integers(0, 2), st.integers(0, 1)
)
TENSORS = st.sampled_from(
    [
        b"",
        b"rubbish",
        FP32.encode(features_at(2)),
        FP32.encode(features_at(5)),
        encode_exact(np.ones((8, *SHAPES[1]), np.float64)),
        encode_exact(np.ones(3, np.int64)),
        poisoned(),
    ]
)


def resolve(server: Harness, run: str) -> str:
    return server.round.run if run == "current" else "other"


@settings(max_examples=40, deadline=None)
@given(data=st.data(), steps=st.integers(0, 25))
def test_whatever_devices_say_in_whatever_order_nothing_breaks(
    data: st.DataObject, steps: int
) -> None:
    server = Harness(rounds=2, inference=True, min_devices=2, batches_per_round=2)
    if data.draw(st.booleans()):
        server.join("a", 2)
        server.join("b", 5)
    for _ in range(steps):
        if server.core.finished:
            break
        device = data.draw(st.sampled_from("abc"))
        what = data.draw(st.sampled_from(["good", "message", "message", "wait"]))
        if what == "wait":
            server.wait(data.draw(st.sampled_from([0.1, 1.0, 60.0, 200.0])))
        elif what == "good" and device in server.cuts:
            batch = data.draw(st.integers(0, 2))
            server.send(device, batch) if batch < 2 else server.upload(device)
        else:
            server.hear(device, data.draw(messages(server)))
    for record in server.checkpoint().history:
        for entry in record["devices"].values():
            account = entry["account"]
            assert account["produced"] == (
                account["applied"] + sum(account["discarded"].values()) + account["expired"]
            )
            assert entry["samples"] == 8 * account["applied"]
    state = server.checkpoint().model.state
    assert all(np.isfinite(values).all() for values in state.values())


def messages(server: Harness) -> st.SearchStrategy[Message]:
    numbers = st.integers(0, 3)
    return st.one_of(
        st.builds(
            make_hello,
            cut=st.sampled_from([None, 1, 2, 5, 9, 10]),
            samples=st.sampled_from([0, 64]),
            classes=st.integers(CLASSES, CLASSES + 1),
            test_samples=numbers,
            measurement=st.sampled_from([None, make_measurement(), make_measurement(exit_ms=[])]),
        ),
        st.builds(
            Status,
            state=st.sampled_from(["online", "online", "offline"]),
            connection=st.sampled_from(["c1", "c2"]),
        ),
        STAMPS.flatmap(
            lambda stamp: st.builds(
                make_activations,
                st.just((resolve(server, stamp[0]), *stamp[1:])),
                numbers,
                cut=st.just(2),
                version=numbers,
                tensor=TENSORS,
                labels=st.lists(st.integers(0, CLASSES), min_size=1, max_size=9),
            )
        ),
        STAMPS.flatmap(
            lambda stamp: st.builds(
                make_upload,
                st.just((resolve(server, stamp[0]), *stamp[1:])),
                cut=st.sampled_from([2, 5]),
                version=numbers,
                produced=numbers,
            )
        ),
        st.builds(Features, request=numbers, version=numbers, deadline_ms=st.just(1), tensor=TENSORS),
        st.builds(
            Request,
            what=st.sampled_from(["parameters", "join", "probe"]),
            run=st.sampled_from([None, server.round.run, "other"]),
            round=numbers,
            attempt=numbers,
        ),
        st.builds(inference_report, st.just(server), version=numbers),
        st.builds(Report, run=st.just(server.round.run), round=numbers, attempt=numbers),
    )


def test_a_message_a_device_has_no_business_to_send_is_dropped() -> None:
    server = Harness()
    address = server.join("a", 2)[0].address
    stray = Envelope(address, Coordinator(state="offline", boot="x"))
    assert server.core.receive(stray) == []
    assert server.observer.dropped == {"unexpected_topic": 1}


def test_the_folder_holds_the_run(tmp_path: Path) -> None:
    server = Harness(tmp_path)
    assert (tmp_path / "current").read_text() == server.round.run
