"""One forward pass for questions of any cuts is worth one for each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.responder import Responder
from tensors.networks import build_network, read_state, write_state
from tests.server_side import features_at
from tests.tiny import CPU, SPEC, Array

CUTS = range(1, 10)
STATES = {seed: read_state(build_network(SPEC, seed=seed)) for seed in (1, 2, 3, 4)}


def responder(*versions: int, limit: int = 3) -> Responder:
    server = Responder(build_network(SPEC), CPU, versions=limit)
    for version in versions:
        server.load(version, STATES[version])
    return server


def alone(version: int, cut: int, features: Array) -> Array:
    network = build_network(SPEC)
    write_state(network, STATES[version])
    with torch.inference_mode():
        logits = network.eval()(torch.from_numpy(features), start=cut)
        return np.asarray(logits.softmax(1).numpy())


SERVER = responder(1)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.sampled_from(CUTS), st.integers(1, 4)), min_size=1, max_size=6))
def test_together_is_as_one_by_one(mix: list[tuple[int, int]]) -> None:
    asked = [(cut, features_at(cut, seed, size)) for seed, (cut, size) in enumerate(mix)]
    answers = SERVER.answer(1, [(cut, torch.from_numpy(array)) for cut, array in asked])
    for (cut, features), answer in zip(asked, answers, strict=True):
        assert answer.dtype == np.float32
        np.testing.assert_allclose(answer, alone(1, cut, features), rtol=2e-4, atol=1e-6)


def test_every_pair_of_cuts_goes_together() -> None:
    for low in CUTS:
        for high in CUTS:
            asked = [(high, features_at(high, 1, 2)), (low, features_at(low, 2, 3))]
            answers = SERVER.answer(1, [(cut, torch.from_numpy(array)) for cut, array in asked])
            for (cut, features), answer in zip(asked, answers, strict=True):
                np.testing.assert_allclose(answer, alone(1, cut, features), rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_a_number_that_is_none_stays_with_its_image(bad: float) -> None:
    poison = features_at(2, 1, 2)
    poison[0] = bad
    good = features_at(5, 2, 3)
    sick, well = SERVER.answer(1, [(2, torch.from_numpy(poison)), (5, torch.from_numpy(good))])
    assert not np.isfinite(sick[0]).all()
    np.testing.assert_allclose(well, alone(1, 5, good), rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(sick[1:], alone(1, 2, poison[1:]), rtol=2e-4, atol=1e-6)


def test_every_version_is_answered_with_its_own_blocks() -> None:
    server = responder(1, 2)
    features = features_at(3, 1, 2)
    for version in (1, 2, 1):
        (answer,) = server.answer(version, [(3, torch.from_numpy(features))])
        np.testing.assert_allclose(answer, alone(version, 3, features), rtol=2e-4, atol=1e-6)


def test_the_version_that_was_not_asked_for_the_longest_makes_room() -> None:
    server = responder(1, 2, limit=2)
    server.answer(1, [(3, torch.from_numpy(features_at(3)))])
    server.load(3, STATES[3])
    assert [version for version in (1, 2, 3) if server.holds(version)] == [1, 3]
    features = features_at(3, 1, 2)
    (answer,) = server.answer(3, [(3, torch.from_numpy(features))])
    np.testing.assert_allclose(answer, alone(3, 3, features), rtol=2e-4, atol=1e-6)
