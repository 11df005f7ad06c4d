"""The learning on a device: pure, no I/O, no clock.

A device may have several batches out at once. Each keeps the parameters it was computed with; the
gradient that comes back for it is propagated at those and the result applied to the weights of
today. That is what a delayed gradient is (``θ_{t+1} = θ_t − η g(θ_{t−d})``), and recomputing the
forward with newer weights is not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edge_agent.errors import TrainingError
from edge_agent.figures import Outcome
from edge_agent.snapshots import Snapshot
from tensors.losses import cross_entropy, distillation, log_prior
from tensors.networks import CutNetwork, Exits, State, read_state, write_state
from tensors.privacy_torch import clip_rows
from tensors.slots import Slots
from tensors.training import (
    Compute,
    laid_out_like,
    make_optimizer,
    read_momentum,
    set_learning_rate,
    write_momentum,
)


@dataclass(slots=True)
class _InFlight:
    parameters: list[Tensor]
    features: Tensor
    logits: Tensor
    loss: Tensor
    outcome: Outcome
    teacher: Tensor | None = None
    """The whole network's logits, where its classifier is here."""


class DeviceTrainer:
    """Trains a device's blocks and exit head.

    ``exit_weight`` scales the cross entropy of the exit, ``feedback_weight`` the gradient that the
    coordinator returns for the features, ``distill_weight`` the distance of the exit's answers from
    those of the whole network (``tensors.losses.distillation`` at ``distill_temperature``); all
    together make one optimizer step. With ``clip`` every image's features are scaled to an L2 norm
    of at most that before they leave, and the returned gradient goes through that scaling, too.
    """

    def __init__(
        self,
        half: CutNetwork,
        compute: Compute,
        *,
        exit_weight: float,
        feedback_weight: float,
        momentum: float,
        weight_decay: float,
        distill_weight: float = 0.0,
        distill_temperature: float = 1.0,
        clip: float | None = None,
    ) -> None:
        compute.place(half)
        self._clip = clip
        self._half = half
        self._compute = compute
        self._exits = Exits(half)
        self._exits.train()
        self._slots = Slots(self._exits)
        self._exit_weight = exit_weight
        self._feedback_weight = feedback_weight
        self._distill_weight = distill_weight
        self._distill_temperature = distill_temperature
        self._optimizer = make_optimizer(half, momentum=momentum, weight_decay=weight_decay)
        self._in_flight: dict[int, _InFlight] = {}
        self._log_prior: Tensor | None = None

    def calibrate(self, counts: np.ndarray) -> None:
        """Train on losses that account for how many images (K,) of each class there are."""
        self._log_prior = log_prior(counts).to(self._compute.device)

    def set_learning_rate(self, rate: float) -> None:
        """Use ``rate`` from the next step on."""
        set_learning_rate(self._optimizer, rate)

    def set_feedback_weight(self, weight: float) -> None:
        """Scale the coordinator's gradients by ``weight`` from the next step on."""
        self._feedback_weight = weight

    def forward(
        self, batch: int, images: np.ndarray | Tensor, labels: np.ndarray | Tensor
    ) -> Tensor:
        """Features at the cut for ``images`` (float32, N×C×H×W), detached.

        Keeps what :meth:`backward` needs. BatchNorm statistics advance here, once per batch.
        """
        assert batch not in self._in_flight
        slots = self._slots
        parameters = [each.detach().clone().requires_grad_() for each in slots.parameters]
        buffers = [buffer.clone() for buffer in slots.buffers]
        targets = torch.as_tensor(labels).to(self._compute.device, non_blocking=True)
        with self._compute.arithmetic(), slots.filled(parameters, buffers):
            features, logits = self._exits(self._compute.tensor(images))
        if self._clip is not None:
            features = clip_rows(features, self._clip)
        loss = cross_entropy(logits.float(), targets, self._log_prior)
        hits = (logits.argmax(1) == targets).sum()
        # One look at the device instead of two.
        mean, correct = torch.stack([loss.detach(), hits.to(loss.dtype)]).tolist()
        outcome = Outcome(mean, int(correct), len(labels))
        if np.isfinite(outcome.loss):  # a batch that is refused must leave no trace
            with torch.no_grad():
                for buffer, value in zip(slots.buffers, buffers, strict=True):
                    buffer.copy_(value)
        self._in_flight[batch] = _InFlight(parameters, features, logits, loss, outcome)
        detached: Tensor = features.detach()
        return detached

    def classify(self, batch: int, features: Tensor, labels: np.ndarray | Tensor) -> Tensor:
        """One step of the classifier on the last features of ``batch``; their gradient.

        ``features`` (float, N×…) are what the coordinator made of the batch's, ``labels`` (N,) its
        own. Both derivatives, of the mean cross entropy, are taken at the classifier of now.

        Raises:
            TrainingError: the classifier does not take the features, or the loss or a derivative is
                not finite; then the step is left out.
        """
        assert self._half.classifier is not None
        own = list(self._half.blocks[self._half.classifier].parameters())
        targets = torch.as_tensor(labels).to(self._compute.device)
        leaf = self._compute.tensor(features).float().detach().requires_grad_()
        try:
            with self._compute.arithmetic():
                logits = self._half.classify(leaf)
            loss = cross_entropy(logits.float(), targets, self._log_prior)
        except (RuntimeError, ValueError) as exc:
            raise TrainingError(
                f"the last features of batch {batch} cannot be used: {exc}"
            ) from exc
        gradient, *steps = torch.autograd.grad(loss, [leaf, *own])
        total = torch.stack([loss.detach(), *(each.sum() for each in (gradient, *steps))]).sum()
        if not math.isfinite(total.item()):
            raise TrainingError(f"the loss of batch {batch} or its gradient is not finite")
        for parameter, step in zip(own, steps, strict=True):
            parameter.grad = laid_out_like(parameter, step)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if batch in self._in_flight:
            self._in_flight[batch].teacher = logits.detach()
        return gradient

    def backward(
        self, batch: int, gradient: Tensor | None, teacher: Tensor | None = None
    ) -> Outcome:
        """One optimizer step for ``batch``.

        Its exit's loss and, if given, the coordinator's ``gradient`` at the features (any float
        dtype, the features' shape) and the whole network's logits ``teacher`` (N, K), or those that
        :meth:`classify` found, are followed.

        Raises:
            TrainingError: the exit's loss or what the coordinator sent is not finite, or a shape is
                wrong; then the step is left out and the batch forgotten.
        """
        flight = self._in_flight.pop(batch)
        if not np.isfinite(flight.outcome.loss):
            raise TrainingError(
                f"the exit's loss of batch {batch} is {flight.outcome.loss}; lower the rate"
            )
        outputs: list[Tensor] = []
        weights: list[Tensor] = []
        if self._exit_weight:
            outputs.append(flight.loss)
            weights.append(torch.tensor(self._exit_weight, device=flight.loss.device))
        if gradient is not None and self._feedback_weight:
            if gradient.shape != flight.features.shape:
                raise TrainingError(
                    f"the gradient of batch {batch} has shape {tuple(gradient.shape)}, "
                    f"its features {tuple(flight.features.shape)}"
                )
            if not math.isfinite(gradient.sum(dtype=torch.float32).item()):
                raise TrainingError(f"the gradient of batch {batch} is not finite")
            outputs.append(flight.features)
            # One pass that also brings it into the features' layout.
            weights.append(torch.empty_like(flight.features).copy_(gradient))
            if self._feedback_weight != 1:
                weights[-1].mul_(self._feedback_weight)
        if teacher is None and gradient is not None:
            teacher = flight.teacher
        if teacher is not None and self._distill_weight:
            outputs.append(self._distance(batch, flight.logits, teacher))
            weights.append(torch.tensor(self._distill_weight, device=outputs[-1].device))
        if outputs:
            self._step(flight.parameters, outputs, weights)
        return flight.outcome

    def discard(self, batch: int) -> None:
        """Forget one batch without learning from it."""
        del self._in_flight[batch]

    def forget(self) -> None:
        """Drop all batches in flight: their gradients will not be used."""
        self._in_flight.clear()

    @property
    def in_flight(self) -> frozenset[int]:
        """Batches whose :meth:`backward` is due."""
        return frozenset(self._in_flight)

    def state(self) -> State:
        """Parameters and buffers of the device's half, as numpy copies."""
        return read_state(self._half)

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Take parameters and buffers; the momentum stays."""
        self.forget()
        write_state(self._half, state)

    def snapshot(self) -> Snapshot:
        """All that :meth:`restore` needs to come back to this point."""
        return Snapshot(self.state(), read_momentum(self._half, self._optimizer))

    def restore(self, snapshot: Snapshot) -> None:
        """Return to a snapshot; nothing stays in flight."""
        self.load(snapshot.state)
        write_momentum(self._half, self._optimizer, snapshot.momentum)

    def _distance(self, batch: int, logits: Tensor, teacher: Tensor) -> Tensor:
        if teacher.shape != logits.shape:
            raise TrainingError(
                f"the whole network's answers to batch {batch} have shape {tuple(teacher.shape)}, "
                f"the exit's {tuple(logits.shape)}"
            )
        if not math.isfinite(teacher.sum().item()):
            raise TrainingError(f"the whole network's answers to batch {batch} are not finite")
        teacher = teacher.to(logits.device, torch.float32)
        return distillation(logits.float(), teacher, self._distill_temperature)

    def _step(self, parameters: list[Tensor], outputs: list[Tensor], weights: list[Tensor]) -> None:
        gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
            outputs, parameters, weights, allow_unused=True
        )
        for own, gradient in zip(self._slots.parameters, gradients, strict=True):
            own.grad = None if gradient is None else laid_out_like(own, gradient)
        self._optimizer.step()
        self._optimizer.zero_grad()
