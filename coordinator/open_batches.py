"""Steps of a server copy in two parts, where the loss is computed by the devices.

The forward pass is made when a batch's activations come, the backward pass when the gradient of its
last features does. Between the two other batches may change the weights: the backward pass goes
through the parameters that the forward pass was made with, and its result is applied to those of
today, as on the devices. Nothing is computed again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coordinator.defences.steps import StepLimits
from coordinator.errors import BatchRefused
from tensors.networks import CutNetwork
from tensors.slots import Slots
from tensors.training import Compute, laid_out_like

log = logging.getLogger("splitfleet.coordinator")

Key = tuple[str, int]
"""Device and number of the batch."""


@dataclass(frozen=True, slots=True, eq=False)
class _Open:
    cut: int
    parameters: Sequence[Tensor]
    entering: Tensor
    last: Tensor


class OpenBatches:
    """Batches of ``network`` whose last features are out.

    Batches that entered between the same two steps share one copy of the parameters. BatchNorm's
    running statistics move in the forward pass, so a batch that is never finished leaves these
    moved and nothing else.
    """

    def __init__(
        self,
        network: CutNetwork,
        optimizer: torch.optim.Optimizer,
        compute: Compute,
        limits: StepLimits,
    ) -> None:
        self._network = network
        self._optimizer = optimizer
        self._compute = compute
        self._limits = limits
        self._slots = Slots(network)
        self._snapshot: list[Tensor] | None = None
        self._open: dict[Key, _Open] = {}

    def __len__(self) -> int:
        return len(self._open)

    def clear(self) -> None:
        """Forget all of them, and the parameters they were computed with."""
        self._open.clear()
        self._snapshot = None

    def forget(self, key: Key) -> None:
        """Forget one, if it is open."""
        self._open.pop(key, None)

    def cut_of(self, key: Key) -> int:
        """Where an open batch entered."""
        return self._open[key].cut

    def forward(self, key: Key, cut: int, features: Tensor, *, want_gradient: bool) -> Tensor:
        """The last features (float32, N×…) of a batch that enters at ``cut``, which is open then.

        Raises :class:`BatchRefused` and changes nothing if they are not finite (``diverged``) or
        cannot be computed (``not_computable``).
        """
        assert key not in self._open
        slots = self._slots
        if self._snapshot is None:
            self._snapshot = [each.detach().clone().requires_grad_() for each in slots.parameters]
        buffers = [buffer.clone() for buffer in slots.buffers]
        entering = self._compute.tensor(features).detach().requires_grad_(want_gradient)
        try:
            with self._compute.arithmetic(), slots.filled(self._snapshot, buffers):
                last = self._network(entering, start=cut)
        except torch.AcceleratorError:  # the machine's fault, not the batch's
            raise
        except (RuntimeError, ValueError) as exc:  # e.g. one image is too little for a BatchNorm
            log.warning("%d images cannot be computed: %s", len(features), exc)
            raise BatchRefused("not_computable") from exc
        found: Tensor = last.detach().float()
        if not math.isfinite(found.sum().item()):
            raise BatchRefused("diverged")
        with torch.no_grad():
            for buffer, value in zip(slots.buffers, buffers, strict=True):
                buffer.copy_(value)
        self._open[key] = _Open(cut, self._snapshot, entering, last)
        return found

    def backward(self, key: Key, gradient: Tensor) -> Tensor | None:
        """One optimizer step on an open batch, from the ``gradient`` (N×…) of its last features.

        What comes back is the gradient where it entered, if that was wanted. Raises
        :class:`BatchRefused` (``diverged``) and changes nothing if that or a parameter's is not
        finite. The batch is not open any more.
        """
        opened = self._open.pop(key)
        wanted = [*opened.parameters]
        if opened.entering.requires_grad:
            wanted.append(opened.entering)
        gradient = torch.empty_like(opened.last).copy_(gradient)
        found: tuple[Tensor | None, ...] = torch.autograd.grad(
            [opened.last], wanted, [gradient], allow_unused=True
        )
        norm = torch.nn.utils.get_total_norm([each for each in found if each is not None])
        if not math.isfinite(norm.item()):
            raise BatchRefused("diverged")
        own = self._slots.parameters
        for parameter, step in zip(own, found[: len(own)], strict=True):
            parameter.grad = None if step is None else laid_out_like(parameter, step)
        self._limits.clip(opened.cut, own, batches=1)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._snapshot = None
        return found[-1] if opened.entering.requires_grad else None
