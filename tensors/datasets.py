"""Image sets by name: the bundled one, four public ones, and a user's own folder of pictures."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensors.errors import DataError
from tensors.idx import find_idx, read_idx
from tensors.image_folder import read_image_folder
from tensors.image_packs import read_packed

BUNDLED = "fashion-mnist-small"
IMAGE_FOLDER = "image-folder:"
DEFAULT_SIZE = 64
SPLITS = ("train", "test")

FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

# Mean and standard deviation per channel of the whole training split, pixels scaled to [0, 1];
# measured on the data, but stl10's are those in common use, and a user's pictures get ImageNet's.
_FASHION = ((0.2860,), (0.3530,))
_STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    BUNDLED: _FASHION,
    "fashion-mnist": _FASHION,
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "stl10": ((0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)),
    IMAGE_FOLDER: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}

# Name of torchvision's class, folder it keeps under the root.
_TORCHVISION = {
    "cifar10": ("CIFAR10", "cifar-10-batches-py"),
    "cifar100": ("CIFAR100", "cifar-100-python"),
    "stl10": ("STL10", "stl10_binary"),
    "fashion-mnist": ("FashionMNIST", "FashionMNIST/raw"),
}


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images in memory.

    images: uint8 (N, H, W, C); labels: int64 (N,), indices into classes; mean and std: per
    channel, of pixels scaled to [0, 1].
    """

    name: str
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.images.dtype != np.uint8 or self.images.ndim != 4:
            raise DataError(f"{self.name}: images must be uint8 (N, H, W, C)")
        if self.labels.dtype != np.int64 or self.labels.shape != self.images.shape[:1]:
            raise DataError(f"{self.name}: labels must be int64, one per image")
        if len(self.labels) == 0:
            raise DataError(f"{self.name}: there are no images")
        if self.labels.min() < 0 or self.labels.max() >= len(self.classes):
            raise DataError(f"{self.name}: labels must lie in 0..{len(self.classes) - 1}")
        if not len(self.mean) == len(self.std) == self.images.shape[3]:
            raise DataError(f"{self.name}: mean and std must have one value per channel")

    def __len__(self) -> int:
        return len(self.labels)


def load_dataset(
    name: str,
    split: str = "train",
    *,
    root: Path | None = None,
    download: bool = False,
    size: int | None = None,
) -> Dataset:
    """Load one split ("train" or "test") of an image set into memory.

    name: `fashion-mnist-small` (comes with the package), `cifar10`, `cifar100`, `stl10`,
    `fashion-mnist`, or `image-folder:PATH` (see `read_image_folder`; `size` is the side of its
    images, 64 unless given).

    root: where the four public sets are looked for, by default `default_root()`: a packed
    `NAME-SPLIT.npz` first, then the layout in which torchvision keeps the set; for fashion-mnist
    also its idx files themselves. With `download`, what is missing is fetched into `root`.

    A packed stl10 without a test file is split by its first fold: those 1,000 images are the test
    split, the other 4,000 the training split.

    Raises DataError, saying what to do, when the set is unknown, missing or damaged.
    """
    if split not in SPLITS:
        raise DataError(f"split {split!r}: allowed are {' and '.join(SPLITS)}")
    if name.startswith(IMAGE_FOLDER):
        if size is not None and size < 1:
            raise DataError(f"size {size}: must be at least 1 pixel")
        folder = Path(name.removeprefix(IMAGE_FOLDER)).expanduser()
        images, labels, classes = read_image_folder(folder, split, size or DEFAULT_SIZE)
        return _dataset(name, images, labels, classes)
    if name not in _STATISTICS:
        known = ", ".join([*sorted(set(_STATISTICS) - {IMAGE_FOLDER}), IMAGE_FOLDER + "PATH"])
        raise DataError(f"data set {name!r} is unknown: allowed are {known}")
    if size is not None:
        raise DataError(f"size is for {IMAGE_FOLDER}PATH only: leave it out for {name}")
    if name == BUNDLED:
        return _from_packed(name, split, Path(__file__).parent / "data")
    root = default_root() if root is None else root
    if (root / f"{name}-{split}.npz").is_file() or (
        name == "stl10" and (root / "stl10-train.npz").is_file()
    ):
        return _from_packed(name, split, root)
    if name == "fashion-mnist":
        return _fashion_mnist(split, root, download=download)
    return _from_torchvision(name, split, root, download=download)


