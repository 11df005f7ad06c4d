"""Devices that do not learn but keep exact books. No torch.

A stub's model is tiny, but it goes the same way as a real one: named arrays, packs, codecs,
averages. Two of its arrays count: what was learnt from on devices, and what the server was trained
on. ``Averager`` adds the increments of counters up, so a batch that is applied twice, or whose work
is lost, is a wrong number in the model. The labels of a batch name its device and position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from broker.messages import Assignment, Hello, Measurement
from coordinator.aggregation import half_of
from edge_agent.errors import StateError
from edge_agent.figures import Outcome
from edge_agent.snapshots import Snapshot
from tensors.codecs import Codec, Encode
from tensors.decoding import decode
from tensors.errors import NetworkError
from tensors.format import Encoded

Array = np.ndarray
State = dict[str, Array]

BLOCKS = 10
FEATURES = (2,)
"""Shape of one image's features, at every cut."""
DIGITS = 100_000
"""Labels are digits to this base; so the network has as many classes."""
NAMED = 4
"""So many labels name a batch: device, then the digits of its position. The others are 0."""
BLOCK_MB = 16.0
"""Memory that training takes for each block."""
LEARNT = "blocks.0.count.num_batches_tracked"
APPLIED = f"blocks.{BLOCKS - 1}.count.num_batches_tracked"


def stub_state() -> State:
    """Version 0."""
    state: State = {f"blocks.{i}.weight": np.zeros((2, 2), np.float32) for i in range(BLOCKS)}
    state |= {f"heads.{cut}.weight": np.zeros(2, np.float32) for cut in range(1, BLOCKS)}
    return state | {LEARNT: np.zeros((), np.int64), APPLIED: np.zeros((), np.int64)}


def labels_of(device: int, position: int, size: int) -> Array:
    """The labels (int64, N) that name a batch. At least ``NAMED`` of them."""
    assert size >= NAMED, f"batch_size must be at least {NAMED} for stubs to be told apart"
    labels = np.zeros(size, np.int64)
    labels[0] = device
    for digit in range(1, NAMED):
        position, labels[digit] = divmod(position, DIGITS)
    return labels


def name_of(labels: list[int]) -> tuple[int, int]:
    """Device and position that labels name."""
    position = 0
    for digit in reversed(labels[1:NAMED]):
        position = position * DIGITS + digit
    return labels[0], position


class StubStream:
    """Training batches that say who and where they are."""

    def __init__(self, device: int, size: int) -> None:
        self._device = device
        self._size = size
        self._images = np.zeros((size, 1), np.float32)

    def batch(self, position: int) -> tuple[Array, Array]:
        """Images nobody looks at, and labels."""
        return self._images, labels_of(self._device, position, self._size)

    def keys(self, position: int) -> list[bytes]:
        """Every image is one of its own."""
        first = position * self._size
        return [f"{self._device}/{first + row}".encode() for row in range(self._size)]


@dataclass(frozen=True, slots=True)
class StubData:
    """Images of a device that is ``number`` among all."""

    number: int
    samples: int
    test_samples: int = 0

    def stream(self, assignment: Assignment, device: str) -> StubStream:
        """See :class:`StubStream`."""
        del device
        return StubStream(self.number, assignment.batch_size)

    def label_counts(self, classes: int) -> Array:
        """None of any: its labels are names."""
        return np.zeros(classes, np.int64)

    def test_batches(self, batch_size: int) -> list[tuple[Array, Array]]:
        """Every other image is one of which the exit is sure."""
        sizes = [
            min(batch_size, self.test_samples - first)
            for first in range(0, self.test_samples, batch_size)
        ]
        return [
            (
                (np.arange(size) % 2).astype(np.float32)[:, None, None, None],
                np.zeros(size, np.int64),
            )
            for size in sizes
        ]

    def hello(self, boot: str, cut: int | None, image: tuple[int, int, int]) -> Hello:
        """How the device introduces itself."""
        return Hello(
            boot=boot,
            software="stub",
            samples=self.samples,
            test_samples=self.test_samples,
            dataset="stub",
            classes=DIGITS,
            image=image,
            cut=cut,
        )


class StubPredictor:
    """Sure of an image whose only pixel is 1, unsure of all others."""

    def predict(self, images: Array) -> tuple[Array, Array]:
        """Features and probabilities (N×2)."""
        sure = np.where(images[:, 0, 0, 0] > 0, 1.0, 0.5)
        return np.ones((len(images), *FEATURES), np.float32), np.stack([sure, 1 - sure], axis=1)

    def classify(self, features: Array) -> Array:
        """Never asked: the stub's labels are the server's."""
        raise NotImplementedError


