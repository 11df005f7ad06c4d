from __future__ import annotations

import numpy as np
import pytest

from broker.messages import Manifest, Parameters
from coordinator.aggregation import Model, half_of
from coordinator.published import Published
from tensors.codecs import parse_codec
from tensors.deltas import apply_delta, fingerprint, whole_pack
from tensors.parameters import unpack_parameters
from tests.fake_coordinator import only
from tests.server_side import START, STATE
from tests.tiny import RUN, Array, assert_same, differs

CODECS = ["int8+zstd", "fp16"]
SHARED = "blocks.0.conv.weight"
"""Held at every cut."""


def publish(codec: str = "int8+zstd") -> Published:
    return Published(RUN, 4, START, set(), parse_codec(codec), {})


def learnt(state: dict[str, Array], seed: int) -> Model:
    """What a round makes of a state."""
    rng = np.random.default_rng(seed)
    return Model(
        {
            name: values + 1
            if values.dtype.kind == "i"
            else (values + 0.1 * rng.random(values.shape)).astype(np.float32)
            for name, values in state.items()
        },
        START.momentum,
    )


def manifest(published: Published, cut: int) -> Manifest:
    return only(Manifest, [published.manifest(cut)])


def broadcast(published: Published, cut: int) -> Parameters:
    return only(Parameters, [published.broadcast(cut)])


@pytest.mark.parametrize("codec", CODECS)
def test_a_device_that_holds_the_base_comes_to_the_published_state(codec: str) -> None:
    published = publish(codec)
    for version in (5, 6, 7):
        before = published.model.state
        published.replace(learnt(before, version), {2}, [2, 5])
        for cut in (2, 5):
            sent, expected = broadcast(published, cut), manifest(published, cut)
            assert (sent.version, sent.base) == (version, version - 1)
            assert (expected.version, expected.base) == (version, version - 1)
            state = apply_delta(half_of(before, cut), sent.state)
            assert_same(state, half_of(published.model.state, cut))
            assert fingerprint(state) == expected.sha256
            assert len(sent.state) < expected.size == len(whole_pack(state))


@pytest.mark.parametrize("codec", ["fp32", "fp32+zstd", *CODECS])
def test_who_asks_is_given_the_whole_state_exactly(codec: str) -> None:
    published = publish(codec)
    published.replace(learnt(STATE, 1), {2}, [2])
    answers = published.answer("a", 2)
    confirmed, answer = only(Manifest, answers), only(Parameters, answers, "a")
    assert answer.base is None
    state = unpack_parameters(answer.state)
    assert_same(state, half_of(published.model.state, 2))
    assert fingerprint(state) == confirmed.sha256
    if codec != "fp32+zstd":
        assert len(answer.state) == confirmed.size


def test_in_fp32_nothing_is_lost_and_everything_is_sent_whole() -> None:
    published, merged = publish("fp32"), learnt(STATE, 1)
    published.replace(merged, {2}, [2, 5])
    assert_same(published.model.state, merged.state)
    assert published.residual == {}
    assert broadcast(published, 5).base is None
    assert manifest(published, 5).base is None


def test_what_no_device_holds_is_published_as_it_was_merged() -> None:
    published, merged = publish(), learnt(STATE, 1)
    published.replace(merged, {2}, [1, 2])
    touched = differs(published.model.state, merged.state)
    assert touched == published.residual.keys()
    assert SHARED in touched
    held = half_of(STATE, 1).keys() | half_of(STATE, 2).keys()
    assert touched <= {name for name in held if STATE[name].ndim >= 2}


def test_a_cut_that_is_new_gets_the_whole() -> None:
    published = publish()
    published.replace(learnt(STATE, 1), {2}, [2])
    assert broadcast(published, 3).base is None
    assert manifest(published, 3).base is None
    assert_same(unpack_parameters(broadcast(published, 3).state), half_of(published.model.state, 3))


def test_over_many_versions_devices_are_off_by_the_last_ones_error_alone() -> None:
    published, truth = publish(), STATE[SHARED].astype(np.float64)
    for version in range(15):
        before = published.model.state
        merged = learnt(before, version)
        truth += merged.state[SHARED].astype(np.float64) - before[SHARED]
        published.replace(merged, set(), [2])
    off = truth - published.model.state[SHARED]
    np.testing.assert_allclose(off, published.residual[SHARED], atol=1e-6)
    assert np.abs(off).max() <= 0.51 * 0.11 / 255


def test_a_coordinator_that_resumes_sends_what_an_undisturbed_one_sends() -> None:
    calm = publish()
    calm.replace(learnt(STATE, 1), {2}, [2])
    resumed = Published(
        RUN, calm.version, calm.model, calm.trained, parse_codec("int8+zstd"), calm.residual
    )
    assert manifest(resumed, 2) == manifest(calm, 2).model_copy(update={"base": None})
    for published in (calm, resumed):
        published.replace(learnt(published.model.state, 2), {2}, [2])
    assert broadcast(resumed, 2) == broadcast(calm, 2)
    assert manifest(resumed, 2) == manifest(calm, 2)
    assert_same(resumed.residual, calm.residual)


def test_what_is_owed_is_paid_when_parameters_no_longer_go_as_differences() -> None:
    calm = publish()
    calm.replace(learnt(STATE, 1), {2}, [2])
    exact = Published(RUN, calm.version, calm.model, set(), parse_codec("fp32"), calm.residual)
    merged = learnt(calm.model.state, 2)
    exact.replace(merged, {2}, [2])
    assert exact.residual == {}
    np.testing.assert_array_equal(
        exact.model.state[SHARED], merged.state[SHARED] + calm.residual[SHARED]
    )
