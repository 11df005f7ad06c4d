"""Learners and engines that charge what they compute to a meter, in virtual seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from coordinator.aggregation import Aggregation, Model
from coordinator.engines import Engine, Entry, Outcome, Step
from edge_agent import figures
from edge_agent.answers import Predictor
from edge_agent.learning import Learner
from edge_agent.snapshots import Snapshot
from ops.simulator.program import Meter
from tensors.codecs import Encode
from tensors.format import Encoded
from tensors.networks import State


@dataclass(frozen=True, slots=True)
class DeviceCost:
    """Seconds that each block of a device's half takes for one batch."""

    forward_s: float = 0.0
    backward_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ServerCost:
    """Seconds that the coordinator takes for one batch, and for closing a round.

    A batch takes ``step_s``, and ``block_s`` for each block that it goes through there.
    """

    step_s: float = 0.0
    merge_s: float = 0.0
    block_s: float = 0.0

    def batch_s(self, cut: int, blocks: int) -> float:
        """Of a batch that enters at ``cut`` a network of so many blocks."""
        return self.step_s + self.block_s * (blocks - cut)


FREE_STEP, FREE = DeviceCost(), ServerCost()


class _ChargedPredictor:
    def __init__(self, predictor: Predictor, meter: Meter, seconds: float) -> None:
        self._predictor = predictor
        self._meter = meter
        self._seconds = seconds

    def predict(self, images: np.ndarray) -> tuple[Any, np.ndarray]:
        self._meter.spend(self._seconds)
        return self._predictor.predict(images)

    def classify(self, features: np.ndarray) -> np.ndarray:
        return self._predictor.classify(features)


class ChargedLearner:
    """A learner at cut ``cut`` whose steps take time; ``encode`` if not as the learner does."""

    def __init__(
        self,
        learner: Learner,
        cut: int,
        meter: Meter,
        cost: DeviceCost,
        encode: Encode | None = None,
    ) -> None:
        self._learner = learner
        self._encode = encode or learner.encode
        self._meter = meter
        self._forward_s = cost.forward_s * cut
        self._backward_s = cost.backward_s * cut

    @property
    def start(self) -> Snapshot:
        """See ``edge_agent.learning.Learner``, as for all of these."""
        return self._learner.start

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Free of charge."""
        self._learner.load(state)

    def restore(self, snapshot: Snapshot) -> None:
        """Free of charge."""
        self._learner.restore(snapshot)

    def rewind(self) -> None:
        """Free of charge."""
        self._learner.rewind()

    def calibrate(self, counts: np.ndarray) -> None:
        """Free of charge."""
        self._learner.calibrate(counts)

    def set_learning_rate(self, rate: float) -> None:
        """Free of charge."""
        self._learner.set_learning_rate(rate)

    def set_feedback_weight(self, weight: float) -> None:
        """Free of charge."""
        self._learner.set_feedback_weight(weight)

    def forward(self, batch: int, images: Any, labels: Any) -> Any:
        """Takes the forward part of a step."""
        self._meter.spend(self._forward_s)
        return self._learner.forward(batch, images, labels)

    def backward(
        self, batch: int, gradient: Any | None, teacher: Any | None = None
    ) -> figures.Outcome:
        """Takes the backward part of a step."""
        self._meter.spend(self._backward_s)
        return self._learner.backward(batch, gradient, teacher)

    def classify(self, batch: int, features: Any, labels: Any) -> Any:
        """Free of charge."""
        return self._learner.classify(batch, features, labels)

    @property
    def encode(self) -> Encode:
        """Free of charge."""
        return self._encode

    def decode(self, data: Encoded, keep: np.ndarray | None) -> Any:
        """Free of charge."""
        return self._learner.decode(data, keep)

    def discard(self, batch: int) -> None:
        """Free of charge."""
        self._learner.discard(batch)

    def state(self) -> dict[str, np.ndarray]:
        """Free of charge."""
        return self._learner.state()

    def predictor(self) -> Predictor:
        """Takes the forward part of a step for each batch."""
        return _ChargedPredictor(self._learner.predictor(), self._meter, self._forward_s)


class ChargedEngine:
    """An engine whose steps take time."""

    gathers: ClassVar[bool] = False

    def __init__(self, engine: Engine, meter: Meter, cost: ServerCost, blocks: int) -> None:
        self._engine = engine
        self._meter = meter
        self._cost = cost
        self._blocks = blocks

    def begin(self, model: Model, learning_rate: float) -> None:
        """Free of charge."""
        self._engine.begin(model, learning_rate)

    def step(self, batch: Entry, *, want_gradient: bool) -> Step:
        """Takes a step."""
        self._meter.spend(self._cost.batch_s(batch.cut, self._blocks))
        return self._engine.step(batch, want_gradient=want_gradient)

    def step_together(self, batches: Sequence[Entry], *, want_gradients: bool) -> list[Outcome]:
        """Takes a step for each batch."""
        for batch in batches:
            self._meter.spend(self._cost.batch_s(batch.cut, self._blocks))
        return self._engine.step_together(batches, want_gradients=want_gradients)

    def forward(
        self, device: str, number: int, cut: int, features: Tensor, *, want_gradient: bool
    ) -> Tensor:
        """Takes a step: the whole of it."""
        self._meter.spend(self._cost.batch_s(cut, self._blocks))
        return self._engine.forward(device, number, cut, features, want_gradient=want_gradient)

    def backward(self, device: str, number: int, gradient: Tensor, *, images: int) -> Tensor | None:
        """Free of charge."""
        return self._engine.backward(device, number, gradient, images=images)

    def forget(self, device: str, number: int) -> None:
        """Free of charge."""
        self._engine.forget(device, number)

    def finish(self, device: str) -> tuple[State, State]:
        """Free of charge."""
        return self._engine.finish(device)

    def close(self, aggregation: Aggregation) -> None:
        """Takes the time of closing a round."""
        self._meter.spend(self._cost.merge_s)
        self._engine.close(aggregation)


class ChargedGatheringEngine(ChargedEngine):
    """The same for an engine that gathers."""

    gathers: ClassVar[bool] = True


def charged(engine: Engine, meter: Meter, cost: ServerCost, *, blocks: int) -> Engine:
    """``engine`` for a network of so many blocks, charging ``meter``."""
    kind = ChargedGatheringEngine if engine.gathers else ChargedEngine
    return kind(engine, meter, cost, blocks)
