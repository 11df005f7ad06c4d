"""Devices that mean ill: what they send is well-formed and wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
import torch

from edge_agent.data import DeviceData
from ops.simulator.charging import ChargedLearner
from tensors.averaging import last_part

Attack = Literal["sign-flip", "scale", "sign-flip-scale", "garbage", "labels"]
ATTACKS: tuple[Attack, ...] = get_args(Attack)
"""On uploads of parameters: the difference to the round's start times −1, 10 or −10. On training:
activations that are noise, labels of another class."""
_FACTORS: dict[Attack, float] = {"sign-flip": -1.0, "scale": 10.0, "sign-flip-scale": -10.0}


class HostileLearner(ChargedLearner):
    """Learns as others do, and tells something else."""

    attack: Attack

    def forward(self, batch: int, images: Any, labels: Any) -> Any:
        """Features, or noise of the same mean square instead of them."""
        features = super().forward(batch, images, labels)
        if self.attack != "garbage":
            return features
        noise = torch.randn(features.shape, generator=torch.Generator().manual_seed(batch))
        return noise.abs() * features.square().mean().sqrt()

    def state(self) -> dict[str, np.ndarray]:
        """The half; where uploads are attacked as if it had learnt something else."""
        state, factor = super().state(), _FACTORS.get(self.attack)
        if factor is None:
            return state
        start = self.start.state
        return {
            name: values
            if last_part(name) in ("running_var", "num_batches_tracked")
            else start[name] + np.float32(factor) * (values - start[name])
            for name, values in state.items()
        }


def with_wrong_labels(data: DeviceData) -> DeviceData:
    """The same images; class c of K is called K − 1 − c."""
    last = len(data.train.classes) - 1
    return replace(data, train=replace(data.train, labels=last - data.train.labels))
