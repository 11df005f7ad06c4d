from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensors.batches import AUGMENTATIONS, BatchStream, normalise
from tensors.batches_torch import TorchBatchStream, TorchImages
from tensors.datasets import Dataset

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def make(count: int, side: int, channels: int, seed: int) -> Dataset:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, side, side + 3, channels)).astype(np.uint8)
    labels = rng.integers(0, 3, count)
    mean, std = rng.random((2, channels)) * 0.5 + 0.1
    return Dataset("x", images, labels, ("a", "b", "c"), tuple(mean), tuple(std))


@pytest.mark.parametrize("device", DEVICES)
@given(
    side=st.sampled_from([7, 8, 16, 32]),
    channels=st.sampled_from([1, 3]),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 1000),
    position=st.integers(0, 50),
    augment=st.sampled_from(AUGMENTATIONS),
)
def test_the_same_batches_bit_for_bit(
    device: str,
    side: int,
    channels: int,
    batch_size: int,
    seed: int,
    position: int,
    augment: str,
) -> None:
    dataset = make(20, side, channels, seed)
    rows = np.random.default_rng(seed).permutation(20)[:13]
    about = {"batch_size": batch_size, "seed": seed, "device": "d", "augment": augment}
    expected, labels = BatchStream(dataset, rows, **about).batch(position)  # type: ignore[arg-type]
    stream = TorchBatchStream(TorchImages(dataset, device), rows, **about)  # type: ignore[arg-type]
    images, targets = stream.batch(position)
    assert images.device.type == device
    assert images.is_contiguous()
    np.testing.assert_array_equal(images.cpu().numpy(), expected)
    np.testing.assert_array_equal(targets.numpy(), labels)
    assert len(stream) == 13


def test_images_as_they_are() -> None:
    dataset = make(10, 16, 3, 0)
    rows = np.array([3, 1, 1])
    expected = normalise(dataset.images[rows], dataset.mean, dataset.std)
    np.testing.assert_array_equal(TorchImages(dataset, "cpu").take(rows).numpy(), expected)
