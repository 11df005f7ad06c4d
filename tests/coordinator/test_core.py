from __future__ import annotations

import hashlib
import re
from typing import Any

import pytest

from broker.messages import Assignment, Command, Coordinator, Manifest, Parameters, Request
from broker.serving_messages import Prediction
from broker.training_messages import Gradients, Receipt, Round
from coordinator.aggregation import half_of
from coordinator.run import SAY_AGAIN_S
from tensors.deltas import apply_delta, fingerprint, whole_pack
from tensors.parameters import pack_parameters, unpack_parameters
from tests.fake_coordinator import Harness, every, only
from tests.fake_device import make_measurement
from tests.server_side import (
    STATE,
    make_activations,
    make_upload,
    trained_half,
)
from tests.tiny import CLASSES, assert_same, differs, make_hello


def closed(server: Harness) -> int:
    return server.checkpoint().round


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
        ({"protocol": 2}, "version 2 of the protocol"),
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


def test_a_device_that_is_retired_in_a_round_is_waited_for_no_longer_than_any_other() -> None:
    server = Harness(min_devices=2, quorum=0.5, round_deadline_s=60)
    server.join("a", 2)
    server.join("b", 5)
    server.send("a", 0, 1, 2)
    server.send("b", 0)
    server.core.retire(frozenset({"b"}))
    server.send("b", 1)
    assert server.observer.dropped["retired"] == 1
    server.upload("a")
    server.wait(61)
    assert (1, "closed") in server.observer.outcomes
    assert [entry["name"] for entry in server.checkpoint().registry] == ["a"]
    server.core.retire(frozenset())
    assert only(Assignment, server.join("b", 5), "b").cut == 5


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
    parameters, manifest = only(Parameters, said, "a"), only(Manifest, server.said)
    assert manifest.sha256 == hashlib.sha256(parameters.state).hexdigest()
    assert manifest.size == len(parameters.state)
    assert (manifest.version, manifest.trained) == (0, False)
    assert_same(unpack_parameters(parameters.state), {n: STATE[n] for n in trained_half(3)})


def test_after_a_round_devices_are_sent_what_changed() -> None:
    server = Harness(rounds=2, parameter_codec="int8+zstd", min_devices=2)
    server.join("a", 2)
    server.join("b", 3)
    for version in (1, 2):
        before = server.checkpoint().model.state
        said = server.train("a", "b")
        after = server.checkpoint().model.state
        manifests = {m.size: m for m in every(Manifest, said)}
        for parameters in every(Parameters, said):
            assert (parameters.version, parameters.base) == (version, version - 1)
            half = half_of(after, parameters.cut)
            assert_same(apply_delta(half_of(before, parameters.cut), parameters.state), half)
            manifest = manifests[len(whole_pack(half))]
            assert (manifest.version, manifest.base) == (version, version - 1)
            assert manifest.sha256 == fingerprint(half)
    answer = only(Parameters, server.hear("a", Request(what="parameters")), "a")
    assert answer.base is None
    assert_same(unpack_parameters(answer.state), half_of(after, 2))


def test_parameters_too_large_for_their_codec_are_sent_without_it() -> None:
    server = Harness(rounds=1, parameter_codec="fp16")
    server.join("a", 2)
    server.send("a", 0)
    state, name = trained_half(2), "blocks.0.conv.weight"
    state[name][0] = 1e6
    said = server.upload("a", state=pack_parameters(state))
    parameters = apply_delta(half_of(STATE, 2), only(Parameters, said).state)
    assert (parameters[name][0] == 1e6).all()


def test_a_stranger_gets_no_parameters_and_a_probe_no_answer() -> None:
    server = Harness()
    assert server.hear("a", Request(what="parameters")) == []
    assert server.hear("a", Request(what="probe", padding=bytes(1000))) == []


def test_who_asks_for_parameters_without_end_is_answered_now_and_then() -> None:
    server = Harness(min_devices=2, device_answer_bytes_per_s=1000, device_burst_s=1)
    server.join("greedy", 2)
    server.join("honest", 2)
    asked = Request(what="parameters")
    answers = [server.hear("greedy", asked) for _ in range(50)]
    assert len(every(Parameters, [said for out in answers for said in out], "greedy")) == 1
    assert only(Parameters, server.hear("honest", asked), "honest").cut == 2
    server.clock.advance(1)
    assert only(Parameters, server.hear("greedy", asked), "greedy").cut == 2


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
        server.wait(SAY_AGAIN_S)
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
        said = server.hear("a", make_upload(other, cut=2, version=0, produced=3))
        assert [(r.final, r.participant) for r in every(Receipt, said)] == (
            [(True, False)] if other[0] == stamp[0] else []
        ), "who waits for an answer is told that none will come"
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


def test_an_upload_after_the_round_is_answered_and_left_to_the_next() -> None:
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
