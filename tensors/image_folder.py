"""A user's own pictures: one folder per class."""

from __future__ import annotations

import hashlib
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tensors.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
TEST_SHARE = 0.2
UNREADABLE = (OSError, EOFError, SyntaxError, ValueError, struct.error, zlib.error)
"""What Pillow raises for pictures that are none, beside its DecompressionBombError."""


def read_image_folder(
    folder: Path, split: str, size: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64], tuple[str, ...]]:
    """Read `folder/{train,test}/CLASS/*` or `folder/CLASS/*`.

    In the second layout a fifth of every class is held out as the test split; which pictures are
    depends on their names only. Pictures are turned upright (EXIF), their shorter side is resized
    to `size` (bilinear) and the middle is cut out.

    Returns images uint8 (N, size, size, 3), labels int64 (N,), and the class names in order.
    Raises DataError naming the folder or the file when something is missing or damaged.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: give image-folder: a folder of pictures")
    if (folder / "train").is_dir():
        classes = _class_names(folder / "train")
        files = _files_of_layout(folder / split, classes)
    else:
        classes = _class_names(folder)
        files = [_held_out(_pictures(folder / name), split) for name in classes]
    paths = [path for of_class in files for path in of_class]
    if not paths:
        raise DataError(f"{folder} has no pictures for the {split} split: add some")
    labels = np.repeat(np.arange(len(classes)), [len(of_class) for of_class in files])
    images = np.empty((len(paths), size, size, 3), np.uint8)
    # Pillow lets go of the interpreter while it decodes and resizes.
    with ThreadPoolExecutor() as pool:
        for row, image in enumerate(pool.map(lambda path: read_image(path, size), paths)):
            images[row] = image
    return images, labels.astype(np.int64), classes


def read_image(path: Path, size: int) -> NDArray[np.uint8]:
    """Read one picture as uint8 (size, size, 3). Raises DataError, naming it, when it cannot."""
    try:
        from PIL import Image
    except ImportError as exc:
        raise DataError(f"{path} needs Pillow to be read: pip install pillow") from exc
    try:
        with Image.open(path) as picture:
            return fit_picture(picture, size)
    except (*UNREADABLE, Image.DecompressionBombError) as exc:
        raise DataError(f"{path} is not a readable picture ({exc}): repair or remove it") from exc


def fit_picture(picture: Image, size: int, channels: int = 3) -> NDArray[np.uint8]:
    """An opened picture as uint8 (size, size, channels), with 1 channel (grey) or 3 (RGB).

    Turned upright (EXIF), the shorter side resized to `size` (bilinear), the middle cut out.
    Raises one of `UNREADABLE` or Pillow's DecompressionBombError when it cannot be decoded.
    """
    from PIL import Image, ImageOps

    mode = {1: "L", 3: "RGB"}[channels]
    picture.draft(mode, (size, size))  # lets JPEG decode straight to a smaller picture
    upright = ImageOps.exif_transpose(picture)
    if "transparency" in upright.info:  # else Pillow warns that it is given up
        upright = upright.convert("RGBA")
    upright = upright.convert(mode)
    fitted = ImageOps.fit(upright, (size, size), Image.Resampling.BILINEAR)
    return np.asarray(fitted).reshape(size, size, channels)


def _class_names(folder: Path) -> tuple[str, ...]:
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise DataError(f"{folder} has no class folders: sort the pictures into one per class")
    for name in names:
        if not _pictures(folder / name):
            raise DataError(
                f"{folder / name} has no pictures ({', '.join(SUFFIXES)}): add some or remove it"
            )
    return tuple(names)


def _files_of_layout(folder: Path, classes: tuple[str, ...]) -> list[list[Path]]:
    if not folder.is_dir():
        raise DataError(f"{folder} is missing: add it, or leave out the train/test level")
    unknown = sorted(set(_class_names(folder)) - set(classes))
    if unknown:
        raise DataError(f"{folder / unknown[0]} is a class that the train folder does not have")
    return [_pictures(folder / name) for name in classes]


def _pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(
        p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")
    )


def _held_out(pictures: list[Path], split: str) -> list[Path]:
    # By hash of the name: neighbours (frames of one film) are not all of one split.
    ranked = sorted(pictures, key=lambda p: hashlib.sha256(p.name.encode()).digest())
    test = max(1, round(TEST_SHARE * len(ranked))) if len(ranked) > 1 else 0
    return sorted(ranked[:test] if split == "test" else ranked[test:])
