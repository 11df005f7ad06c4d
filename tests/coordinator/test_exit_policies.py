from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from broker.serving_messages import CutPolicy
from coordinator import exit_policies
from coordinator.evaluation import CutAnswers, Evaluator
from coordinator.exit_policies import ExitPolicy, calibrate, parse_exit_policy
from coordinator.settings import CoordinatorSettings
from tensors.calibration import share_interval
from tensors.exit_rules import confidence, exits
from tensors.networks import build_network, read_state
from tests.tiny import CPU, SPEC, make_dataset, make_settings

IMAGES = make_dataset(40)


def answers(seed: int = 0, images: int = 200, classes: int = 4) -> tuple[CutAnswers, Any]:
    """An exit that is right more often where it is sure, and a server that is mostly right."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, images)
    sharp = rng.uniform(0, 6, images)
    right = rng.random(images) < 0.4 + 0.09 * sharp
    said = np.where(right, labels, (labels + 1) % classes)
    logits = np.eye(classes)[said] * sharp[:, None]
    own = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    sure = np.where(rng.random(images) < 0.95, labels, (labels + 2) % classes)
    return CutAnswers(own, np.eye(classes)[sure]), labels


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("threshold", ExitPolicy("threshold")),
        ("accuracy:0.9", ExitPolicy("accuracy", 0.9)),
        ("offload:0", ExitPolicy("offload", 0.0)),
        ("offload:1", ExitPolicy("offload", 1.0)),
    ],
)
def test_policies_are_read(text: str, policy: ExitPolicy) -> None:
    assert parse_exit_policy(text) == policy


@pytest.mark.parametrize(
    "text",
    ["", "accuracy", "accuracy:1.1", "accuracy:nan", "offload:x", "luck:0.5", "offload:-0.1"],
)
def test_a_policy_that_is_none_is_refused_with_what_is_allowed(text: str) -> None:
    with pytest.raises(ValidationError, match="accuracy:SHARE"):
        make_settings(exit_policy=text, dataset="synthetic")


def test_what_is_chosen_on_held_out_images_needs_some() -> None:
    with pytest.raises(ValidationError, match="held-out images"):
        make_settings(exit_policy="accuracy:0.9")
    with pytest.raises(ValidationError, match="held-out images"):
        make_settings(exit_policy="accuracy:0.9", dataset="synthetic", calibration_images=0)


def test_a_queue_takes_a_question_of_any_size() -> None:
    with pytest.raises(ValidationError, match="answer_queue"):
        make_settings(batch_size=32, answer_queue=31)


@given(
    seed=st.integers(0, 20),
    policy=st.sampled_from(["threshold", "accuracy:0.85", "accuracy:1", "offload:0.3"]),
    threshold=st.floats(-2, 2),
)
def test_what_is_promised_is_what_happens_on_these_images(
    seed: int, policy: str, threshold: float
) -> None:
    seen, labels = answers(seed)
    found = calibrate(
        seen, labels, policy=parse_exit_policy(policy), threshold=threshold, rule="entropy"
    )
    gone = exits(confidence(seen.exit), found.threshold)
    own, server = seen.exit.argmax(1), seen.server.argmax(1)
    assert found.offload_rate == pytest.approx(1 - gone.mean())
    assert found.accuracy == pytest.approx((np.where(gone, own, server) == labels).mean())
    if gone.any():
        same = (own == server)[gone]
        assert found.agreement == share_interval(int(same.sum()), len(same))[0] <= same.mean()
    else:
        assert found.agreement is None


def test_thresholds_reach_what_is_wanted() -> None:
    seen, labels = answers(3, images=1000)

    def chosen(policy: str) -> CutPolicy:
        wanted = parse_exit_policy(policy)
        return calibrate(seen, labels, policy=wanted, threshold=0.7, rule="entropy")

    for share in (0.1, 0.5):
        rate = chosen(f"offload:{share}").offload_rate
        assert rate is not None
        assert share - 0.05 < rate <= share
    accurate = chosen("accuracy:0.9")
    assert accurate.accuracy is not None
    assert accurate.accuracy >= 0.9
    assert chosen("threshold").threshold == 0.7


def evaluator() -> Evaluator:
    return Evaluator(build_network(SPEC), CPU, IMAGES, batch_size=16)


def test_every_trained_cut_gets_one() -> None:
    state = read_state(build_network(SPEC, seed=3))
    settings = make_settings(dataset="synthetic", exit_policy="offload:0.5", calibration_images=20)
    found = exit_policies.policies_of(settings, evaluator(), state, {5, 2})
    assert list(found) == [2, 5]
    for policy in found.values():
        assert policy.offload_rate is not None
        assert policy.offload_rate <= 0.5
        assert (policy.offload_rate * 20) % 1 == pytest.approx(0, abs=1e-9), "of 20 images"


@pytest.mark.parametrize("threshold", [5.0, float("inf")])
def test_without_held_out_images_there_is_a_threshold_and_no_promise(threshold: float) -> None:
    settings = make_settings(threshold=threshold)
    assert exit_policies.policies_of(settings, None, {}, {2}) == {2: CutPolicy(threshold=1)}


def test_policies_survive_a_checkpoint_as_long_as_the_settings_are_the_same() -> None:
    policies = {2: CutPolicy(threshold=0.25, agreement=0.9), 12: CutPolicy(threshold=-1.0)}
    settings = make_settings(threshold=0.4)

    def restored(changed: CoordinatorSettings) -> Any:
        return exit_policies.restore(changed, exit_policies.dump(settings, policies), policies)

    assert restored(settings) == (policies, True)
    assert restored(make_settings(threshold=0.6)) == (
        {2: CutPolicy(threshold=0.6), 12: CutPolicy(threshold=0.6)},
        False,
    )
    other = make_settings(exit_policy="offload:0.5", dataset="synthetic")
    assert restored(other)[0][2] == CutPolicy(threshold=0.25)


@pytest.mark.parametrize("dumped", [{}, {"cuts": 3}, {"cuts": {"x": {}}}, {"cuts": {"2": 3}}])
def test_a_checkpoint_without_policies_leaves_the_threshold(dumped: dict[str, Any]) -> None:
    found = exit_policies.restore(make_settings(threshold=0.4), dumped, {2})
    assert found == ({2: CutPolicy(threshold=0.4)}, False)
