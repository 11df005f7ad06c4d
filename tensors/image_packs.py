"""Packed image sets: one plain `.npz` per split, the pixels as strips of lossless WebP.

Arrays of a file: `webp` (the bytes of all strips, one after another), `offsets` (where each begins
and the last ends), `labels`, `classes` (names joined by newlines, UTF-8 bytes) and, optionally,
`side` (default 32), `channels` (1 or 3, default 3), `step` (stored value x step = pixel, for
near-lossless sets) and `folds` (rows of image indices). A strip is any number of square images
stacked top to bottom.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tensors.errors import DataError


@dataclass(frozen=True, eq=False)
class Packed:
    """What a packed file holds: images uint8 (N, H, W, C), labels int64 (N,)."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    folds: NDArray[np.int64] | None


def read_packed(path: Path) -> Packed:
    """Read one packed file. Raises DataError, naming the file, when it is damaged."""
    try:
        # Opened here: numpy forgets to close a file that is no archive.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        folds = arrays.get("folds")
        return Packed(
            images=_unpack(arrays),
            labels=arrays["labels"].astype(np.int64),
            classes=tuple(arrays["classes"].tobytes().decode().split("\n")),
            folds=None if folds is None else folds.astype(np.int64),
        )
    except ImportError as exc:
        raise DataError(f"{path} needs Pillow to be read: pip install pillow") from exc
    except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as exc:
        raise DataError(
            f"{path} is not a readable packed image set ({exc}): copy or make it again"
        ) from exc


def write_packed(
    path: Path,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    classes: tuple[str, ...],
    *,
    images_per_strip: int,
) -> None:
    """Pack images (N, H, H, C), C being 1 or 3, losslessly. Slow: this looks for small files."""
    from PIL import Image

    count, side, _, channels = images.shape
    strips = []
    for start in range(0, count, images_per_strip):
        strip = images[start : start + images_per_strip].reshape(-1, side, channels)
        buffer = io.BytesIO()
        picture = Image.fromarray(strip[..., 0] if channels == 1 else strip)
        picture.save(buffer, "WEBP", lossless=True, quality=100, method=6)
        strips.append(buffer.getvalue())
    np.savez(
        path,
        webp=np.frombuffer(b"".join(strips), np.uint8),
        offsets=np.cumsum([0, *map(len, strips)], dtype=np.int64),
        labels=labels.astype(np.uint8),
        classes=np.frombuffer("\n".join(classes).encode(), np.uint8),
        side=np.int64(side),
        channels=np.int64(channels),
    )


def _unpack(arrays: dict[str, NDArray[np.generic]]) -> NDArray[np.uint8]:
    from PIL import Image

    side = int(arrays["side"]) if "side" in arrays else 32
    channels = int(arrays["channels"]) if "channels" in arrays else 3
    step = int(arrays["step"]) if "step" in arrays else 1
    data = arrays["webp"].tobytes()
    images = np.empty((len(arrays["labels"]), side, side, channels), np.uint8)
    row = 0
    for start, end in pairwise(int(offset) for offset in arrays["offsets"]):
        with Image.open(io.BytesIO(data[start:end]), formats=("WEBP",)) as picture:
            pixels = np.asarray(picture.convert("L" if channels == 1 else "RGB"))
        strip = pixels.reshape(-1, side, side, channels)
        images[row : row + len(strip)] = strip
        row += len(strip)
    if row != len(images):
        raise ValueError(f"{row} images, {len(images)} labels")
    return images if step == 1 else images * np.uint8(step)
