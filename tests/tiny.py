"""Small things that many tests need: a network of a few kilobytes, data for it, a clock."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from broker.messages import Assignment, Hello, Network
from broker.serving_messages import CutPolicy, Serving
from broker.training_messages import Round
from coordinator.settings import CoordinatorSettings
from edge_agent.data import DeviceData
from tensors.datasets import Dataset
from tensors.networks import Classifier, NetworkSpec, Stem
from tensors.training import Compute

Array = npt.NDArray[Any]
State = Mapping[str, Array]

torch.set_num_threads(1)  # on networks this small more threads only get in each other's way

CLASSES = 4
SIZE = 8
SPEC = NetworkSpec(width=4, channels=1, size=SIZE, classes=CLASSES, head="linear")
NETWORK = Network(width=4, channels=1, size=SIZE, classes=CLASSES, head="linear")
CPU = Compute("cpu")
RUN = "run"


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def make_dataset(count: int = 64, *, seed: int = 0, name: str = "tiny") -> Dataset:
    """Pictures of four classes: a bright quarter each, with noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int64) % CLASSES
    images = rng.integers(0, 120, (count, SIZE, SIZE, 1)).astype(np.uint8)
    half = SIZE // 2
    for image, label in zip(images, labels, strict=True):
        y, x = divmod(int(label), 2)
        image[y * half : (y + 1) * half, x * half : (x + 1) * half] += 100
    return Dataset(name, images, labels, ("a", "b", "c", "d"), (0.3,), (0.25,))


def make_device_data(count: int = 64, *, seed: int = 0, tests: int = 16) -> DeviceData:
    test = make_dataset(max(tests, 1), seed=seed + 1000)
    return DeviceData(make_dataset(count, seed=seed), np.arange(count), test, np.arange(tests))


def make_batch(size: int = 8, *, seed: int = 0) -> tuple[npt.NDArray[np.float32], Array]:
    """Images (float32, N×1×8×8) and labels (int64)."""
    rng = np.random.default_rng(seed)
    images = rng.standard_normal((size, 1, SIZE, SIZE)).astype(np.float32)
    return images, rng.integers(0, CLASSES, size)


def make_assignment(**changes: Any) -> Assignment:
    fields: dict[str, Any] = {
        "run": RUN,
        "network": NETWORK,
        "cut": 2,
        "feedback": "gradient",
        "feedback_weight": 1.0,
        "exit_weight": 1.0,
        "activation_codec": "fp32",
        "parameter_codec": "fp32",
        "batch_size": 8,
        "quota": 4,
        "window": 2,
        "credits": 2,
        "momentum": 0.9,
        "weight_decay": 0.0,
        "gradient_timeout_s": 10.0,
        "augment": "none",
        "seed": 0,
    }
    return Assignment(**(fields | changes))


def make_round(number: int = 1, **changes: Any) -> Round:
    fields: dict[str, Any] = {
        "run": RUN,
        "round": number,
        "attempt": 0,
        "phase": "training",
        "version": 0,
        "rounds": 3,
        "learning_rate": 0.05,
    }
    return Round(**(fields | changes))


def make_serving(version: int = 0, **changes: Any) -> Serving:
    """Every cut with threshold 0.5, unless ``cuts`` says otherwise."""
    fields: dict[str, Any] = {
        "run": RUN,
        "version": version,
        "exit_rule": "entropy",
        "offload_timeout_s": 5.0,
        "cuts": {str(cut): CutPolicy(threshold=0.5) for cut in range(1, 10)},
    }
    return Serving(**(fields | changes))


def make_hello(**changes: Any) -> Hello:
    fields: dict[str, Any] = {
        "boot": "boot",
        "software": "test",
        "samples": 64,
        "dataset": "tiny",
        "classes": CLASSES,
        "image": (1, SIZE, SIZE),
        "cut": 2,
    }
    return Hello(**(fields | changes))


def make_settings(**changes: Any) -> CoordinatorSettings:
    fields: dict[str, Any] = {
        "network": NETWORK,
        "codec": "fp32",
        "batch_size": 8,
        "rounds": 2,
        "batches_per_round": 3,
        "device": "cpu",
        "precision": "fp32",
        "memory_format": "contiguous",
        "schedule": "constant",
        "round_deadline_s": 100.0,
        "return_wait_s": 15.0,
        "inference": False,
    }
    return CoordinatorSettings(**(fields | changes))


def assert_same(actual: State, expected: State) -> None:
    """The same names and, bit for bit, the same values."""
    assert actual.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(actual[name], values, err_msg=name)


def assert_close(actual: State, expected: State, *, rtol: float = 1e-5) -> None:
    """The same names, and values equal to ``rtol`` relative to the largest of a tensor."""
    assert actual.keys() == expected.keys()
    for name, values in expected.items():
        scale = float(np.abs(values).max()) if values.size else 0.0
        np.testing.assert_allclose(
            actual[name], values, rtol=rtol, atol=rtol * scale + 1e-12, err_msg=name
        )


def differs(a: State, b: State) -> set[str]:
    """Names whose values are not the same bit for bit."""
    return {name for name in a if not np.array_equal(a[name], b[name])}


def linear_blocks(spec: NetworkSpec) -> list[nn.Module]:
    """A user's network without BatchNorm: flatten, two linear layers."""
    pixels = spec.channels * spec.size**2
    return [
        nn.Sequential(nn.Flatten(), nn.Linear(pixels, spec.width)),
        nn.ReLU(),
        nn.Linear(spec.width, spec.classes),
    ]


def wide_stem(spec: NetworkSpec) -> list[nn.Module]:
    """A stem as large as a real network's, and next to nothing behind it."""
    stem = Stem(spec.channels, spec.width, spec.norm, small=True)
    return [stem, nn.AvgPool2d(8), Classifier(spec.width, spec.classes)]


def one_block(spec: NetworkSpec) -> list[nn.Module]:
    return linear_blocks(spec)[:1]


def wrong_classes(spec: NetworkSpec) -> list[nn.Module]:
    return [*linear_blocks(spec)[:-1], nn.Linear(spec.width, spec.classes + 1)]


def blocks_that_fail(spec: NetworkSpec) -> list[nn.Module]:
    return [*linear_blocks(spec)[:-1], nn.Linear(spec.width + 1, spec.classes)]


def blocks_that_return_pairs(spec: NetworkSpec) -> list[nn.Module]:
    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, x

    return [Pair(), *linear_blocks(spec)]


NOT_A_FACTORY = "a string"