def default_root() -> Path:
    """The folder that SPLITFLEET_DATA names, else `~/.cache/splitfleet/data`."""
    named = os.environ.get("SPLITFLEET_DATA")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "splitfleet" / "data"


def _dataset(
    name: str,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    classes: tuple[str, ...],
) -> Dataset:
    key = IMAGE_FOLDER if name.startswith(IMAGE_FOLDER) else name
    mean, std = _STATISTICS[key]
    return Dataset(name, images, labels, classes, mean, std)


def _from_packed(name: str, split: str, root: Path) -> Dataset:
    path = root / f"{name}-{split}.npz"
    if name == "stl10" and not (root / "stl10-test.npz").is_file():
        return _from_first_fold(split, root / "stl10-train.npz")
    packed = read_packed(path)
    return _dataset(name, packed.images, packed.labels, packed.classes)


def _from_first_fold(split: str, path: Path) -> Dataset:
    packed = read_packed(path)
    rows = np.arange(len(packed.labels))
    if packed.folds is not None:
        if packed.folds.ndim != 2 or not np.isin(packed.folds[:1], rows).all():
            raise DataError(f"{path} has damaged folds: copy or make it again")
        rows = np.sort(packed.folds[0]) if split == "test" else np.delete(rows, packed.folds[0])
    elif split == "test":
        raise DataError(
            f"{path} has no folds to take a test split from: put stl10-test.npz beside it, or use "
            "another data folder with download"
        )
    return _dataset("stl10", packed.images[rows], packed.labels[rows], packed.classes)


def _fashion_mnist(split: str, root: Path, *, download: bool) -> Dataset:
    folder = root / _TORCHVISION["fashion-mnist"][1]
    found = find_idx(root, split) or find_idx(folder, split)
    if found is None and download:
        _open_with_torchvision("fashion-mnist", root, train=split == "train", download=True)
        found = find_idx(folder, split)
    if found is None:
        raise DataError(
            f"fashion-mnist is not in {root}: add --download, or put its four idx files there "
            "(Debian's package dataset-fashion-mnist has them in "
            "/usr/share/datasets/fashion-mnist: give that as the data folder)"
        )
    images, labels = (read_idx(path) for path in found)
    if images.ndim != 3 or labels.ndim != 1:
        raise DataError(f"{found[0]} and {found[1]} are not images and labels: get them again")
    return _dataset("fashion-mnist", images[..., None], labels.astype(np.int64), FASHION_CLASSES)


def _from_torchvision(name: str, split: str, root: Path, *, download: bool) -> Dataset:
    folder = root / _TORCHVISION[name][1]
    if not (download or folder.is_dir()):
        raise DataError(
            f"{name} is not in {root}: add --download, put {name}-{split}.npz or {folder.name}/ "
            "there, or name another data folder (SPLITFLEET_DATA)"
        )
    which: dict[str, Any] = {"split": split} if name == "stl10" else {"train": split == "train"}
    data = _open_with_torchvision(name, root, download=download, **which)
    if not hasattr(data, "classes"):
        raise DataError(f"{folder} lacks its class names: remove it and add --download")
    if name == "stl10":  # (N, C, H, W)
        images, labels = data.data.transpose(0, 2, 3, 1), data.labels
    else:
        images, labels = data.data, data.targets
    return _dataset(
        name,
        np.ascontiguousarray(images, np.uint8),
        np.asarray(labels, np.int64),
        tuple(data.classes),
    )


def _open_with_torchvision(name: str, root: Path, *, download: bool, **which: Any) -> Any:
    try:
        reader = getattr(_torchvision().datasets, _TORCHVISION[name][0])
        return reader(str(root), download=download, **which)
    except ImportError as exc:
        raise DataError(
            f"{name} needs torchvision to be read or fetched ({exc}): install "
            "splitfleet[agent], or put packed files there"
        ) from exc
    except (OSError, RuntimeError, EOFError, KeyError, ValueError) as exc:
        what = "could not be downloaded to" if download else "is incomplete or damaged in"
        raise DataError(
            f"{name} {what} {root} ({exc}): "
            + ("check the connection and the disk" if download else "remove it and add --download")
        ) from exc


def _torchvision() -> ModuleType:
    from tensors.torchvision_compat import torchvision_module

    return torchvision_module()
