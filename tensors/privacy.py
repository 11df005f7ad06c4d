"""The Gaussian mechanism on features, and what a release costs in zero-concentrated privacy.

An image's features are clipped to an L2 norm C, then noise N(0, σ²) is added to every value.
Another image in its place moves them by at most Δ = 2C, so one release is ρ-zCDP with
ρ = Δ²/(2σ²); releases add up, and what is computed from released features costs nothing more.
Source: Bun and Steinke 2016, arXiv 1605.02658 (Propositions 1.3 and 1.6, Lemmas 1.7 and 1.8).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Normal = Callable[[tuple[int, ...]], NDArray[np.float32]]
"""Draws independent standard normal numbers of a shape."""

_SAFE = 1 - 2.0**-20
"""By so much less than C features are clipped that float32's rounding does not bring them above."""


@dataclass(frozen=True, slots=True)
class GaussianMechanism:
    """Clips every image's features to the L2 norm ``clip`` and adds noise of deviation ``std``."""

    clip: float
    std: float

    def __post_init__(self) -> None:
        assert self.clip > 0
        assert self.std > 0

    @property
    def rho(self) -> float:
        """zCDP of one release of one image, for another image in its place."""
        return 2 * (self.clip / self.std) ** 2

    def stricter(self, other: GaussianMechanism) -> GaussianMechanism:
        """The smaller clip and the larger noise: no weaker than either."""
        return GaussianMechanism(min(self.clip, other.clip), max(self.std, other.std))

    def release(self, features: NDArray[Any] | torch.Tensor, normal: Normal) -> Any:
        """Features (N, …) as they may leave: float32, an array or a tensor where they lay."""
        if isinstance(features, np.ndarray):
            noise = normal(features.shape)
            return clip_rows(features, _SAFE * self.clip) + np.float32(self.std) * noise
        from tensors import privacy_torch

        clipped = privacy_torch.clip_rows(features, _SAFE * self.clip)
        return privacy_torch.add_noise(clipped, self.std, normal)


def clip_rows(features: NDArray[Any], clip: float) -> NDArray[np.float32]:
    """Features (N, …), every image's scaled to an L2 norm of at most ``clip``."""
    x = features.astype(np.float32)
    norms = np.linalg.norm(x.reshape(len(x), -1).astype(np.float64), axis=1)
    scale = (clip / np.maximum(norms, clip)).astype(np.float32)
    with np.errstate(invalid="ignore"):  # infinite times 0: no codec with levels will have it
        x *= scale.reshape(-1, *[1] * (x.ndim - 1))
    return x


def epsilon_of(rho: float, delta: float) -> float:
    """The ε for which ρ-zCDP is (ε, δ)-differentially private: ρ + 2·√(ρ·ln(1/δ)).

    Bun and Steinke 2016, Proposition 1.3. Infinite for an infinite ρ.
    """
    assert 0 < delta < 1
    return rho + 2 * math.sqrt(rho * math.log(1 / delta))


def rho_of(epsilon: float, delta: float) -> float:
    """The largest ρ whose :func:`epsilon_of` does not exceed ``epsilon``."""
    assert 0 < delta < 1
    log = math.log(1 / delta)
    # (√(log + ε) − √log)², without the cancellation.
    return (epsilon / (math.sqrt(log + epsilon) + math.sqrt(log))) ** 2
