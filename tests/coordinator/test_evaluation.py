from __future__ import annotations

import numpy as np
import pytest
import torch

from coordinator.evaluation import THRESHOLDS, Evaluator
from coordinator.responder import Responder
from tensors.batches import normalise
from tensors.codecs import parse_codec
from tensors.decoding import decode_torch
from tensors.errors import NetworkError
from tensors.exit_rules import confidence, exits, softmax
from tensors.networks import CutNetwork, State, build_network, read_state
from tensors.privacy import GaussianMechanism
from tests.tiny import CLASSES, CPU, SPEC, make_dataset

IMAGES = make_dataset(50)


def trained(seed: int = 3) -> tuple[CutNetwork, State]:
    network = build_network(SPEC, seed=seed).eval()
    return network, read_state(network)


def evaluator(batch_size: int = 50) -> Evaluator:
    return Evaluator(build_network(SPEC), CPU, IMAGES, batch_size=batch_size)


@pytest.mark.parametrize("codec", ["fp32", "int4"])
@pytest.mark.parametrize("cut", [1, 4, 9])
def test_answers_are_those_of_a_device_and_of_the_server_it_asks(cut: int, codec: str) -> None:
    network, state = trained()
    seen = evaluator().cut_answers(state, cut, codec)
    with torch.inference_mode():
        x = torch.from_numpy(normalise(IMAGES.images, IMAGES.mean, IMAGES.std))
        features = network(x, start=0, stop=cut)
        own = softmax(network.exit(features, cut).numpy())
    server = Responder(build_network(SPEC), CPU)
    server.load(1, state)
    (asked,) = server.answer(1, [(cut, decode_torch(parse_codec(codec).encode(features)))])
    np.testing.assert_allclose(seen.exit, own, rtol=1e-5)
    np.testing.assert_allclose(seen.server, asked, rtol=1e-5)
    assert seen.exit.shape == seen.server.shape == (50, CLASSES)


def test_batches_make_no_difference_without_a_codec() -> None:
    _, state = trained()
    whole, parts = (evaluator(size).cut_answers(state, 2, "fp32") for size in (50, 7))
    np.testing.assert_allclose(whole.exit, parts.exit, rtol=1e-4)
    np.testing.assert_allclose(whole.server, parts.server, rtol=1e-4)


def test_scores_of_a_cut_count_every_image_where_it_is_answered() -> None:
    _, state = trained()
    seen = evaluator().cut_answers(state, 3, "fp32")
    scores = evaluator().cut_scores(state, 3, "fp32", "margin")
    exit_right = seen.exit.argmax(axis=1) == IMAGES.labels
    server_right = seen.server.argmax(axis=1) == IMAGES.labels
    assert scores.exit_accuracy == exit_right.mean()
    assert scores.server_accuracy == server_right.mean()
    assert [point["threshold"] for point in scores.sweep] == list(THRESHOLDS)
    for point in scores.sweep:
        gone = exits(confidence(seen.exit, "margin"), point["threshold"])
        assert point["exit_rate"] == gone.mean()
        assert point["accuracy"] == np.where(gone, exit_right, server_right).mean()
    assert len({point["exit_rate"] for point in scores.sweep}) > 2, "the test compares nothing"


def test_some_images_are_spread_over_all_and_answered_as_among_all() -> None:
    _, state = trained()
    rows = evaluator().sample(7)
    assert (len(rows), rows[0], len(set(rows))) == (7, 0, 7)
    assert np.diff(rows).min() >= 7
    assert list(evaluator().sample(1000)) == list(range(50))
    some = evaluator(3).cut_answers(state, 2, "fp32", rows=rows)
    whole = evaluator().cut_answers(state, 2, "fp32")
    np.testing.assert_allclose(some.exit, whole.exit[rows], rtol=1e-4)
    np.testing.assert_allclose(some.server, whole.server[rows], rtol=1e-4)


def test_a_cut_that_is_none_is_refused() -> None:
    _, state = trained()
    with pytest.raises(NetworkError, match="cuts 1 to 9"):
        evaluator().cut_answers(state, 10, "fp32")


def test_the_server_is_asked_with_the_noise_of_devices_and_the_exit_sees_none() -> None:
    _, state = trained()
    plain = evaluator().cut_answers(state, 3, "fp32")
    noisy = Evaluator(
        build_network(SPEC), CPU, IMAGES, batch_size=50, mechanism=GaussianMechanism(5.0, 0.2)
    )
    seen, again = (noisy.cut_answers(state, 3, "fp32") for _ in range(2))
    np.testing.assert_array_equal(seen.exit, plain.exit)
    np.testing.assert_array_equal(seen.server, again.server)
    assert np.abs(seen.server - plain.server).max() > 0.01
