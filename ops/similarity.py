"""How alike two images look: the structural similarity index.

Source: Wang, Bovik, Sheikh and Simoncelli 2004, "Image quality assessment: from error visibility to
structural similarity", IEEE Transactions on Image Processing 13 (4).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (N,) of images (N, C, H, W) with values in 0 … 1; 1 for equal ones.

    As in the paper: a Gaussian window of 11×11 with σ = 1.5, K1 = 0.01, K2 = 0.03, the mean over
    every place where the window lies within the image, and over channels. In float64.
    """
    assert a.shape == b.shape
    assert min(a.shape[2:]) >= WINDOW
    channels = a.shape[1]
    x, y = a.double(), b.double()
    offsets = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    profile = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    window = torch.outer(profile, profile)
    kernel = (window / window.sum()).expand(channels, 1, WINDOW, WINDOW)

    def local(values: Tensor) -> Tensor:
        return F.conv2d(values, kernel, groups=channels)

    mean_x, mean_y = local(x), local(y)
    variance_x, variance_y = local(x * x) - mean_x**2, local(y * y) - mean_y**2
    covariance = local(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + K1**2) / (mean_x**2 + mean_y**2 + K1**2)
    structure = (2 * covariance + K2**2) / (variance_x + variance_y + K2**2)
    return (luminance * structure).mean((1, 2, 3))
