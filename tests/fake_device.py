"""A device without torch: a learner that notes what it learnt, and data that says where it is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from broker.drive import Effect, Subscribe
from broker.envelopes import Envelope, down, to_all, to_cut
from broker.fields import Message
from broker.messages import Assignment, Hello, Manifest, Measurement, Parameters, Telemetry
from broker.topics import Topics
from broker.training_messages import (
    Activations,
    DeviceParameters,
    Gradients,
    Receipt,
    Report,
    Round,
)
from edge_agent.answers import Predictor
from edge_agent.core import AgentCore
from edge_agent.errors import StateError, TrainingError
from edge_agent.figures import Outcome
from edge_agent.learning import Learner
from edge_agent.offline import OfflineLimits
from edge_agent.preparation import Preparation
from edge_agent.privacy import Privacy
from edge_agent.programs import Programs
from edge_agent.snapshots import Snapshot
from edge_agent.telemetry import Reporter
from tensors.codecs import Codec, Encode, parse_codec
from tensors.decoding import decode
from tensors.errors import NetworkError
from tensors.format import Encoded
from tensors.parameters import pack_parameters
from tests.tiny import CLASSES, RUN, SIZE, Array, Clock, make_assignment, make_hello, make_round

DEVICE = "d1"
M = TypeVar("M", bound=Message)


class FakeLearner:
    """``weight`` grows by one for every step; features say which batch position they are of."""

    def __init__(self) -> None:
        self.weight = np.zeros(1, np.float32)
        self.start = Snapshot(self.state(), {})
        self.rate = self.feedback_weight = 0.0
        self.learnt: list[tuple[int, bool]] = []
        """(batch, whether with a gradient)"""
        self.counts: Array | None = None
        self.taught: list[Array | None] = []
        """The whole network's logits, of each batch learnt from."""
        self.classified: list[tuple[int, list[int]]] = []
        """(batch, its labels) of last features."""
        self.in_flight: set[int] = set()
        self.poisoned: set[int] = set()
        """Batches whose features are not finite."""

    def load(self, state: Mapping[str, Array]) -> None:
        if state.keys() != {"weight"}:
            raise NetworkError("parameters do not fit this network")
        self.weight = np.array(state["weight"])
        self.start = Snapshot(self.state(), {})
        self.in_flight.clear()

    def restore(self, snapshot: Snapshot) -> None:
        self.load(snapshot.state)

    def rewind(self) -> None:
        self.load(self.start.state)

    def calibrate(self, counts: Array) -> None:
        self.counts = counts

    def set_learning_rate(self, rate: float) -> None:
        self.rate = rate

    def set_feedback_weight(self, weight: float) -> None:
        self.feedback_weight = weight

    def forward(self, batch: int, images: Array, labels: Array) -> Array:
        assert batch not in self.in_flight
        self.in_flight.add(batch)
        features = images[:, :, 0, 0].astype(np.float32)
        return features * np.float32("nan") if batch in self.poisoned else features

    def backward(self, batch: int, gradient: Any | None, teacher: Any | None = None) -> Outcome:
        self.in_flight.remove(batch)
        self.taught.append(None if teacher is None else np.asarray(teacher))
        if gradient is not None and not bool(np.isfinite(np.asarray(gradient)).all()):
            raise TrainingError("not finite")
        self.learnt.append((batch, gradient is not None))
        self.weight = self.weight + 1
        return Outcome(loss=0.5, correct=3, images=8)

    def classify(self, batch: int, features: Any, labels: Any) -> Array:
        if not bool(np.isfinite(np.asarray(features)).all()):
            raise TrainingError("not finite")
        self.classified.append((batch, list(labels)))
        return np.asarray(features) / 2

    @property
    def encode(self) -> Encode:
        return Codec.encode

    def decode(self, data: Encoded, keep: Array | None) -> Array:
        return decode(data, keep=keep)

    def discard(self, batch: int) -> None:
        self.in_flight.remove(batch)

    def state(self) -> dict[str, Array]:
        return {"weight": self.weight.copy()}

    def predictor(self) -> Predictor:
        return FakePredictor()


class FakePredictor:
    """Takes the first pixel for the answer, and the second for how sure it is of it.

    Its classifier takes last features for probabilities.
    """

    def classify(self, features: Array) -> Array:
        return features

    def predict(self, images: Array) -> tuple[Array, Array]:
        answers, sure = images[:, 0, 0, 0].astype(int), images[:, 0, 0, 1]
        probabilities = np.full((len(images), CLASSES), 1.0) * ((1 - sure) / CLASSES)[:, None]
        probabilities[np.arange(len(images)), answers] += sure
        return images.reshape(len(images), -1).astype(np.float32), probabilities


