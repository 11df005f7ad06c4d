"""Losses that device and coordinator share. Logits are floats (N, K), labels int64 (N,)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def distillation(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² · KL(softmax(``teacher``/T) ‖ softmax(``logits``/T)), the mean over the images.

    T² keeps its gradient as large as that of a cross entropy, whatever the temperature T > 0.
    Source: Hinton, Vinyals, Dean, arXiv 1503.02531; between a network and its own exits: Zhang et
    al., arXiv 1905.08094.
    """
    student = F.log_softmax(logits / temperature, 1)
    wanted = F.log_softmax(teacher / temperature, 1)
    divergence = F.kl_div(student, wanted, reduction="batchmean", log_target=True)
    return temperature**2 * divergence
