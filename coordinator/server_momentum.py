"""What the server's momentum is from one version to the next."""

from __future__ import annotations

from typing import Literal

import numpy as np

from coordinator.aggregation import Model

MomentumRule = Literal["averaged", "reset", "outer"]
_NOT_TRAINED = ("running_mean", "running_var", "num_batches_tracked")


def carry_over(rule: MomentumRule, start: Model, merged: Model, *, outer: float) -> Model:
    """The next version, of which ``merged`` is what a round that began with ``start`` came to.

    ``averaged``: ``merged``, with the mean of the copies' momentum. ``reset``: every round begins
    without momentum. ``outer``: the same, and versions have a momentum among themselves: with the
    coefficient ``outer`` β, v ← βv + (merged − start) and the next version is start + v (FedAvgM,
    Hsu, Qi, Brown, arXiv 1909.06335, with a server rate of 1). That is for parameters; BatchNorm's
    statistics are those of ``merged``. A tensor that nobody has trained stays, as does its v.
    """
    if rule == "averaged":
        return merged
    momentum = {name: np.zeros_like(values) for name, values in merged.momentum.items()}
    if rule == "reset":
        return Model(merged.state, momentum)
    state, velocity = dict(merged.state), dict(start.velocity)
    for name, values in merged.state.items():
        before = start.state[name]
        if name.endswith(_NOT_TRAINED) or np.array_equal(values, before):
            continue
        velocity[name] = values - before + np.float32(outer) * velocity.get(name, np.float32(0))
        state[name] = before + velocity[name]
    return Model(state, momentum, velocity)