class PositionStream:
    """Training batches whose pixels are their position."""

    def __init__(self, size: int = 8) -> None:
        self._size = size
        self.epoch = 2**60
        """Batches until the same images come again."""
        self.asked: list[int] = []

    def batch(self, position: int) -> tuple[Array, Array]:
        self.asked.append(position)
        images = np.full((self._size, 1, SIZE, SIZE), position, np.float32)
        return images, np.arange(self._size) % CLASSES

    def keys(self, position: int) -> list[bytes]:
        return [f"{position % self.epoch}/{row}".encode() for row in range(self._size)]


class FakeData:
    """What the state machine asks of a device's data."""

    def __init__(self, tests: list[tuple[Array, Array]] | None = None) -> None:
        self._tests = tests or []

    def stream(self, assignment: Assignment, device: str) -> PositionStream:
        return PositionStream(assignment.batch_size)

    def label_counts(self, classes: int) -> Array:
        return np.arange(classes)

    def test_batches(self, batch_size: int) -> list[tuple[Array, Array]]:
        return self._tests


@dataclass
class MemorySnapshots:
    """A state folder in memory; ``broken`` is a disk that does not work."""

    kept: dict[tuple[str, int], tuple[int, Snapshot]] = field(default_factory=dict)
    broken: bool = False

    def save(self, run: str, cut: int, version: int, snapshot: Snapshot) -> None:
        if self.broken:
            raise StateError("cannot write")
        self.kept[run, cut] = version, snapshot

    def load(self, run: str, cut: int) -> tuple[int, Snapshot] | None:
        if self.broken:
            raise StateError("cannot read")
        return self.kept.get((run, cut))


def pack(weight: float) -> bytes:
    return pack_parameters({"weight": np.array([weight], np.float32)})


def probabilities_of(*answers: int) -> bytes:
    return parse_codec("fp32").encode(np.eye(CLASSES, dtype=np.float32)[list(answers)])


@dataclass
class FakeLearners:
    build: Callable[[Assignment], Learner]
    measure: Callable[[Assignment], Measurement]
    programs: Programs | None


class Harness:
    """An agent's state machine driven by hand; everything it says is in ``said``."""

    def __init__(
        self,
        *,
        data: FakeData | None = None,
        snapshots: MemorySnapshots | None = None,
        hello: Hello | None = None,
        stay: bool = False,
        build: Callable[[Assignment], Learner] | None = None,
        measure: Callable[[Assignment], Measurement] | None = None,
        programs: Programs | None = None,
        offline: OfflineLimits | None = None,
        privacy: Privacy | None = None,
    ) -> None:
        self.clock = Clock()
        self.learner = FakeLearner()
        self.snapshots = snapshots or MemorySnapshots()
        self.uplink = 0.0
        self.said: list[Message] = []
        self.told: list[Telemetry] = []
        """Beside what it said."""
        self.filters: tuple[str, ...] = ()
        hello = hello or make_hello()
        reporter = Reporter(hello.boot, clock=self.clock)
        self.core = AgentCore(
            Topics("fleet"),
            DEVICE,
            hello,
            Preparation(
                DEVICE,
                data or FakeData(),
                uplink=lambda: self.uplink,
                learners=FakeLearners(
                    build or (lambda _: self.learner),
                    measure or (lambda _: make_measurement()),
                    programs,
                ),
                snapshots=self.snapshots,
                reporter=reporter,
                clock=self.clock,
                offline=offline,
                privacy=privacy,
            ),
            reporter=reporter,
            clock=self.clock,
            stay=stay,
        )

    def _note(self, effects: list[Effect]) -> list[Message]:
        messages = []
        for effect in effects:
            if isinstance(effect, Subscribe):
                self.filters = effect.filters
            else:
                assert effect.address.device == DEVICE
                if isinstance(effect.message, Telemetry):
                    self.told.append(effect.message)
                else:
                    messages.append(effect.message)
        self.said += messages
        return messages

    def connect(self) -> list[Message]:
        return self._note(self.core.connected())

    def disconnect(self) -> list[Message]:
        return self._note(self.core.disconnected())

    def hear(self, *messages: Message) -> list[Message]:
        """What the device says to these messages; it has not worked yet."""
        out: list[Message] = []
        for message in messages:
            out += self._note(self.core.receive(envelope_of(message)))
        return out

    def work(self, limit: int = 100) -> list[Message]:
        """What the device says while it works until there is nothing to do."""
        out: list[Message] = []
        for _ in range(limit):
            if not self.core.has_work:
                return out
            out += self._note(self.core.work())
        raise AssertionError("the work never ends")

    def wait(self, seconds: float) -> list[Message]:
        """Let time pass, from one tick that is due to the next."""
        out: list[Message] = []
        end = self.clock.now + seconds
        for _ in range(1000):
            if self.core.next_tick > end:
                self.clock.now = end
                return out
            self.clock.now = max(self.clock.now, self.core.next_tick)
            out += self._note(self.core.tick())
            assert self.core.next_tick > self.clock.now, "it would be called again and again"
        raise AssertionError("too many ticks")

    def join(self, assignment: Assignment | None = None, announced: Round | None = None) -> None:
        """Come as far as training, with fresh parameters of the announced version."""
        announced = announced or make_round()
        self.connect()
        self.hear(assignment or make_assignment(), announced)
        self.hear(make_parameters(announced.version))
        self.hear(receipt_of(announced, complete=True))


