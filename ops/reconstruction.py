"""Images from features: a white-box attack by somebody who has the device's layers.

The image is sought whose features, clipped as the device clips them, are nearest to what was
received, and which is smooth: argmin ‖f(x) − z‖²/‖z‖² + λ·TV(x) over pixels in 0 … 1, by Adam. For
Gaussian noise that is the most likely image under a prior of total variation. Sources: Mahendran
and Vedaldi 2015, arXiv 1412.0035; as an attack on split networks He, Zhang and Lee 2019, "Model
inversion attacks against collaborative inference", ACSAC.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ops.similarity import ssim

TRIES = (("mean", 0.05, 0.03), ("mean", 0.2, 0.3), ("flat", 0.2, 0.03), ("flat", 0.2, 0.3))
"""Where the search begins, Adam's rate and λ. What comes nearest to the truth counts: more than an
attacker can tell. A flat image is best where little was computed, elsewhere it may lead nowhere."""


def reconstruct(
    features_of: Callable[[Tensor], Tensor],
    received: Tensor,
    start: Tensor,
    *,
    rate: float,
    weight: float,
    steps: int,
) -> Tensor:
    """Images (N, C, H, W), values in 0 … 1, for the features ``received`` (N, …) of each.

    ``features_of`` maps images to features and can be differentiated. ``start`` is where the search
    begins, ``rate`` Adam's, ``weight`` the λ.
    """
    images = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([images], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    size = received.flatten(1).pow(2).sum(1).clamp(min=1e-12)
    for _ in range(steps):
        difference = (features_of(images) - received).flatten(1).pow(2).sum(1) / size
        loss = difference + weight * total_variation(images)
        (images.grad,) = torch.autograd.grad(loss.sum(), [images])
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            images.clamp_(0, 1)
    return images.detach()


def total_variation(images: Tensor) -> Tensor:
    """(N,) the mean absolute difference of neighbouring pixels."""
    down = (images[:, :, 1:] - images[:, :, :-1]).abs().mean((1, 2, 3))
    across = (images[:, :, :, 1:] - images[:, :, :, :-1]).abs().mean((1, 2, 3))
    return down + across


def best_similarity(
    features_of: Callable[[Tensor], Tensor],
    received: Tensor,
    truth: Tensor,
    mean: Tensor,
    *,
    steps: int,
) -> float:
    """The mean SSIM with the true images (N, C, H, W) of the best of several attacks.

    ``mean`` (1, C, H, W) is an image as they are on the average.
    """
    starts = {
        "mean": mean.expand_as(truth),
        "flat": mean.mean((1, 2, 3), keepdim=True).expand_as(truth),
    }
    tried = (
        reconstruct(features_of, received, starts[start], rate=rate, weight=weight, steps=steps)
        for start, rate, weight in TRIES
    )
    return max(ssim(images, truth).mean().item() for images in tried)
