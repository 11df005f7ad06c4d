"""The stream of training batches with images that live where they are computed with."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tensors.batches import BatchStream, scale_and_shift
from tensors.datasets import Dataset


class TorchImages:
    """A data set's images on a compute device: uint8, with a black margin that crops may reach.

    An eighth of the side on every side, so 1.6 times what the images take. To be shared by the
    streams of all devices that have a share of the data set.
    """

    def __init__(self, dataset: Dataset, device: str) -> None:
        self.dataset = dataset
        self.device = torch.device(device)
        count, height, width, channels = dataset.images.shape
        self.margin = height // 8, width // 8
        top, left = self.margin
        self._images = torch.zeros(
            (count, height + 2 * top, width + 2 * left, channels), dtype=torch.uint8
        )
        self._images[:, top : top + height, left : left + width] = torch.from_numpy(dataset.images)
        self._images = self._images.to(self.device)
        scale, shift = scale_and_shift(dataset.mean, dataset.std)
        self._scale = torch.from_numpy(scale).to(self.device)
        self._shift = torch.from_numpy(shift).to(self.device)
        self._ys = torch.arange(height)
        self._xs = torch.arange(width)

    def __len__(self) -> int:
        return len(self.dataset)

    def take(
        self,
        rows: NDArray[np.int64],
        crops: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]] | None = None,
    ) -> Tensor:
        """Normalised images (float32, N×C×H×W, on the device), as ``batches.normalise`` has them.

        ``rows`` (N,) says which; ``crops`` (see ``BatchStream.crops``) what of them.
        """
        top, left = self.margin
        if crops is None:
            ys, xs = self._ys[None] + top, self._xs[None] + left
        else:
            tops, lefts, flips = map(torch.from_numpy, crops)
            ys = tops[:, None] + self._ys
            xs = lefts[:, None] + torch.where(flips[:, None], self._xs.flip(0), self._xs)
        row = torch.from_numpy(rows)
        index = row[:, None, None], ys[:, :, None], xs[:, None, :]
        images = self._images[tuple(each.to(self.device, non_blocking=True) for each in index)]
        # Two operations, as numpy does them: one would round differently.
        planes = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return planes.mul_(self._scale[:, None, None]).add_(self._shift[:, None, None])


class TorchBatchStream:
    """A :class:`BatchStream` that yields the same batches as tensors, the images on the device."""

    def __init__(
        self,
        images: TorchImages,
        indices: NDArray[np.integer],
        *,
        batch_size: int,
        seed: int,
        device: str,
        augment: str = "none",
    ) -> None:
        self._images = images
        self._stream = BatchStream(
            images.dataset,
            indices,
            batch_size=batch_size,
            seed=seed,
            device=device,
            augment=augment,
        )

    def __len__(self) -> int:
        """Samples in an epoch."""
        return len(self._stream)

    def keys(self, position: int) -> list[bytes]:
        """See :meth:`BatchStream.keys`."""
        return self._stream.keys(position)

    def batch(self, position: int) -> tuple[Tensor, Tensor]:
        """Images float32 (B, C, H, W) on the compute device, labels int64 (B,) on the CPU."""
        rows = self._stream.rows(position)
        images = self._images.take(rows, self._stream.crops(position))
        return images, torch.from_numpy(self._images.dataset.labels[rows])
