from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from broker.serving_messages import Features, Prediction
from edge_agent.exit_policy import Policy
from edge_agent.learner import LearnerFactory, TorchPredictor
from edge_agent.predictor import InferenceRun
from tensors.codecs import parse_codec
from tensors.decoding import decode
from tensors.networks import build_network
from tests.fake_device import FakePredictor, probabilities_of
from tests.tiny import CLASSES, CPU, RUN, SIZE, SPEC, Array, Clock, make_assignment, make_batch

TIMEOUT_S = 5.0


def batch_of(*images: tuple[int, float, int]) -> tuple[Array, Array]:
    """Images as the exit's answer, how sure it is of it, and the truth."""
    pixels = np.zeros((len(images), 1, SIZE, SIZE), np.float32)
    pixels[:, 0, 0, :2] = [(answer, sure) for answer, sure, _ in images]
    return pixels, np.array([label for *_, label in images])


class Desk:
    def __init__(
        self, *batches: tuple[Array, Array], codec: str = "fp32", predictor: Any = None
    ) -> None:
        self.clock = Clock()
        self.run = InferenceRun(
            predictor or FakePredictor(),
            parse_codec(codec),
            list(batches),
            Policy(rule="max_softmax", threshold=0.5, timeout_s=TIMEOUT_S),
            run=RUN,
            version=3,
            clock=self.clock,
            pending=2,
        )

    def work(self) -> list[Features]:
        asked = []
        while self.run.has_work:
            features = self.run.work()
            if features is not None:
                asked.append(features)
        return asked

    def answer(self, request: int, tensor: bytes | None, **changes: Any) -> None:
        refused = None if tensor else "version"
        fields = {"request": request, "version": 3, "tensor": tensor, "refused": refused}
        self.run.answer(Prediction(**(fields | changes)))


def test_sure_images_stay_on_the_device() -> None:
    desk = Desk(batch_of((1, 0.9, 1), (2, 0.8, 0)))
    assert desk.work() == []
    assert desk.run.done
    result = desk.run.result()
    assert (result.images, result.exits, result.offloads) == (2, 2, 0)
    assert (result.correct, result.exit_correct) == (1, 1)
    assert result.bytes_up == result.bytes_down == 0


def test_a_tie_with_the_threshold_is_offloaded() -> None:
    assert len(Desk(batch_of((1, 0.5, 1))).work()) == 1


def test_only_the_unsure_images_of_a_batch_go_up() -> None:
    images, labels = batch_of((1, 0.9, 1), (2, 0.1, 3), (0, 0.2, 0))
    desk = Desk((images, labels))
    (asked,) = desk.work()
    np.testing.assert_array_equal(decode(asked.tensor), images[1:].reshape(2, -1))
    assert asked.version == 3
    assert asked.deadline_ms == 5000
    desk.answer(asked.request, probabilities_of(3, 1))
    result = desk.run.result()
    assert (result.exits, result.offloads, result.answered) == (1, 2, 2)
    assert result.correct == 2, "the exit's one, and one of the coordinator's two"
    assert result.exit_correct == 2
    assert result.bytes_up == len(asked.tensor)
    assert result.bytes_down == len(probabilities_of(3, 1))


def test_no_more_requests_are_out_than_allowed() -> None:
    desk = Desk(*[batch_of((0, 0.1, 1))] * 4)
    first = desk.work()
    assert [features.request for features in first] == [0, 1]
    assert not desk.run.done
    desk.answer(0, probabilities_of(1))
    assert [features.request for features in desk.work()] == [2]


def test_a_refusal_leaves_the_exits_answer() -> None:
    desk = Desk(batch_of((1, 0.1, 1), (2, 0.1, 0)))
    desk.work()
    desk.answer(0, None)
    result = desk.run.result()
    assert (result.refused, result.answered, result.correct) == (2, 0, 1)
    assert desk.run.done


@pytest.mark.parametrize(
    "tensor",
    [
        b"rubbish",
        probabilities_of(1),
        probabilities_of(1, 1, 1),
        parse_codec("fp32").encode(np.ones(2, np.float32)),
        parse_codec("fp32").encode(np.ones((2, 0), np.float32)),
        parse_codec("fp32").encode(np.ones((), np.float32)),
        parse_codec("fp32").encode(np.full((2, CLASSES), np.nan, np.float32)),
    ],
    ids=["rubbish", "too few", "too many", "one dimension", "no classes", "scalar", "nan"],
)
def test_an_answer_that_is_none_leaves_the_exits_answer(tensor: bytes) -> None:
    desk = Desk(batch_of((1, 0.1, 1), (2, 0.1, 0)))
    desk.work()
    desk.answer(0, tensor)
    result = desk.run.result()
    assert (result.refused, result.correct) == (2, 1)


