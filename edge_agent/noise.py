"""Standard normal numbers that nobody can predict or repeat."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray


class SecureNormal:
    """Draws from the operating system's cryptographic generator, by Box and Muller's method (1958).

    Not from the run's seed: who knows that could take the noise off again. ``random_bytes`` is
    for tests. Uniform numbers have 53 bits, so nothing beyond 8.6 is ever drawn, whose probability
    would be 1e-17; that and the rounding of float32 are not accounted for.
    """

    def __init__(self, random_bytes: Callable[[int], bytes] = os.urandom) -> None:
        self._random_bytes = random_bytes

    def __call__(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Independent numbers of this shape, float32."""
        count = math.prod(shape)
        pairs = (count + 1) // 2
        words = np.frombuffer(self._random_bytes(16 * pairs), "<u8").reshape(2, pairs)
        uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        radius, angle = np.sqrt(-2 * np.log(uniform[0])), 2 * np.pi * uniform[1]
        both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
        return both[:count].astype(np.float32).reshape(shape)