class StubLearner:
    """A device's half: every batch adds one to all its weights and to its counter.

    ``poisoned`` says at which batches of an attempt the features are not finite.
    """

    def __init__(self, cut: int, poisoned: Callable[[int], bool]) -> None:
        self._poisoned = poisoned
        self._state = half_of(stub_state(), cut)
        self._start = Snapshot(self.state(), {})
        self._in_flight: dict[int, int] = {}

    @property
    def start(self) -> Snapshot:
        """The start of the round."""
        return self._start

    def load(self, state: Mapping[str, Array]) -> None:
        """Take parameters. Raises ``NetworkError`` if they are not this half's."""
        if state.keys() != self._state.keys():
            raise NetworkError("these are not the parameters of this half")
        self._state = {name: np.array(value) for name, value in state.items()}
        self._start = Snapshot(self.state(), {})
        self._in_flight.clear()

    def restore(self, snapshot: Snapshot) -> None:
        """Take what was kept."""
        self.load(snapshot.state)

    def rewind(self) -> None:
        """Return to the start of the round."""
        self.load(self._start.state)

    def calibrate(self, counts: Array) -> None:
        """Nothing."""

    def set_learning_rate(self, rate: float) -> None:
        """Nothing."""

    def set_feedback_weight(self, weight: float) -> None:
        """Nothing."""

    def forward(self, batch: int, images: Array, labels: Array) -> Array:
        """Features; the batch is in flight until :meth:`backward` or :meth:`discard`."""
        del images
        assert batch not in self._in_flight
        self._in_flight[batch] = len(labels)
        features = np.ones((len(labels), *FEATURES), np.float32)
        features[0, 0] = np.nan if self._poisoned(batch) else 2.0
        return features

    def backward(self, batch: int, gradient: Any | None, teacher: Any | None = None) -> Outcome:
        """Count the batch."""
        del gradient, teacher
        images = self._in_flight.pop(batch)
        for name, value in self._state.items():
            self._state[name] = value + value.dtype.type(1)
        return Outcome(1.0, 0, images)

    def classify(self, batch: int, features: Any, labels: Any) -> Any:
        """Never asked: the stub's labels are the server's."""
        raise NotImplementedError

    @property
    def encode(self) -> Encode:
        """As it is."""
        return Codec.encode

    def decode(self, data: Encoded, keep: Array | None) -> Array:
        """An encoded gradient."""
        return decode(data, keep=keep)

    def discard(self, batch: int) -> None:
        """Forget a batch."""
        del self._in_flight[batch]

    def state(self) -> State:
        """A copy of what was learnt."""
        return {name: value.copy() for name, value in self._state.items()}

    def predictor(self) -> StubPredictor:
        """Answers test images."""
        return StubPredictor()


def measurement(batch_size: int, block_s: float, memory_mb: float) -> Measurement:
    """What a device says of itself whose blocks take ``block_s`` seconds for a batch."""
    cuts = range(1, BLOCKS)
    return Measurement(
        batch_size=batch_size,
        step_ms=[1000 * block_s for _ in cuts],
        exit_ms=[0.0 for _ in cuts],
        memory_mb=[BLOCK_MB * cut for cut in cuts],
        available_mb=memory_mb,
        cores=1,
        uplink_bytes_per_s=0.0,
    )


class Disk:
    """A device's ``SnapshotStore`` that outlives its process; ``full`` and ``lost`` are faults."""

    def __init__(self) -> None:
        self.full = False
        self._kept: tuple[str, int, int, Snapshot] | None = None

    def lose(self) -> None:
        """A new, empty disk."""
        self._kept = None

    def save(self, run: str, cut: int, version: int, snapshot: Snapshot) -> None:
        """Replace the kept snapshot. Raises ``StateError`` if the disk is full."""
        if self.full:
            raise StateError("cannot write: no space left on the device's disk")
        self._kept = (run, cut, version, snapshot)

    def load(self, run: str, cut: int) -> tuple[int, Snapshot] | None:
        """Version and snapshot kept for this run and cut, if there is one."""
        if self._kept is None or self._kept[:2] != (run, cut):
            return None
        return self._kept[2:]
