from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tensors.batches import BatchStream, normalise
from tensors.datasets import Dataset
from tensors.errors import DataError


def make_dataset(count: int = 40, side: int = 16, channels: int = 3) -> Dataset:
    shape = (count, side, side, channels)
    images = np.random.default_rng(0).integers(1, 256, shape).astype(np.uint8)
    labels = np.arange(count, dtype=np.int64) % 4
    mean, std = (0.5, 0.4, 0.3)[:channels], (0.2, 0.25, 0.3)[:channels]
    return Dataset("made", images, labels, ("a", "b", "c", "d"), mean, std)


DATASET = make_dataset()


def make_stream(
    indices: NDArray[np.int64] | None = None,
    *,
    dataset: Dataset = DATASET,
    batch_size: int = 8,
    seed: int = 0,
    device: str = "one",
    augment: str = "none",
) -> BatchStream:
    if indices is None:
        indices = np.arange(len(dataset))
    return BatchStream(
        dataset, indices, batch_size=batch_size, seed=seed, device=device, augment=augment
    )


@given(count=st.integers(1, 40), batch_size=st.integers(1, 100), epochs=st.integers(1, 4))
def test_every_epoch_holds_every_sample_once(count: int, batch_size: int, epochs: int) -> None:
    share = np.arange(40)[-count:]
    stream = make_stream(share, batch_size=batch_size)
    batches = -(-count * epochs // batch_size)
    rows = np.concatenate([stream.rows(position) for position in range(batches)])
    assert len(rows) == batches * batch_size
    for epoch in range(epochs):
        assert sorted(rows[epoch * count : (epoch + 1) * count]) == share.tolist()


@given(positions=st.lists(st.integers(0, 10**9), min_size=1, max_size=8))
def test_a_batch_depends_on_its_position_only(positions: list[int]) -> None:
    used = make_stream(batch_size=12, augment="crop-flip")
    for position in positions:
        fresh = make_stream(batch_size=12, augment="crop-flip")
        for got, wanted in zip(used.batch(position), fresh.batch(position), strict=True):
            np.testing.assert_array_equal(got, wanted)


def test_epochs_seeds_and_devices_differ() -> None:
    stream = make_stream(batch_size=40)
    orders = [
        stream.rows(0),
        stream.rows(1),
        make_stream(batch_size=40, seed=1).rows(0),
        make_stream(batch_size=40, device="two").rows(0),
    ]
    assert len({order.tobytes() for order in orders}) == 4


def test_the_stream_is_the_same_on_every_machine() -> None:
    rows = make_stream(batch_size=10, seed=7, device="pi-3").rows(5)
    assert rows.tolist() == [34, 35, 8, 27, 23, 24, 33, 19, 39, 4]
    images, _ = make_stream(batch_size=10, seed=7, device="pi-3", augment="crop-flip").batch(5)
    black = normalise(np.zeros((1, 1, 1, 3), np.uint8), DATASET.mean, DATASET.std)
    padding = (images == black).all(axis=1).sum(axis=(1, 2))
    assert padding.tolist() == [32, 31, 60, 46, 46, 32, 60, 31, 60, 16]


def test_a_batch_is_its_samples_normalised() -> None:
    stream = make_stream(np.arange(5, 25), batch_size=8)
    images, labels = stream.batch(3)
    rows = stream.rows(3)
    assert images.dtype == np.float32
    assert labels.dtype == np.int64
    assert images.shape == (8, 3, 16, 16)
    assert images.flags.c_contiguous
    np.testing.assert_array_equal(labels, DATASET.labels[rows])
    pixels = DATASET.images[rows].astype(np.float64) / 255
    wanted = ((pixels - DATASET.mean) / DATASET.std).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(images, wanted, rtol=1e-5, atol=1e-6)


def test_a_batch_may_be_changed_without_harm() -> None:
    stream = make_stream()
    images, labels = stream.batch(0)
    wanted = images.copy()
    images[:] = 0
    labels[:] = 9
    np.testing.assert_array_equal(stream.batch(0)[0], wanted)
    assert DATASET.labels.max() == 3


@pytest.mark.parametrize("channels", [1, 3])
def test_crop_flip_yields_shifted_and_mirrored_images(channels: int) -> None:
    dataset = make_dataset(side=16, channels=channels)
    plain, moved = (
        make_stream(dataset=dataset, batch_size=40, augment=augment).batch(0)[0]
        for augment in ("none", "crop-flip")
    )
    black = normalise(np.zeros((1, 16, 16, channels), np.uint8), dataset.mean, dataset.std)[0]
    seen = set()
    for image, got in zip(plain, moved, strict=True):
        canvas = np.pad(image - black, ((0, 0), (2, 2), (2, 2)))
        found = [
            (y, x, flip)
            for y in range(5)
            for x in range(5)
            for flip in (1, -1)
            if np.allclose(canvas[:, y : y + 16, x : x + 16][:, :, ::flip] + black, got, atol=1e-5)
        ]
        assert len(found) == 1
        seen.update(found)
    assert {y for y, _, _ in seen} == {x for _, x, _ in seen} == set(range(5))
    assert {flip for _, _, flip in seen} == {1, -1}


def test_what_cannot_be_streamed_is_refused() -> None:
    with pytest.raises(DataError, match="batch_size 0"):
        make_stream(batch_size=0)
    with pytest.raises(DataError, match="allowed are none, crop-flip"):
        make_stream(augment="mixup")
    with pytest.raises(DataError, match="device one has no samples"):
        make_stream(np.array([], np.int64))
    with pytest.raises(DataError, match=r"outside 0\.\.39"):
        make_stream(np.array([40]))
