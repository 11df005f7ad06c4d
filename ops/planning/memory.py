"""What training needs in memory, at a device and at the server."""

from __future__ import annotations

import math

from coordinator.settings import CoordinatorSettings
from edge_agent.measure import training_bytes
from ops.simulator.sizes import MessageSizes

MIB = 2**20
FLOAT = 4
WEIGHT = 12
"""Bytes that the server's optimizer has for each number: weight, gradient and momentum."""
MODEL = 4 * FLOAT
"""Model and momentum of the last version, and what a round is averaged in."""


def device_mb(settings: CoordinatorSettings, sizes: MessageSizes) -> list[float]:
    """MiB that training takes at each cut.

    As a device measures itself for cut ``auto``, and for each batch more that ``window`` lets out,
    once more the saved features and the weights it was computed with.
    """
    result = []
    values = 0.0
    for shape, weights in zip(sizes.shapes, sizes.device_weights, strict=True):
        values += settings.batch_size * math.prod(shape)
        one = training_bytes(weights, values, FLOAT)
        more = training_bytes(0, values, FLOAT) + FLOAT * weights
        result.append((one + (settings.window - 1) * more) / MIB)
    return result


def server_mb(
    settings: CoordinatorSettings, sizes: MessageSizes, cuts: list[int], strategy: str
) -> float:
    """MiB that a round with these devices takes: the model, the copies that are trained, a batch.

    ``averaging`` has a replica for each device, at most; others one network for all.
    """
    whole = sizes.device_weights[0] + sizes.server_weights[0]
    if strategy == "averaging":
        copies = sum(sizes.server_weights[cut - 1] for cut in cuts)
    else:
        copies = sizes.server_weights[0]
    first = min(cuts, default=1)
    values = settings.batch_size * sum(math.prod(shape) for shape in sizes.shapes[first - 1 :])
    return (MODEL * whole + WEIGHT * copies + training_bytes(0, values, FLOAT)) / MIB
