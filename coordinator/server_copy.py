"""A server-side copy of blocks with its optimizer, and what goes in and comes out of a step."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from coordinator.aggregation import Aggregation, Model, block_of
from coordinator.defences.steps import StepLimits
from coordinator.errors import BatchRefused
from coordinator.open_batches import OpenBatches
from tensors.errors import AveragingError
from tensors.losses import cross_entropy
from tensors.networks import CutNetwork, State, read_state, write_state
from tensors.training import (
    Compute,
    make_optimizer,
    read_momentum,
    set_learning_rate,
    write_momentum,
)

log = logging.getLogger("splitfleet.coordinator")


@dataclass(frozen=True, slots=True)
class Entry:
    """A batch of ``device`` that enters at ``cut``: features ``(N, …)``, labels ``(N,)``.

    ``log_prior`` ``(K,)``, if given, calibrates its loss.
    """

    device: str
    cut: int
    features: Tensor
    labels: Tensor
    log_prior: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """Of one batch at the server: mean loss, correct answers, images, gradient at the cut, logits.

    ``logits`` (N, K), float32 or wider, are those before the step; None if nothing was computed.
    """

    loss: float
    correct: int
    images: int
    gradient: Tensor | None
    logits: Tensor | None = None


class ServerCopy:
    """One server-side copy of blocks, with its optimizer."""

    def __init__(
        self,
        network: CutNetwork,
        compute: Compute,
        momentum: float,
        weight_decay: float,
        limits: StepLimits,
    ) -> None:
        compute.place(network)
        self.network = network.train()
        self._compute = compute
        self._limits = limits
        self.optimizer = make_optimizer(network, momentum=momentum, weight_decay=weight_decay)
        self._momentum, self._weight_decay = momentum, weight_decay
        self._gradient_weight = 1.0
        self.open = OpenBatches(network, self.optimizer, compute, limits)
        self._buffers = list(network.buffers())
        self._norms = {
            index: [m for m in network.blocks[str(index)].modules() if isinstance(m, _NormBase)]
            for index in range(network.start, network.stop)
        }

    def load(self, model: Model, learning_rate: float) -> None:
        """Take the model's blocks and momentum."""
        names = self.network.state_dict().keys()
        write_state(self.network, {name: model.state[name] for name in names})
        write_momentum(self.network, self.optimizer, model.momentum)
        self.open.clear()
        self.pace(learning_rate)

    def pace(self, learning_rate: float, *, steps: int = 1) -> None:
        """How a step is made from now on: with this rate, and the momentum of ``steps`` steps.

        The momentum then decays by mᵏ instead of m and takes up the gradient 1 + m + … + mᵏ⁻¹
        times, as in k steps that all had this gradient.
        """
        self._gradient_weight = sum(self._momentum**step for step in range(steps))
        set_learning_rate(self.optimizer, learning_rate)
        for group in self.optimizer.param_groups:
            group["momentum"] = self._momentum**steps
            group["weight_decay"] = self._weight_decay * self._gradient_weight

    def step(self, entry: Entry, *, want_gradient: bool) -> Step:
        """:meth:`step_together` on one batch."""
        (step,) = self.step_together([entry], want_gradients=want_gradient)
        return step

    def step_together(self, entries: Sequence[Entry], *, want_gradients: bool) -> list[Step]:
        """One optimizer step on all ``entries``: on the mean of their mean losses.

        Before block ``i`` the batches that enter there join what flows. The gradient returned for
        a batch is that of its own mean loss. A BatchNorm normalises all that is in its block
        together; where that is B batches its running averages move by 1 − (1 − momentum)^B, as far
        as B steps would move them.

        Raises :class:`BatchRefused` and changes nothing if a loss or gradient is not finite
        (``diverged``), a loss stands out (``outlier_loss``) or something cannot be computed
        (``not_computable``).
        """
        with self._unless_refused():
            steps = self._propagate(entries, want_gradients=want_gradients)
            if len(entries) > 1 and any(self._limits.is_outlier(step.loss) for step in steps):
                raise BatchRefused("outlier_loss")
            for entry, step in zip(entries, steps, strict=True):
                self._judge(entry, step)
        first = min(entry.cut for entry in entries)
        self._limits.clip(first, self.network.parameters(), batches=len(entries))
        weight = self._gradient_weight / len(entries)
        if weight != 1:
            for parameter in self.network.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(weight)
        self.optimizer.step()
        return steps

    def is_to_blame(self, entry: Entry, *, want_gradient: bool) -> BatchRefused | None:
        """Why a step on this batch alone would be refused, other than as ``not_computable``.

        Changes nothing.
        """
        before = self._keep()
        try:
            (step,) = self._propagate([entry], want_gradients=want_gradient)
            if self._limits.is_outlier(step.loss):
                self._judge(entry, step)
        except BatchRefused as exc:
            return None if exc.reason == "not_computable" else exc
        finally:
            self._restore(before)
        return None

    def _judge(self, entry: Entry, step: Step) -> None:
        refused = self._limits.is_outlier(step.loss)
        self._limits.note(entry.device, step.loss)
        if refused:
            raise BatchRefused("outlier_loss")

    def read(self) -> tuple[State, State]:
        """Parameters and buffers, and the momentum."""
        return read_state(self.network), read_momentum(self.network, self.optimizer)

    def fold_by_cut(self, aggregation: Aggregation, samples: Mapping[int, int]) -> None:
        """Fold in block by block: each weighs the ``samples`` (by cut) that went through it."""
        state, momentum = self.read()
        cuts = sorted(samples)
        for cut, following in pairwise([*cuts, self.network.stop]):
            blocks = range(cut, following)
            try:
                aggregation.add_server(
                    {name: v for name, v in state.items() if block_of(name) in blocks},
                    {name: v for name, v in momentum.items() if block_of(name) in blocks},
                    sum(samples[c] for c in cuts if c <= cut),
                    shared=True,
                )
            except AveragingError as exc:
                log.warning("a server copy is left out of the average: %s", exc)

    # -- the pass ---------------------------------------------------------------------------------

    def _propagate(self, entries: Sequence[Entry], *, want_gradients: bool) -> list[Step]:
        """Forward and backward of the sum of all losses, so that each batch gets its own gradient.

        BatchNorm's buffers have moved, also if this raises.
        """
        order = sorted(range(len(entries)), key=lambda index: entries[index].cut)
        placed = [entries[index] for index in order]
        sizes = [len(entry.labels) for entry in placed]
        try:
            entering = self._entering(placed, want_gradients=want_gradients)
            with self._compute.arithmetic():
                logits = self._flow(entering, placed)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            targets = torch.cat([entry.labels for entry in placed]).to(self._compute.device)
            priors = [
                None if entry.log_prior is None else entry.log_prior.to(logits.device)
                for entry in placed
            ]
            parts = zip(logits.split(sizes), targets.split(sizes), priors, strict=True)
            losses = torch.stack([cross_entropy(*part) for part in parts])
        except torch.AcceleratorError:  # the machine's fault, not the batch's
            raise
        except (RuntimeError, ValueError) as exc:  # e.g. one image is too little for a BatchNorm
            log.warning("%d images cannot be computed: %s", sum(sizes), exc)
            raise BatchRefused("not_computable") from exc
        hits = torch.stack([hit.sum() for hit in (logits.argmax(1) == targets).split(sizes)])
        self.optimizer.zero_grad()
        losses.sum().backward()
        gradients = self._gradients(entering, placed)
        sums = [each.sum(dtype=losses.dtype) for each in gradients if each is not None]
        # One look at the device, when all is under way.
        seen = torch.cat(
            [losses.detach(), hits.to(losses.dtype), *(s[None] for s in sums)]
        ).tolist()
        count = len(sizes)
        values, correct = seen[:count], seen[count : 2 * count]
        if not all(map(math.isfinite, seen)):
            raise BatchRefused("diverged")
        steps = [
            Step(value, int(right), size, gradient, answer)
            for value, right, size, gradient, answer in zip(
                values, correct, sizes, gradients, logits.detach().split(sizes), strict=True
            )
        ]
        return [step for _, step in sorted(zip(order, steps, strict=True), key=lambda p: p[0])]

    def _entering(self, placed: Sequence[Entry], *, want_gradients: bool) -> dict[int, Tensor]:
        """The features of each cut, one batch after the other, as leaves of the graph."""
        by_cut: dict[int, list[Tensor]] = {}
        for entry in placed:
            by_cut.setdefault(entry.cut, []).append(self._compute.tensor(entry.features))
        return {
            cut: _joined(features).detach().requires_grad_(want_gradients)
            for cut, features in by_cut.items()
        }

    def _flow(self, entering: Mapping[int, Tensor], placed: Sequence[Entry]) -> Tensor:
        flow: list[Tensor] = []
        for index in range(min(entering), self.network.stop):
            if index in entering:
                flow.append(entering[index])
            batches = sum(entry.cut <= index for entry in placed)
            with _moving_as_in(batches, self._norms[index]):
                flow = [self.network(_joined(flow), start=index, stop=index + 1)]
        return flow[0]

    def _gradients(
        self, entering: Mapping[int, Tensor], placed: Sequence[Entry]
    ) -> list[Tensor | None]:
        gradients: list[Tensor | None] = []
        for cut, leaf in entering.items():
            sizes = [len(entry.labels) for entry in placed if entry.cut == cut]
            if leaf.grad is None:
                gradients.extend([None] * len(sizes))
                continue
            gradients.extend(leaf.grad.split(sizes))
        return gradients

    # -- a refused batch must leave no trace; BatchNorm's statistics change in the forward pass ----

    @contextmanager
    def _unless_refused(self) -> Iterator[None]:
        before = self._keep()
        try:
            yield
        except BatchRefused:
            self._restore(before)
            raise

    def _keep(self) -> list[Tensor]:
        return [buffer.clone() for buffer in self._buffers]

    def _restore(self, before: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for buffer, value in zip(self._buffers, before, strict=True):
                buffer.copy_(value)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


@contextmanager
def _moving_as_in(batches: int, norms: Sequence[_NormBase]) -> Iterator[None]:
    """Running averages that move within as far as in ``batches`` forward passes."""
    if batches == 1:
        yield
        return
    usual = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = _share(norm, batches)
    try:
        yield
    finally:
        for norm, momentum in zip(norms, usual, strict=True):
            norm.momentum = momentum
    for norm in norms:
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(batches - 1)


def _share(norm: _NormBase, batches: int) -> float | None:
    """What the newest statistics count for in the running averages."""
    if norm.momentum is not None:
        return float(1 - (1 - norm.momentum) ** batches)
    if norm.num_batches_tracked is None:
        return None
    return batches / (int(norm.num_batches_tracked.item()) + batches)  # the mean of all batches
