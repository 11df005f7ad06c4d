"""What tests of the coordinator share: the tiny network, features at its cuts, trained halves."""

from __future__ import annotations

from typing import Any

import numpy as np

from broker.training_messages import Activations, DeviceParameters
from coordinator.aggregation import Model, block_of
from tensors.codecs import parse_codec
from tensors.networks import build_network, feature_shapes, read_state
from tensors.parameters import pack_parameters
from tests.tiny import CLASSES, SPEC, Array

NETWORK = build_network(SPEC)
STATE = read_state(NETWORK)
SHAPES = feature_shapes([NETWORK.blocks[str(i)] for i in range(NETWORK.stop)], SPEC)[:-1]
START = Model(
    STATE,
    {
        name: np.zeros(tuple(parameter.shape), np.float32)
        for name, parameter in NETWORK.named_parameters()
        if block_of(name) is not None
    },
)

FP32 = parse_codec("fp32")
Stamp = tuple[str, int, int]


def features_at(cut: int, seed: int = 0, size: int = 8) -> Array:
    rng = np.random.default_rng(seed)
    return np.maximum(rng.standard_normal((size, *SHAPES[cut - 1])), 0).astype(np.float32)


def poisoned_features() -> bytes:
    features = features_at(2)
    features[0] = np.nan
    return FP32.encode(features)


def trained_half(cut: int) -> dict[str, Array]:
    """A device's half in which every number has grown by a quarter."""
    state = read_state(NETWORK.device_half(cut))
    return {n: v if v.dtype.kind == "i" else v + np.float32(0.25) for n, v in state.items()}


def make_activations(
    stamp: Stamp, batch: int, *, cut: int, version: int, **changes: Any
) -> Activations:
    run, number, attempt = stamp
    fields: dict[str, Any] = {
        "run": run,
        "round": number,
        "attempt": attempt,
        "batch": batch,
        "version": version,
        "labels": [i % CLASSES for i in range(8)],
        "tensor": parse_codec("fp32").encode(features_at(cut, batch)),
    }
    return Activations(**(fields | changes))


def make_upload(
    stamp: Stamp, *, cut: int, version: int, produced: int, **changes: Any
) -> DeviceParameters:
    run, number, attempt = stamp
    fields: dict[str, Any] = {
        "run": run,
        "round": number,
        "attempt": attempt,
        "version": version,
        "produced": produced,
        "state": pack_parameters(trained_half(cut)),
    }
    return DeviceParameters(**(fields | changes))
