"""The images of an experiment: the same subsets for all arms and seeds."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from tensors.batches_torch import TorchImages
from tensors.datasets import Dataset, load_dataset
from tensors.errors import DataError

Count = Annotated[int, Field(ge=1)]


class Images(BaseModel):
    """Section ``[data]``. What is not given is all there is."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    dataset: str
    train_images: Count | None = None
    """As many of each class, the same ones for every seed."""
    test_images: Count | None = None
    curve_images: Count | None = None
    """Of the test images, those that every round is scored on; the last is scored on all."""


@dataclass(frozen=True, slots=True)
class ImageSets:
    """``curve`` is part of ``test``."""

    train: Dataset
    test: Dataset
    curve: Dataset


@functools.lru_cache(maxsize=2)
def load_images(images: Images, data_root: Path | None, *, download: bool = False) -> ImageSets:
    """Load and choose. Raises ``DataError``."""
    train = load_dataset(images.dataset, "train", root=data_root, download=download)
    test = load_dataset(images.dataset, "test", root=data_root, download=download)
    train = take(train, images.train_images, "train_images")
    test = take(test, images.test_images, "test_images")
    return ImageSets(train, test, take(test, images.curve_images, "curve_images"))


def resident_images(dataset: Dataset, device: str) -> TorchImages | None:
    """The images where they are computed with, if that is not the CPU."""
    return None if device == "cpu" else TorchImages(dataset, device)


def take(dataset: Dataset, count: int | None, key: str) -> Dataset:
    """``count`` images, as many of each class, or all. Raises ``DataError``, naming ``key``."""
    if count is None:
        return dataset
    rows = balanced(dataset.labels, count, key)
    return replace(dataset, images=dataset.images[rows], labels=dataset.labels[rows])


def balanced(labels: NDArray[np.int64], count: int, key: str) -> NDArray[np.int64]:
    """Which ``count`` of the samples with these labels (N,) to take: the same ones every time.

    Classes differ by at most one sample. Raises ``DataError``, naming ``key``, if one has too few.
    """
    order = np.random.default_rng(0).permutation(len(labels))
    classes = np.unique(labels)
    share, more = divmod(count, len(classes))
    chosen = []
    for index, label in enumerate(classes):
        rows, wanted = order[labels[order] == label], share + (index < more)
        if not 1 <= wanted <= len(rows):
            raise DataError(
                f"{count} images cannot be taken evenly: class {label} would have "
                f"{wanted} of its {len(rows)}; choose another {key}"
            )
        chosen.append(rows[:wanted])
    return np.sort(np.concatenate(chosen))
