"""The idx files in which MNIST and its relatives are published, plain or gzipped."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tensors.errors import DataError

_PREFIX = {"train": "train", "test": "t10k"}
_UINT8 = 0x08


def find_idx(folder: Path, split: str) -> tuple[Path, Path] | None:
    """The image file and the label file of a split in a folder, or None if either is missing."""
    found = []
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        plain = folder / f"{_PREFIX[split]}-{kind}"
        zipped = plain.with_name(plain.name + ".gz")
        path = next((p for p in (plain, zipped) if p.is_file()), None)
        if path is None:
            return None
        found.append(path)
    return found[0], found[1]


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read one idx file of unsigned bytes, whatever its number of dimensions.

    Raises DataError, naming the file, when it is damaged or holds something else.
    """
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as exc:
        raise DataError(f"{path} cannot be read ({exc}): get it again") from exc
    if len(data) < 4 or data[:3] != bytes((0, 0, _UINT8)):
        raise DataError(f"{path} is not an idx file of unsigned bytes: get it again")
    body = 4 + 4 * data[3]
    shape = tuple(int.from_bytes(data[i : i + 4], "big") for i in range(4, body, 4))
    expected = int(np.prod(shape, dtype=object))
    if len(data) != body + expected:
        raise DataError(
            f"{path} is truncated or has bytes too many: its header promises {expected} bytes of "
            f"data, it has {len(data) - body}; get it again"
        )
    return np.frombuffer(data, np.uint8, offset=body).reshape(shape).copy()
