"""The endless stream of training batches of one device."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tensors.datasets import Dataset
from tensors.errors import DataError

AUGMENTATIONS = ("none", "crop-flip")
_ORDER, _AUGMENT = 0, 1


class BatchStream:
    """Batches of a device's share of a data set, as a pure function of their position.

    The stream is one random order of the share after another, one per epoch, without a seam: batch
    p holds samples [pB, (p + 1)B) of it, so every batch is full. Everything random follows from
    (seed, device, position): a device that goes back to an earlier position sees the same batches
    again, bit for bit, on any machine and any version of numpy.

    augment: "none", or "crop-flip": a crop at a random place after padding with an eighth of the
    side in black (4 pixels at 32), and a mirror image half of the time.
    """

    def __init__(
        self,
        dataset: Dataset,
        indices: NDArray[np.integer],
        *,
        batch_size: int,
        seed: int,
        device: str,
        augment: str = "none",
    ) -> None:
        if batch_size < 1:
            raise DataError(f"batch_size {batch_size}: must be at least 1")
        if augment not in AUGMENTATIONS:
            raise DataError(f"augment {augment!r}: allowed are {', '.join(AUGMENTATIONS)}")
        if indices.ndim != 1 or len(indices) == 0:
            raise DataError(f"device {device} has no samples: give it some or leave it out")
        if indices.min() < 0 or indices.max() >= len(dataset):
            raise DataError(f"device {device} has samples outside 0..{len(dataset) - 1}")
        self.batch_size = batch_size
        self._dataset = dataset
        self._indices = indices.astype(np.int64)
        self._augment = augment
        self._entropy = int.from_bytes(hashlib.sha256(f"{seed}/{device}".encode()).digest(), "big")
        self._orders: dict[int, NDArray[np.int64]] = {}

    def __len__(self) -> int:
        """Samples in an epoch."""
        return len(self._indices)

    def batch(self, position: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Batch number `position` >= 0: normalised images float32 (B, C, H, W), labels int64 (B,).

        Both are fresh, C-contiguous arrays.
        """
        assert position >= 0, position
        rows = self.rows(position)
        images = self._dataset.images[rows]
        crops = self.crops(position)
        if crops is not None:
            images = _crop_flip(images, *crops)
        pixels = normalise(images, self._dataset.mean, self._dataset.std)
        return pixels, self._dataset.labels[rows]

    def keys(self, position: int) -> list[bytes]:
        """By what the images of a batch are known, (B,): see :func:`image_key`."""
        data = self._dataset
        images = normalise(data.images[self.rows(position)], data.mean, data.std)
        return [image_key(each) for each in images]

    def crops(
        self, position: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]] | None:
        """How the images of a batch are cropped and flipped; None if they are left as they are.

        Of each the first row and column of the crop, counted in the padded image, and whether it is
        mirrored: (B,) each.
        """
        if self._augment != "crop-flip":
            return None
        _, height, width, _ = self._dataset.images.shape
        top, left = height // 8, width // 8
        words = self._raw(_AUGMENT, position, 3 * self.batch_size).reshape(3, self.batch_size)
        ys = (words[0] % np.uint64(2 * top + 1)).astype(np.int64)
        xs = (words[1] % np.uint64(2 * left + 1)).astype(np.int64)
        return ys, xs, words[2] % np.uint64(2) == 1

    def rows(self, position: int) -> NDArray[np.int64]:
        """Which samples of the data set make up a batch: (B,)."""
        count = len(self._indices)
        start = position * self.batch_size
        first = start // count
        last = (start + self.batch_size - 1) // count
        # Only the epochs of this batch are kept: the next batch needs the last of them.
        self._orders = {
            epoch: self._orders[epoch] if epoch in self._orders else self._order(epoch)
            for epoch in range(first, last + 1)
        }
        orders = list(self._orders.values())
        order = orders[0] if len(orders) == 1 else np.concatenate(orders)
        start -= first * count
        return self._indices[order[start : start + self.batch_size]]

    def _raw(self, purpose: int, number: int, count: int) -> NDArray[np.uint64]:
        # Raw words, because numpy may change what its distributions make of them.
        sequence = np.random.SeedSequence(self._entropy, spawn_key=(purpose, number))
        return np.random.Philox(sequence).random_raw(count)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        return np.argsort(self._raw(_ORDER, epoch, len(self._indices)), kind="stable")


def image_key(image: NDArray[np.float32]) -> bytes:
    """By what an image is known: 16 bytes of its normalised pixels (C, H, W), not augmented.

    The same pixels are the same image, whether they are trained on or asked about; pictures that
    only look alike are different ones.
    """
    digest = hashlib.blake2b(repr(image.shape).encode(), digest_size=16)
    digest.update(image.astype(np.float32).tobytes())
    return digest.digest()


def _crop_flip(
    images: NDArray[np.uint8],
    ys: NDArray[np.int64],
    xs: NDArray[np.int64],
    flips: NDArray[np.bool_],
) -> NDArray[np.uint8]:
    count, height, width, channels = images.shape
    top, left = height // 8, width // 8
    padded = np.zeros((count, height + 2 * top, width + 2 * left, channels), np.uint8)
    padded[:, top : top + height, left : left + width] = images
    out = np.empty_like(images)
    wanted = zip(ys.tolist(), xs.tolist(), flips.tolist(), strict=True)
    for row, (y, x, flip) in enumerate(wanted):
        crop = padded[row, y : y + height, x : x + width]
        out[row] = crop[:, ::-1] if flip else crop
    return out


def scale_and_shift(
    mean: Sequence[float], std: Sequence[float]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What a pixel is multiplied by and what is added then to normalise it: (C,) each."""
    scale = 1.0 / (255.0 * np.asarray(std))
    shift = -np.asarray(mean) / np.asarray(std)
    return scale.astype(np.float32), shift.astype(np.float32)


def normalise(
    images: NDArray[np.uint8], mean: Sequence[float], std: Sequence[float]
) -> NDArray[np.float32]:
    """(pixel / 255 - mean) / std per channel: uint8 (N, H, W, C) to float32 (N, C, H, W)."""
    scale, shift = scale_and_shift(mean, std)
    count, height, width, channels = images.shape
    out = np.empty((count, channels, height, width), np.float32)
    for channel in range(channels):
        plane = out[:, channel]
        np.multiply(images[..., channel], scale[channel], out=plane)
        plane += shift[channel]
    return out
