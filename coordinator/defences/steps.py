"""What the server learns from one batch: losses that stand out are refused, gradients clipped.

Averaging does not see poisoned activations and labels, for it is the server that learns from them.
"""

from __future__ import annotations

import statistics
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

ENOUGH = 16
"""Batches that must be known before one is judged by them."""
OF_A_DEVICE = 8
"""Losses of a device that count, so that none outvotes the others by sending more."""
NORMS = 256


@dataclass(slots=True)
class StepLimits:
    """Judges batches by those before them, of all devices and rounds. None switches a rule off.

    ``loss_mads``: a batch is refused whose loss is more than the median + so many median absolute
    deviations (at least a tenth of the median each, as for a round's deadline) of the last
    :data:`OF_A_DEVICE` losses of every device. Devices of unlike data make that deviation larger.

    ``gradient_clip``: a step's gradient is not longer than so many times the median of the last
    :data:`NORMS` at its cut (clipping by history: Seetharaman et al. 2020, arXiv 2007.14469, there
    with a percentile).

    ``devices``: of so many losses are known, those of the most recent.
    """

    loss_mads: float | None = None
    gradient_clip: float | None = None
    devices: int = 1000
    _losses: OrderedDict[str, deque[float]] = field(default_factory=OrderedDict)
    _norms: dict[int, deque[float]] = field(default_factory=dict)

    def is_outlier(self, loss: float) -> bool:
        """Whether a batch with this loss stands out."""
        if self.loss_mads is None:
            return False
        losses = list(chain.from_iterable(self._losses.values()))
        if len(losses) < ENOUGH:
            return False
        median = statistics.median(losses)
        deviation = statistics.median(abs(loss - median) for loss in losses)
        return loss > median + self.loss_mads * max(deviation, 0.1 * median)

    def note(self, device: str, loss: float) -> None:
        """A batch had this loss; those that were refused count as well, for losses may rise."""
        if self.loss_mads is None:
            return
        self._losses.setdefault(device, deque(maxlen=OF_A_DEVICE)).append(loss)
        self._losses.move_to_end(device)
        while len(self._losses) > self.devices:
            self._losses.popitem(last=False)

    def clip(self, cut: int, parameters: Iterable[Tensor], *, batches: int) -> None:
        """Shorten the gradients of a step on the sum of so many losses, the first at ``cut``.

        What is measured and kept is the norm of their mean.
        """
        if self.gradient_clip is None:
            return
        gradients = [each.grad for each in parameters if each.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients)) / batches
        known = self._norms.setdefault(cut, deque(maxlen=NORMS))
        known.append(norm)
        if len(known) < ENOUGH:
            return
        bound = self.gradient_clip * statistics.median(known)
        if norm > bound:
            torch._foreach_mul_(gradients, bound / norm)
