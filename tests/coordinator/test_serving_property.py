"""Whatever devices ask, in whatever order: every question is answered or refused, once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from broker.envelopes import Envelope, up
from broker.serving_messages import Features, Prediction
from broker.telemetry import REFUSALS
from coordinator.observer import Observer
from coordinator.registry import Device
from coordinator.serving import AnsweringMachine, Answers
from coordinator.versions import Version, Versions
from tests.server_side import FP32, SHAPES, features_at, poisoned_features
from tests.tiny import CLASSES, RUN, Clock, make_hello, make_settings

DEVICES = {
    "a": Device("a", cut=2, hello=make_hello()),
    "b": Device("b", cut=5, hello=make_hello()),
    "measured": Device("measured", hello=make_hello(cut=None)),
    "silent": Device("silent", cut=2),
}
TENSORS = {
    **{
        f"{size} at {cut}": FP32.encode(features_at(cut, 0, size))
        for cut in (2, 5)
        for size in (1, 8)
    },
    "poisoned": poisoned_features(),
    "rubbish": b"rubbish",
}


class Slow:
    """Takes its time, and now and then has no memory."""

    def __init__(self, clock: Clock, fails: Sequence[bool]) -> None:
        self._clock = clock
        self._fails = list(fails)
        self._held: set[int] = set()

    def holds(self, version: int) -> bool:
        return version in self._held

    def load(self, version: int, state: Any) -> None:
        self._held.add(version)

    def answer(self, version: int, questions: Sequence[tuple[int, Tensor]]) -> list[np.ndarray]:
        assert version in self._held
        self._clock.advance(0.01 * sum(len(features) for _, features in questions))
        if self._fails and self._fails.pop():
            raise RuntimeError("out of memory")
        return [np.full((len(f), CLASSES), 1 / CLASSES, np.float32) for _, f in questions]


class Books(Observer):
    def __init__(self) -> None:
        self.outcomes: Counter[str | None] = Counter()
        self.images = 0
        self.waiting = 0

    def features_answered(self, cut: int, images: int, refused: str | None) -> None:
        assert (images == 0) == (refused is not None)
        self.outcomes[refused] += 1
        self.images += images

    def answers_waiting(self, images: int) -> None:
        self.waiting = images


asking = st.tuples(
    st.sampled_from([*DEVICES, "unknown"]),
    st.integers(0, 4),
    st.sampled_from(list(TENSORS)),
    st.integers(1, 500),
)
passing = st.floats(0, 0.5)


@given(
    steps=st.lists(st.one_of(asking, passing, st.none()), max_size=60),
    fails=st.lists(st.booleans(), max_size=10),
    queue=st.integers(8, 24),
)
def test_every_question_is_answered_or_refused_once(
    steps: list[Any], fails: list[bool], queue: int
) -> None:
    clock, books = Clock(), Books()
    latest = Version(3, {}, frozenset({2}))
    versions = Versions(
        latest,
        keep=3,
        load=lambda number: Version(number, {}, frozenset({2} if number > 1 else ())),
    )
    machine = AnsweringMachine(
        make_settings(answer_batch=12, answer_queue=queue, batch_wait_s=0.05),
        RUN,
        Answers(versions, Slow(clock, fails)),
        SHAPES,
        find=DEVICES.get,
        observer=books,
        clock=clock,
    )
    asked: dict[int, str] = {}
    said: list[Envelope] = []
    for step in steps:
        if isinstance(step, float):
            clock.advance(step)
        elif step is None:
            due = machine.next_tick
            said += machine.tick() if due is not None and clock.now >= due else machine.work()
        else:
            device, version, tensor, deadline_ms = step
            request = len(asked)
            asked[request] = device
            question = Features(
                run=RUN,
                request=request,
                version=version,
                deadline_ms=deadline_ms,
                tensor=TENSORS[tensor],
            )
            said += machine.receive(up(device, question))
        assert machine.waiting.images <= queue
    for _ in range(200):
        if machine.next_tick is None:
            break
        clock.now = max(clock.now, machine.next_tick)
        said += machine.tick()
    assert machine.next_tick is None, "it never ends"
    assert machine.waiting.images == books.waiting == 0
    predictions = [(e.address.device, e.message) for e in said]
    assert len(predictions) == len(asked)
    for device, message in predictions:
        assert isinstance(message, Prediction)
        assert asked.pop(message.request) == device
        assert (message.tensor is None) == (message.refused is not None)
        assert message.refused is None or message.refused in REFUSALS
        if device not in ("a", "b"):
            wanted = {"measured": "untrained"}.get(device or "", "unknown_device")
            assert message.refused == wanted
    assert not asked
    assert books.outcomes.total() == len(predictions)
