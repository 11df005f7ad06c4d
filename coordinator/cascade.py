"""The strategy *cascade*: one shared server network, batches of different cuts in one step.

The batches that wait go through the network together, each joining at its cut: one forward pass,
one backward pass, one optimizer step (:meth:`coordinator.server_copy.ServerCopy.step_together`).
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal, get_args

from torch import Tensor

from coordinator.aggregation import Aggregation, Model
from coordinator.defences.steps import StepLimits
from coordinator.errors import BatchRefused
from coordinator.server_copy import Entry, ServerCopy, Step
from tensors.networks import CutNetwork, State
from tensors.training import Compute

TOGETHER = 4
"""The most batches that should make a step together; see docs/method.md."""
RateRule = Literal["linear", "sqrt", "none", "momentum"]
RATE_RULES: tuple[RateRule, ...] = get_args(RateRule)
_FACTORS: Mapping[RateRule, Callable[[int], float]] = {
    "linear": float,
    "sqrt": math.sqrt,
    "none": lambda _: 1.0,
    "momentum": lambda _: 1.0,
}


class Cascade:
    """One shared server network; a step is made on all batches that are there.

    ``rate_rule`` says by what the round's learning rate is multiplied in a step of B batches:
    ``linear`` B, ``sqrt`` √B, ``none`` 1. ``momentum``: also 1, but the momentum goes on by batches
    instead of steps (:meth:`coordinator.server_copy.ServerCopy.pace` with B steps).
    """

    gathers: ClassVar[bool] = True

    def __init__(
        self,
        network: CutNetwork,
        compute: Compute,
        *,
        momentum: float,
        weight_decay: float,
        limits: StepLimits | None = None,
        classifier: bool = True,
        rate_rule: RateRule = "momentum",
    ) -> None:
        assert classifier
        self._shared = ServerCopy(
            copy.deepcopy(network.server_half(1)),
            compute,
            momentum,
            weight_decay,
            limits or StepLimits(),
        )
        self._rule = rate_rule
        self._learning_rate = 0.0
        self._samples: Counter[int] = Counter()

    def begin(self, model: Model, learning_rate: float) -> None:
        """See :class:`coordinator.engines.Engine`."""
        self._shared.load(model, learning_rate)
        self._learning_rate = learning_rate
        self._samples.clear()

    def step(self, batch: Entry, *, want_gradient: bool) -> Step:
        """See :class:`coordinator.engines.Engine`; a step of one batch."""
        (outcome,) = self.step_together([batch], want_gradients=want_gradient)
        if isinstance(outcome, BatchRefused):
            raise outcome
        return outcome

    def step_together(
        self, batches: Sequence[Entry], *, want_gradients: bool
    ) -> list[Step | BatchRefused]:
        """One step on all batches; one result for each, in order.

        Where they cannot be trained on together, those that are to blame alone (they diverge, or
        their loss stands out) are refused and the rest
        makes a step as if they had never been there. Where nobody is to blame alone, each makes a
        step of its own.
        """
        try:
            return [*self._train(batches, want_gradients=want_gradients)]
        except BatchRefused as exc:
            if len(batches) == 1:
                return [exc]
        refusals = [
            self._shared.is_to_blame(batch, want_gradient=want_gradients) for batch in batches
        ]
        good = [batch for batch, refused in zip(batches, refusals, strict=True) if not refused]
        if len(good) in (0, len(batches)):
            return [
                self.step_together([batch], want_gradients=want_gradients)[0] for batch in batches
            ]
        outcomes = iter(self.step_together(good, want_gradients=want_gradients))
        return [refused or next(outcomes) for refused in refusals]

    def forward(
        self, device: str, number: int, cut: int, features: Tensor, *, want_gradient: bool
    ) -> Tensor:
        """Never asked: its steps are made in one part."""
        raise NotImplementedError

    def backward(self, device: str, number: int, gradient: Tensor, *, images: int) -> Tensor | None:
        """Never asked: its steps are made in one part."""
        raise NotImplementedError

    def forget(self, device: str, number: int) -> None:
        """Never asked: its steps are made in one part."""
        raise NotImplementedError

    def finish(self, device: str) -> tuple[State, State]:
        """Nothing: the shared network goes on."""
        del device
        return {}, {}

    def close(self, aggregation: Aggregation) -> None:
        """The shared copy is one holder; a block weighs what entered at or below it."""
        self._shared.fold_by_cut(aggregation, self._samples)

    def _train(self, batches: Sequence[Entry], *, want_gradients: bool) -> list[Step]:
        count = len(batches)
        self._shared.pace(
            self._learning_rate * _FACTORS[self._rule](count),
            steps=count if self._rule == "momentum" else 1,
        )
        steps = self._shared.step_together(batches, want_gradients=want_gradients)
        for batch, step in zip(batches, steps, strict=True):
            self._samples[batch.cut] += step.images
        return steps
