"""Parameters that come and go as differences, through the state machine."""

from __future__ import annotations

import numpy as np
import pytest

from broker.messages import Manifest, Parameters, Request
from broker.training_messages import DeviceParameters
from edge_agent.phases import Phase
from edge_agent.snapshots import Snapshot
from tensors.codecs import parse_codec
from tensors.deltas import apply_delta, encode_delta, fingerprint, whole_pack
from tests.fake_device import Harness, MemorySnapshots, every, only, receipt_of, train
from tests.tiny import RUN, Array, make_assignment, make_round

CODEC = "int8+zstd"
LEVELS = 255
ASSIGNMENT = make_assignment(parameter_codec=CODEC)
Weights = dict[str, Array]


def weights(seed: int) -> Weights:
    rng = np.random.default_rng(seed)
    return {"weight": rng.standard_normal((6, 5)).astype(np.float32)}


def whole(version: int, state: Weights, run: str = RUN) -> Parameters:
    return Parameters(run=run, version=version, cut=2, state=whole_pack(state))


def manifest(version: int, state: Weights) -> Manifest:
    return Manifest(
        run=RUN,
        version=version,
        base=version - 1 if version else None,
        sha256=fingerprint(state),
        size=len(whole_pack(state)),
        trained=True,
    )


def update(version: int, before: Weights, after: Weights) -> tuple[Manifest, Parameters, Weights]:
    """What a coordinator sends, and what devices are to come to."""
    delta = encode_delta(after, before, parse_codec(CODEC), {})
    sent = Parameters(run=RUN, version=version, cut=2, base=version - 1, state=delta.pack())
    return manifest(version, delta.state), sent, delta.state


def start(state: Weights, snapshots: MemorySnapshots | None = None) -> Harness:
    """A device that trains in round 1 on version 0."""
    device = Harness(snapshots=snapshots)
    device.connect()
    device.hear(ASSIGNMENT, make_round(), manifest(0, state), whole(0, state))
    device.hear(receipt_of(make_round(), complete=True))
    assert device.core.phase is Phase.TRAINING
    return device


def finish(device: Harness, number: int, version: int) -> DeviceParameters:
    """Train the round to its end; the upload."""
    announced = make_round(number, version=version)
    upload = train(device, announced)
    device.hear(receipt_of(announced, applied=[(0, 3)], complete=True, final=True))
    return upload


def enter(device: Harness, number: int, version: int) -> None:
    announced = make_round(number, version=version)
    assert only(Request, device.hear(announced)).what == "join"
    device.hear(receipt_of(announced, complete=True))


# -- down -----------------------------------------------------------------------------------------


def test_a_device_applies_what_changed_to_the_version_it_holds() -> None:
    device = start(weights(0))
    finish(device, 1, 0)
    confirmed, sent, after = update(1, weights(0), weights(1))
    device.hear(confirmed, sent)
    np.testing.assert_array_equal(device.learner.start.state["weight"], after["weight"])
    enter(device, 2, 1)


def test_what_changed_is_applied_to_the_rounds_start_not_to_what_was_learnt_since() -> None:
    device = start(weights(0))
    device.work()
    confirmed, sent, after = update(1, weights(0), weights(1))
    device.hear(confirmed, sent)
    np.testing.assert_array_equal(device.learner.weight, after["weight"])


def test_a_device_that_missed_a_version_asks_for_the_whole() -> None:
    device = start(weights(0))
    finish(device, 1, 0)
    _, _, first = update(1, weights(0), weights(1))
    confirmed, sent, second = update(2, first, weights(2))
    device.hear(confirmed, sent)
    np.testing.assert_array_equal(device.learner.start.state["weight"], weights(0)["weight"])
    request = only(Request, device.hear(make_round(3, version=2)))
    assert (request.what, request.version) == ("parameters", 2)
    device.hear(whole(2, second))
    np.testing.assert_array_equal(device.learner.weight, second["weight"])
    assert device.core.phase is Phase.ENTERING
    confirmed, sent, third = update(3, second, weights(3))
    device.hear(confirmed, sent)
    np.testing.assert_array_equal(device.learner.weight, third["weight"])


def spoilt() -> dict[str, tuple[list[Manifest], Parameters]]:
    """Version 1 as it must not be taken by a device that holds version 0."""
    confirmed, sent, _ = update(1, weights(0), weights(1))
    _, other, _ = update(1, weights(8), weights(1))
    return {
        "another result": ([manifest(1, weights(9))], sent),
        "no manifest": ([], sent),
        "another version's manifest": ([manifest(2, weights(1))], sent),
        "another run's manifest": ([confirmed.model_copy(update={"run": "other"})], sent),
        "a difference to something else": ([confirmed], other),
        "rubbish": ([confirmed], sent.model_copy(update={"state": b"rubbish"})),
        "cut short": ([confirmed], sent.model_copy(update={"state": sent.state[:-3]})),
        "for another cut": ([confirmed], sent.model_copy(update={"cut": 3})),
        "called the whole": ([confirmed], sent.model_copy(update={"base": None})),
    }


SPOILT = spoilt()


@pytest.mark.parametrize("what", SPOILT)
def test_what_changed_is_not_taken_if_it_does_not_lead_where_it_should(what: str) -> None:
    device = start(weights(0))
    finish(device, 1, 0)
    confirmed, sent = SPOILT[what]
    device.hear(*confirmed, sent)
    np.testing.assert_array_equal(device.learner.start.state["weight"], weights(0)["weight"])
    assert only(Request, device.hear(make_round(2, version=1))).what == "parameters"
    device.hear(manifest(1, weights(1)), whole(1, weights(1)))
    assert device.core.phase is Phase.ENTERING


