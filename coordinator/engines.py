"""The two training strategies of the server side (Hetero-SplitEE, arXiv 2512.09313).

*Sequential*: one shared network; batches are applied in the order they arrive, each entering at
its cut. *Averaging*: one replica per device and round, folded into the aggregation as soon as its
device has finished, so that memory grows with the devices active at once.
"""

from __future__ import annotations

import copy
import logging
import math
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import NoReturn, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from coordinator.aggregation import Aggregation, Model, block_of
from coordinator.errors import BatchRefused
from tensors.errors import AveragingError
from tensors.networks import CutNetwork, read_state, write_state
from tensors.training import (
    Compute,
    make_optimizer,
    read_momentum,
    set_learning_rate,
    write_momentum,
)

log = logging.getLogger("splitfleet.coordinator")


@dataclass(frozen=True, slots=True)
class Step:
    """Of one batch at the server: mean loss, correct answers, images, gradient at the cut."""

    loss: float
    correct: int
    images: int
    gradient: Tensor | None


class Engine(Protocol):
    """Trains the server side during one round."""

    def begin(self, model: Model, learning_rate: float) -> None:
        """Start a round from ``model``."""
        ...

    def step(
        self, device: str, cut: int, features: Tensor, labels: Tensor, *, want_gradient: bool
    ) -> Step:
        """Train on one batch of ``device``, entering at ``cut``.

        Raises :class:`BatchRefused` and changes nothing if the loss or the gradient at the cut is
        not finite (``diverged``) or cannot be computed (``not_computable``).
        """
        ...

    def finish(self, device: str, aggregation: Aggregation) -> None:
        """No more batches of ``device`` come in this round."""
        ...

    def close(self, aggregation: Aggregation) -> None:
        """Fold in what is left and free it."""
        ...


class _Copy:
    """One server-side copy of blocks, with its optimizer."""

    def __init__(
        self, network: CutNetwork, compute: Compute, momentum: float, weight_decay: float
    ) -> None:
        compute.place(network)
        self.network = network.train()
        self._compute = compute
        self.optimizer = make_optimizer(network, momentum=momentum, weight_decay=weight_decay)
        self._buffers = list(network.buffers())

    def load(self, model: Model, learning_rate: float) -> None:
        names = self.network.state_dict().keys()
        write_state(self.network, {name: model.state[name] for name in names})
        write_momentum(self.network, self.optimizer, model.momentum)
        set_learning_rate(self.optimizer, learning_rate)

    def step(self, cut: int, features: Tensor, labels: Tensor, *, want_gradient: bool) -> Step:
        x = self._compute.tensor(features).requires_grad_(want_gradient)
        targets = labels.to(self._compute.device)
        # BatchNorm's statistics change in the forward pass; a refused batch must leave no trace.
        before = [buffer.clone() for buffer in self._buffers]
        try:
            with self._compute.arithmetic():
                logits = self.network(x, start=cut)
            loss = F.cross_entropy(logits.float(), targets)
        except (RuntimeError, ValueError) as exc:  # e.g. one image is too little for a BatchNorm
            log.warning("a batch of %d images cannot be computed: %s", len(labels), exc)
            self._refuse(before, "not_computable")
        value = loss.item()
        if not math.isfinite(value):
            self._refuse(before, "diverged")
        self.optimizer.zero_grad()
        loss.backward()
        if x.grad is not None and not math.isfinite(x.grad.sum().item()):
            self._refuse(before, "diverged")
        self.optimizer.step()
        correct = int((logits.argmax(1) == targets).sum().item())
        return Step(value, correct, len(labels), x.grad)

    def _refuse(self, before: list[Tensor], reason: str) -> NoReturn:
        with torch.no_grad():
            for buffer, value in zip(self._buffers, before, strict=True):
                buffer.copy_(value)
        raise BatchRefused(reason)

    def fold(self, aggregation: Aggregation, samples: int, blocks: range | None = None) -> None:
        state = read_state(self.network)
        momentum = read_momentum(self.network, self.optimizer)
        if blocks is not None:
            state = {name: v for name, v in state.items() if block_of(name) in blocks}
            momentum = {name: v for name, v in momentum.items() if block_of(name) in blocks}
        try:
            aggregation.add_server(state, momentum, samples)
        except AveragingError as exc:
            log.warning("a server copy is left out of the average: %s", exc)


class Sequential:
    """One shared server network for all devices."""

    def __init__(
        self, network: CutNetwork, compute: Compute, *, momentum: float, weight_decay: float
    ) -> None:
        self._shared = _Copy(copy.deepcopy(network.server_half(1)), compute, momentum, weight_decay)
        self._samples: Counter[int] = Counter()

    def begin(self, model: Model, learning_rate: float) -> None:
        """See :class:`Engine`."""
        self._shared.load(model, learning_rate)
        self._samples.clear()

    def step(
        self, device: str, cut: int, features: Tensor, labels: Tensor, *, want_gradient: bool
    ) -> Step:
        """See :class:`Engine`."""
        del device
        step = self._shared.step(cut, features, labels, want_gradient=want_gradient)
        self._samples[cut] += step.images
        return step

    def finish(self, device: str, aggregation: Aggregation) -> None:
        """Nothing to fold: the shared network goes on."""

    def close(self, aggregation: Aggregation) -> None:
        """The shared copy is one holder; a block weighs what entered at or below it."""
        stop = self._shared.network.stop
        cuts = sorted(self._samples)
        for cut, following in pairwise([*cuts, stop]):
            entered = sum(self._samples[c] for c in cuts if c <= cut)
            self._shared.fold(aggregation, entered, range(cut, following))


class Averaging:
    """A replica of the server half for every device active in the round."""

    def __init__(
        self, network: CutNetwork, compute: Compute, *, momentum: float, weight_decay: float
    ) -> None:
        self._network = network
        self._compute = compute
        self._momentum = momentum
        self._weight_decay = weight_decay
        self._model: Model | None = None
        self._learning_rate = 0.0
        self._replicas: dict[str, _Copy] = {}
        self._samples: Counter[str] = Counter()

    def begin(self, model: Model, learning_rate: float) -> None:
        """See :class:`Engine`."""
        self._model = model
        self._learning_rate = learning_rate
        self._replicas.clear()
        self._samples.clear()

    def step(
        self, device: str, cut: int, features: Tensor, labels: Tensor, *, want_gradient: bool
    ) -> Step:
        """See :class:`Engine`."""
        replica = self._replicas.get(device) or self._replicate(device, cut)
        step = replica.step(cut, features, labels, want_gradient=want_gradient)
        self._samples[device] += step.images
        return step

    def finish(self, device: str, aggregation: Aggregation) -> None:
        """Fold the device's replica and free it."""
        replica = self._replicas.pop(device, None)
        if replica is not None:
            replica.fold(aggregation, self._samples.pop(device, 0))

    def close(self, aggregation: Aggregation) -> None:
        """What devices sent that never finished counts too: the replica did learn from it."""
        for device in sorted(self._replicas):
            self.finish(device, aggregation)

    def _replicate(self, device: str, cut: int) -> _Copy:
        assert self._model is not None
        replica = _Copy(
            copy.deepcopy(self._network.server_half(cut)),
            self._compute,
            self._momentum,
            self._weight_decay,
        )
        replica.load(self._model, self._learning_rate)
        self._replicas[device] = replica
        return replica


STRATEGIES: dict[str, type[Sequential | Averaging]] = {
    "averaging": Averaging,
    "sequential": Sequential,
}
