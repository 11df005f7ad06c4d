"""The Gaussian mechanism's steps on torch tensors; the clip can be differentiated."""

from __future__ import annotations

import torch
from torch import Tensor

from tensors.privacy import Normal


def clip_rows(features: Tensor, clip: float) -> Tensor:
    """Features (N, …) in float32, every image's scaled to an L2 norm of at most ``clip``."""
    x = features.float()
    norms = torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=torch.float64)
    scale = (clip / norms.clamp(min=clip)).float()
    clipped: Tensor = x * scale.reshape(-1, *[1] * (x.dim() - 1))
    return clipped


def add_noise(features: Tensor, std: float, normal: Normal) -> Tensor:
    """float32 features plus noise of that deviation, drawn on the CPU."""
    noise = torch.from_numpy(normal(tuple(features.shape)))
    return features + std * noise.to(features.device)
