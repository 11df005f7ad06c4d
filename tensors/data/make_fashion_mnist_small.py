"""Makes the bundled `fashion-mnist-small` from the four official Fashion-MNIST files.

    python -m tensors.data.make_fashion_mnist_small FOLDER [OUT]

FOLDER holds the official idx files, plain or gzipped (Debian's package dataset-fashion-mnist puts
them in /usr/share/datasets/fashion-mnist). Taken are the first 1,200 training and the first 200
test images of every class, in official order: the same choice on every machine.

Why strips of 100 images as lossless WebP, in the layout of tensors/image_packs.py (12,000 training
images, one core; bytes an image, and seconds to decode all 14,000):

    zstd -19 of the pixels                              421   0.02
    zstd -22 of the differences between rows            405   0.03
    zstd -22 of the residuals of PNG-like prediction    397   slow in numpy
    xz -6 of the pixels                                 376   0.26
    PNG, strips of 100                                  397   0.08
    WebP, image by image                                443   0.85
    WebP, strips of 20 / 100 / 250          382 / 371 / 374   0.13 / 0.10 / 0.09

It is the smallest, loads in no time, and needs no reader of its own.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np

from tensors.datasets import BUNDLED, FASHION_CLASSES
from tensors.errors import DataError
from tensors.idx import find_idx, read_idx
from tensors.image_packs import write_packed

PER_CLASS = {"train": 1200, "test": 200}
IMAGES_PER_STRIP = 100
# SHA-256 of the pixels and of the labels of the whole official splits, headers left out.
OFFICIAL = {
    "train": (
        "2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012",
        "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
    ),
    "test": (
        "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a",
        "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
    ),
}


def make(folder: Path, out: Path) -> None:
    """Write both packed files. Raises DataError if the files in `folder` are not the official."""
    for split, per_class in PER_CLASS.items():
        found = find_idx(folder, split)
        if found is None:
            raise DataError(f"{folder} lacks idx files of the {split} split")
        images, labels = (read_idx(path) for path in found)
        for path, data, digest in zip(found, (images, labels), OFFICIAL[split], strict=True):
            if hashlib.sha256(data.tobytes()).hexdigest() != digest:
                raise DataError(f"{path} is not the official file: get it again")
        rows = np.sort(np.concatenate([np.flatnonzero(labels == c)[:per_class] for c in range(10)]))
        write_packed(
            out / f"{BUNDLED}-{split}.npz",
            images[rows][..., None],
            labels[rows].astype(np.int64),
            FASHION_CLASSES,
            images_per_strip=IMAGES_PER_STRIP,
        )


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    make(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) == 3 else Path(__file__).parent)