# -- up -------------------------------------------------------------------------------------------


def test_a_device_sends_what_it_learnt_since_the_rounds_version() -> None:
    device = start(weights(0))
    upload = finish(device, 1, 0)
    assert upload.base == upload.version == 0
    sent = apply_delta(weights(0), upload.state)["weight"]
    np.testing.assert_allclose(sent, weights(0)["weight"] + 4, atol=0.01)


def test_in_fp32_it_sends_the_whole() -> None:
    device = Harness()
    device.join()
    upload = finish(device, 1, 0)
    assert upload.base is None
    assert upload.state == whole_pack({"weight": np.array([14.0], np.float32)})


def learn_something(device: Harness, seed: int) -> Array:
    """Instead of adding ones, which every quantizer carries exactly."""
    rng = np.random.default_rng(seed)
    step = rng.standard_normal((6, 5)).astype(np.float32)
    device.learner.weight = device.learner.weight + step
    return step


def arrived(upload: DeviceParameters, base: Weights) -> Array:
    return apply_delta(base, upload.state)["weight"] - base["weight"]


def test_over_many_rounds_the_coordinator_gets_all_but_the_last_error() -> None:
    device, state = start(weights(0)), weights(0)
    truth, received = np.zeros((6, 5)), np.zeros((6, 5))
    for number in range(1, 11):
        truth += learn_something(device, number) + 4
        upload = finish(device, number, number - 1)
        received += arrived(upload, state)
        confirmed, sent, state = update(number, state, weights(100 + number))
        device.hear(confirmed, sent)
        enter(device, number + 1, number)
        assert np.abs(received - truth).max() < 0.6 * 7 / LEVELS


def test_a_repeated_round_sends_the_same_again() -> None:
    device = start(weights(0))
    learn_something(device, 1)
    first = train(device, make_round())
    again = make_round(attempt=1)
    device.hear(again, receipt_of(again, complete=True))
    learn_something(device, 1)
    assert train(device, again).state == first.state


def test_over_the_legs_of_a_round_the_coordinator_gets_all_but_the_last_error() -> None:
    device, state = start(weights(0)), weights(0)
    leg = make_round(2, version=0, barrier=False)
    device.hear(leg, receipt_of(leg, complete=True))
    truth, received = np.zeros((6, 5)), np.zeros((6, 5))
    for number in range(1, 11):
        truth += learn_something(device, number) + 4
        received += arrived(train(device, leg), state)
        made = {"applied": [(0, 4 * number - 1)], "next_batch": 4 * number, "complete": True}
        device.hear(receipt_of(leg, final=True, quota=4 * number, **made))
        device.hear(receipt_of(leg, quota=4 * number + 4, **made))
        assert np.abs(received - truth).max() < 0.6 * 7 / LEVELS


def snapshot_of(snapshots: MemorySnapshots) -> tuple[int, Snapshot]:
    found = snapshots.load(RUN, 2)
    assert found is not None
    return found


def test_a_restarted_device_still_owes_what_it_owed() -> None:
    snapshots, state = MemorySnapshots(), weights(0)
    stayed = start(state, snapshots)
    assert not snapshot_of(snapshots)[1].residual
    learn_something(stayed, 1)
    finish(stayed, 1, 0)
    confirmed, sent, state = update(1, state, weights(1))
    stayed.hear(confirmed, sent)
    assert snapshot_of(snapshots)[1].residual.keys() == {"weight"}

    returned = Harness(snapshots=snapshots)
    returned.connect()
    returned.hear(ASSIGNMENT)
    uploads = []
    for device in (stayed, returned):
        enter(device, 2, 1)
        learn_something(device, 2)
        uploads.append(finish(device, 2, 1))
    assert uploads[0] == uploads[1]
    assert uploads[0].base == 1


def test_another_run_starts_without_debts() -> None:
    snapshots = MemorySnapshots()
    device = start(weights(0), snapshots)
    learn_something(device, 1)
    finish(device, 1, 0)
    confirmed, sent, _ = update(1, weights(0), weights(1))
    device.hear(confirmed, sent)
    device.hear(make_assignment(run="next", parameter_codec=CODEC), make_round(run="next"))
    device.hear(whole(0, weights(5), run="next"))
    found = snapshots.load("next", 2)
    assert found is not None
    assert not found[1].residual


def test_a_debt_that_does_not_fit_the_network_is_forgotten() -> None:
    snapshots = MemorySnapshots()
    state = weights(0)
    odd = {"weight": np.ones((2, 2), np.float32), "other": np.ones((6, 5), np.float32)}
    snapshots.save(RUN, 2, 0, Snapshot(state, {}, odd))
    device = Harness(snapshots=snapshots)
    device.connect()
    device.hear(ASSIGNMENT)
    enter(device, 1, 0)
    upload = finish(device, 1, 0)
    np.testing.assert_allclose(arrived(upload, state), 4, atol=0.01)


def test_what_cannot_be_quantized_is_sent_as_it_is() -> None:
    device = start(weights(0))
    device.learner.weight = device.learner.weight * np.float32("nan")
    upload = finish(device, 1, 0)
    assert np.isnan(apply_delta(weights(0), upload.state)["weight"]).all(), "to be refused there"
    assert not every(DeviceParameters, device.wait(100))
