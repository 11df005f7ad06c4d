"""Losses that device and coordinator share. Logits are floats (N, K), labels int64 (N,)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor, log_prior: Tensor | None = None) -> Tensor:
    """The mean cross entropy; with ``log_prior`` (K,) that of ``logits`` + ``log_prior``.

    Trained so, the logits alone are right where all classes are as frequent, whatever the shares
    of those that were trained on. Source: balanced softmax, Ren et al., arXiv 2007.10740; on
    devices of unlike labels, FedLC, Zhang et al., arXiv 2209.00189.
    """
    return F.cross_entropy(logits if log_prior is None else logits + log_prior, labels)


def log_prior(counts: np.ndarray) -> Tensor:
    """ln((n_c + 1) / (n + K)) for ``counts`` n_c (K,) of n images: float32 (K,).

    One image more of each class than was seen, so that none is impossible.
    """
    smoothed = np.asarray(counts, np.float64) + 1
    return torch.from_numpy(np.log(smoothed / smoothed.sum()).astype(np.float32))


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