def test_an_answer_by_other_parameters_is_not_taken() -> None:
    desk = Desk(batch_of((1, 0.1, 2)))
    desk.work()
    desk.answer(0, probabilities_of(2), version=4)
    result = desk.run.result()
    assert (result.refused, result.correct) == (1, 0)


def test_after_the_deadline_the_exits_answer_counts_and_a_late_one_does_not() -> None:
    desk = Desk(batch_of((1, 0.1, 1), (2, 0.1, 0)))
    desk.work()
    assert desk.run.deadline == desk.clock.now + TIMEOUT_S
    desk.clock.advance(TIMEOUT_S - 0.1)
    desk.run.tick()
    assert not desk.run.done
    desk.clock.advance(0.1)
    desk.run.tick()
    desk.answer(0, probabilities_of(0, 0))
    result = desk.run.result()
    assert (result.timeouts, result.answered, result.correct) == (2, 0, 1)
    assert desk.run.deadline is None


def test_offload_time_is_per_request() -> None:
    desk = Desk(batch_of((1, 0.9, 1)), batch_of((1, 0.1, 1)), batch_of((1, 0.1, 1)))
    desk.work()
    desk.clock.advance(0.1)
    desk.answer(0, probabilities_of(1))
    desk.clock.advance(0.2)
    desk.answer(1, probabilities_of(1))
    assert desk.run.result().offload_ms == pytest.approx((100 + 300) / 2)


class Diverged(FakePredictor):
    def predict(self, images: Array) -> tuple[Array, Array]:
        features, probabilities = super().predict(images)
        return features * np.nan, probabilities * np.nan


def test_features_that_are_not_finite_are_not_sent() -> None:
    desk = Desk(batch_of((1, 0.1, 1), (0, 0.1, 0)), codec="int8", predictor=Diverged())
    assert desk.work() == []
    assert desk.run.done
    result = desk.run.result()
    assert (result.images, result.exits, result.offloads, result.refused) == (2, 0, 2, 2)


def test_torch_and_whole_network_agree() -> None:
    network = build_network(SPEC)
    images, _ = make_batch()
    features, probabilities = TorchPredictor(network.device_half(3), CPU).predict(images)
    with torch.no_grad():
        expected = network.eval()(torch.from_numpy(images), stop=3)
        logits = network.exit(expected, 3)
    torch.testing.assert_close(features, expected)
    np.testing.assert_allclose(probabilities, logits.softmax(1).numpy(), rtol=1e-5)


def test_what_answers_takes_no_threads_from_what_trains() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        factory = LearnerFactory(device="cpu", precision="fp32", memory_format="contiguous")
        with ThreadPoolExecutor(1) as trains, ThreadPoolExecutor(1) as answers:
            learner = trains.submit(factory.build, make_assignment()).result()
            state = learner.start.state
            predictor = answers.submit(factory.predictor, make_assignment(), state).result()
            assert answers.submit(torch.get_num_threads).result() == 1
            assert trains.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(before)
    images, _ = make_batch()
    features, probabilities = predictor.predict(images)
    expected, wanted = learner.predictor().predict(images)
    torch.testing.assert_close(features, expected)
    np.testing.assert_allclose(probabilities, wanted, rtol=1e-5)


IMAGES = st.tuples(
    st.integers(0, CLASSES - 1), st.sampled_from([0.1, 0.9]), st.integers(0, CLASSES - 1)
)


@given(
    batches=st.lists(st.lists(IMAGES, min_size=1, max_size=3), max_size=4),
    events=st.lists(
        st.one_of(
            st.just("work"),
            st.floats(0, 4),
            st.tuples(
                st.integers(0, 4),
                st.sampled_from([None, b"", probabilities_of(1), probabilities_of(1, 2)]),
            ),
        ),
        max_size=30,
    ),
)
def test_every_image_is_counted_once(batches: list[Any], events: list[Any]) -> None:
    desk = Desk(*(batch_of(*images) for images in batches))
    for event in events:
        if isinstance(event, float):
            desk.clock.advance(event)
            desk.run.tick()
        elif isinstance(event, tuple):
            desk.answer(*event)
        elif desk.run.has_work:
            desk.run.work()
    for _ in range(10):
        desk.work()
        desk.clock.advance(TIMEOUT_S)
        desk.run.tick()
    assert desk.run.done
    result = desk.run.result()
    assert result.images == sum(map(len, batches)) == result.exits + result.offloads
    assert result.offloads == result.answered + result.refused + result.timeouts
    assert result.correct <= result.images
