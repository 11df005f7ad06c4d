"""The training strategies of the server side (Hetero-SplitEE, arXiv 2512.09313).

*Sequential*: one shared network; batches are applied in the order they arrive, each entering at
its cut. *Averaging*: one replica per device and round, taken out as soon as its device has
finished, so that memory grows with the devices active at once. A third is ours:
``coordinator.cascade``.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from typing import ClassVar, Protocol

from torch import Tensor

from coordinator.aggregation import Aggregation, Model
from coordinator.cascade import Cascade
from coordinator.defences.steps import StepLimits
from coordinator.errors import BatchRefused
from coordinator.server_copy import Entry, ServerCopy, Step
from tensors.networks import CutNetwork, State
from tensors.training import Compute

__all__ = ["Averaging", "Engine", "Entry", "Outcome", "Sequential", "Step", "make_engine"]

Outcome = Step | BatchRefused


class Engine(Protocol):
    """Trains the server side during one round."""

    gathers: ClassVar[bool]
    """Whether batches of several devices are trained on in one step."""

    def begin(self, model: Model, learning_rate: float) -> None:
        """Start a round from ``model``."""
        ...

    def step(self, batch: Entry, *, want_gradient: bool) -> Step:
        """Train on one batch of a device, entering at its cut.

        Raises :class:`BatchRefused` and changes nothing if the loss or the gradient at the cut is
        not finite (``diverged``) or cannot be computed (``not_computable``), or the loss stands out
        (``outlier_loss``).
        """
        ...

    def step_together(self, batches: Sequence[Entry], *, want_gradients: bool) -> list[Outcome]:
        """Train on batches of several devices in one step, if it :attr:`gathers`.

        One result for each, in order; a refused batch changes nothing.
        """
        ...

    def forward(
        self, device: str, number: int, cut: int, features: Tensor, *, want_gradient: bool
    ) -> Tensor:
        """The first part of a step on a device's batch; its last features (float32, N×…).

        See :meth:`coordinator.open_batches.OpenBatches.forward`.
        """
        ...

    def backward(self, device: str, number: int, gradient: Tensor, *, images: int) -> Tensor | None:
        """The second part, on so many images; the gradient where they entered, if it was wanted.

        See :meth:`coordinator.open_batches.OpenBatches.backward`.
        """
        ...

    def forget(self, device: str, number: int) -> None:
        """There will be no second part."""
        ...

    def finish(self, device: str) -> tuple[State, State]:
        """What ``device`` alone has trained here, and its momentum, both empty if nothing; freed.

        What more it sends starts from the round's model again.
        """
        ...

    def close(self, aggregation: Aggregation) -> None:
        """Fold in what is no single device's."""
        ...


class Sequential:
    """One shared server network for all devices."""

    gathers: ClassVar[bool] = False

    def __init__(
        self,
        network: CutNetwork,
        compute: Compute,
        *,
        momentum: float,
        weight_decay: float,
        limits: StepLimits | None = None,
        classifier: bool = True,
    ) -> None:
        self._shared = ServerCopy(
            copy.deepcopy(network.server_half(1, classifier=classifier)),
            compute,
            momentum,
            weight_decay,
            limits or StepLimits(),
        )
        self._samples: Counter[int] = Counter()

    def begin(self, model: Model, learning_rate: float) -> None:
        """See :class:`Engine`."""
        self._shared.load(model, learning_rate)
        self._samples.clear()

    def step(self, batch: Entry, *, want_gradient: bool) -> Step:
        """See :class:`Engine`."""
        step = self._shared.step(batch, want_gradient=want_gradient)
        self._samples[batch.cut] += step.images
        return step

    def step_together(self, batches: Sequence[Entry], *, want_gradients: bool) -> list[Outcome]:
        """Never asked: it does not gather."""
        raise NotImplementedError

    def forward(
        self, device: str, number: int, cut: int, features: Tensor, *, want_gradient: bool
    ) -> Tensor:
        """See :class:`Engine`."""
        key = device, number
        return self._shared.open.forward(key, cut, features, want_gradient=want_gradient)

    def backward(self, device: str, number: int, gradient: Tensor, *, images: int) -> Tensor | None:
        """See :class:`Engine`."""
        cut = self._shared.open.cut_of((device, number))
        found = self._shared.open.backward((device, number), gradient)
        self._samples[cut] += images
        return found

    def forget(self, device: str, number: int) -> None:
        """See :class:`Engine`."""
        self._shared.open.forget((device, number))

    def finish(self, device: str) -> tuple[State, State]:
        """Nothing: the shared network goes on."""
        del device
        return {}, {}

    def close(self, aggregation: Aggregation) -> None:
        """The shared copy is one holder; a block weighs what entered at or below it."""
        self._shared.fold_by_cut(aggregation, self._samples)