def envelope_of(message: Message) -> Envelope:
    """From the coordinator, on the topic where such a message belongs."""
    match message:
        case Manifest():
            return to_cut(2, message)
        case Parameters():
            return to_cut(message.cut, message)
        case _ if type(message).__name__ in ("Round", "Serving", "Coordinator"):
            return to_all(message)
        case _:
            return down(DEVICE, message)


def receipt_of(announced: Round, **changes: Any) -> Receipt:
    run, number, attempt = announced.stamp
    fields: dict[str, Any] = {"run": run, "round": number, "attempt": attempt, "credits": 2}
    return Receipt(**(fields | changes))


def make_parameters(version: int, weight: float = 10.0, **changes: Any) -> Parameters:
    fields: dict[str, Any] = {"run": RUN, "version": version, "cut": 2, "state": pack(weight)}
    return Parameters(**(fields | changes))


def make_manifest(version: int, weight: float = 10.0) -> Manifest:
    state = pack(weight)
    return Manifest(
        run=RUN,
        version=version,
        sha256=hashlib.sha256(state).hexdigest(),
        size=len(state),
        trained=True,
    )


def make_measurement(**changes: Any) -> Measurement:
    fields: dict[str, Any] = {
        "batch_size": 8,
        "step_ms": [1.0] * 9,
        "exit_ms": [1.0] * 9,
        "memory_mb": [1.0] * 9,
        "available_mb": 100.0,
        "cores": 1,
        "uplink_bytes_per_s": 0.0,
    }
    return Measurement(**(fields | changes))


def only(kind: type[M], messages: list[Message]) -> M:
    """The one message of this kind."""
    (found,) = [message for message in messages if isinstance(message, kind)]
    return found


def every(kind: type[M], messages: list[Message]) -> list[M]:
    """All messages of this kind."""
    return [message for message in messages if isinstance(message, kind)]


GRADIENT = parse_codec("fp32").encode(np.ones((8, 1), np.float32))


def gradients(activations: Activations, tensor: bytes = GRADIENT) -> Gradients:
    run, number, attempt = activations.stamp
    return Gradients(
        run=run,
        round=number,
        attempt=attempt,
        batch=activations.batch,
        loss=1.0,
        correct=1,
        tensor=tensor,
    )


def train(device: Harness, announced: Round) -> DeviceParameters:
    """Answer every batch; the upload."""
    for _ in range(20):
        said = device.work()
        uploads = every(DeviceParameters, said)
        if uploads:
            return uploads[0]
        assert every(Activations, said)
        device.hear(*(gradients(m) for m in every(Activations, said)))
    raise AssertionError("the round never ends")


def finish(device: Harness, announced: Round) -> Report:
    train(device, announced)
    said = device.hear(receipt_of(announced, applied=[(0, 3)], complete=True, final=True))
    return only(Report, said)


def exam(*images: tuple[int, float, int]) -> FakeData:
    """Batches of one image: what the exit says, how sure it is of it, and the truth."""
    batches: list[tuple[Array, Array]] = []
    for answer, sure, label in images:
        pixels = np.zeros((1, 1, SIZE, SIZE), np.float32)
        pixels[0, 0, 0, :2] = answer, sure
        batches.append((pixels, np.array([label])))
    return FakeData(batches)
