"""A device's own images: its share of the training split, and of the test split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from broker.messages import Assignment
from edge_agent.pictures import PictureSpec
from edge_agent.settings import AgentSettings
from tensors.batches import BatchStream, normalise
from tensors.datasets import Dataset, load_dataset
from tensors.errors import DataError
from tensors.partition import partition

if TYPE_CHECKING:
    from tensors.batches_torch import TorchBatchStream, TorchImages


@dataclass(frozen=True, slots=True)
class DeviceData:
    """Training images by index into ``train``, test images by index into ``test``.

    With ``resident``, the images of ``train`` on a compute device, batches are made there.
    """

    train: Dataset
    train_rows: np.ndarray
    test: Dataset | None
    test_rows: np.ndarray
    resident: TorchImages | None = None

    @property
    def image(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        _, height, width, channels = self.train.images.shape
        return channels, height, width

    @property
    def pictures(self) -> PictureSpec:
        """What a network for this data takes; its images are square."""
        channels, height, _ = self.image
        return PictureSpec(size=height, channels=channels, mean=self.train.mean, std=self.train.std)

    def stream(self, assignment: Assignment, device: str) -> BatchStream | TorchBatchStream:
        """Training batches by position, the same for the same seed and device."""
        about: dict[str, Any] = {
            "batch_size": assignment.batch_size,
            "seed": assignment.seed,
            "device": device,
            "augment": assignment.augment,
        }
        if self.resident is not None:
            from tensors.batches_torch import TorchBatchStream

            return TorchBatchStream(self.resident, self.train_rows, **about)
        return BatchStream(self.train, self.train_rows, **about)

    def label_counts(self, classes: int) -> np.ndarray:
        """How many training images are of each of so many classes: int64 (classes,)."""
        return np.bincount(self.train.labels[self.train_rows], minlength=classes)[:classes]

    def test_batches(self, batch_size: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """The test share in batches of at most ``batch_size``: (float32 N×C×H×W, int64 N)."""
        if self.test is None:
            return []
        rows = [
            self.test_rows[start : start + batch_size]
            for start in range(0, len(self.test_rows), batch_size)
        ]
        test = self.test
        return [
            (normalise(test.images[part], test.mean, test.std), test.labels[part]) for part in rows
        ]


def load_device_data(settings: AgentSettings) -> DeviceData:
    """Load and split what the settings name. A missing test split is not an error."""

    def load(split: str) -> Dataset:
        return load_dataset(
            settings.dataset,
            split,
            root=settings.data_root,
            download=settings.download,
            size=settings.image_size,
        )

    train = load("train")
    rows = partition(train.labels, settings.shares, settings.partition, settings.partition_seed)
    nothing = np.zeros(0, np.int64)
    try:
        test = load("test")
    except DataError:
        return DeviceData(train, rows[settings.share], None, nothing)
    test_rows = partition(test.labels, settings.shares, "iid", settings.partition_seed)
    return DeviceData(train, rows[settings.share], test, test_rows[settings.share])