class Averaging:
    """A replica of the server half for every device active in the round."""

    gathers: ClassVar[bool] = False

    def __init__(
        self,
        network: CutNetwork,
        compute: Compute,
        *,
        momentum: float,
        weight_decay: float,
        limits: StepLimits | None = None,
        classifier: bool = True,
    ) -> None:
        self._network = network
        self._compute = compute
        self._momentum = momentum
        self._weight_decay = weight_decay
        self._limits = limits or StepLimits()
        self._classifier = classifier
        self._model: Model | None = None
        self._learning_rate = 0.0
        self._replicas: dict[str, ServerCopy] = {}

    def begin(self, model: Model, learning_rate: float) -> None:
        """See :class:`Engine`."""
        self._model = model
        self._learning_rate = learning_rate
        self._replicas.clear()

    def step(self, batch: Entry, *, want_gradient: bool) -> Step:
        """See :class:`Engine`."""
        replica = self._replicas.get(batch.device) or self._replicate(batch.device, batch.cut)
        return replica.step(batch, want_gradient=want_gradient)

    def step_together(self, batches: Sequence[Entry], *, want_gradients: bool) -> list[Outcome]:
        """Never asked: it does not gather."""
        raise NotImplementedError

    def forward(
        self, device: str, number: int, cut: int, features: Tensor, *, want_gradient: bool
    ) -> Tensor:
        """See :class:`Engine`."""
        replica = self._replicas.get(device) or self._replicate(device, cut)
        return replica.open.forward((device, number), cut, features, want_gradient=want_gradient)

    def backward(self, device: str, number: int, gradient: Tensor, *, images: int) -> Tensor | None:
        """See :class:`Engine`."""
        del images
        return self._replicas[device].open.backward((device, number), gradient)

    def forget(self, device: str, number: int) -> None:
        """See :class:`Engine`."""
        if device in self._replicas:
            self._replicas[device].open.forget((device, number))

    def finish(self, device: str) -> tuple[State, State]:
        """The device's replica."""
        replica = self._replicas.pop(device, None)
        return ({}, {}) if replica is None else replica.read()

    def close(self, aggregation: Aggregation) -> None:
        """Nothing: every replica is some device's."""

    def _replicate(self, device: str, cut: int) -> ServerCopy:
        assert self._model is not None
        replica = ServerCopy(
            copy.deepcopy(self._network.server_half(cut, classifier=self._classifier)),
            self._compute,
            self._momentum,
            self._weight_decay,
            self._limits,
        )
        replica.load(self._model, self._learning_rate)
        self._replicas[device] = replica
        return replica


def make_engine(
    strategy: str,
    network: CutNetwork,
    compute: Compute,
    *,
    momentum: float,
    weight_decay: float,
    limits: StepLimits | None = None,
    classifier: bool = True,
) -> Engine:
    """The engine of a strategy: ``averaging``, ``sequential`` or ``cascade``.

    ``limits`` judge its batches, and remember those of earlier rounds. Without ``classifier`` (not
    with cascade) it does without the last block, and its steps are made in two parts.
    """
    kinds: dict[str, type[Averaging | Cascade | Sequential]] = {
        "averaging": Averaging,
        "cascade": Cascade,
        "sequential": Sequential,
    }
    return kinds[strategy](
        network,
        compute,
        momentum=momentum,
        weight_decay=weight_decay,
        limits=limits,
        classifier=classifier,
    )
