"""What comes in to be answered: bytes of a picture, or arrays, checked before anything else.

Nothing here trusts its input: sizes are looked at before anything is decoded, and every refusal is
an :class:`InputError` that says what would be taken.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edge_agent.errors import InputError
from tensors.batches import normalise
from tensors.image_folder import UNREADABLE, fit_picture

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_BYTES = 32 << 20
"""Of one encoded picture."""
MAX_PIXELS = 50_000_000
"""Of one picture, as its header says it will be decoded: 150 MB of RGB."""
MAX_IMAGES = 4096
"""In one request."""

_DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureSpec:
    """What a network takes: square images of ``size`` pixels with 1 (grey) or 3 (RGB) channels.

    ``mean`` and ``std``: per channel, of pixels scaled to [0, 1], as the network was trained with.
    """

    size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def read(self, data: bytes) -> NDArray[np.float32]:
        """See :func:`read_picture`."""
        return read_picture(
            data, size=self.size, channels=self.channels, mean=self.mean, std=self.std
        )

    def check(self, images: ArrayLike) -> NDArray[np.float32]:
        """See :func:`check_images`."""
        return check_images(
            images, size=self.size, channels=self.channels, mean=self.mean, std=self.std
        )


def read_picture(
    data: bytes,
    *,
    size: int,
    channels: int,
    mean: Sequence[float],
    std: Sequence[float],
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
) -> NDArray[np.float32]:
    """A JPEG, PNG or WebP as the network takes it: normalised float32 (channels, size, size).

    A picture of any size is brought to the network's by the rule of image folders: turned upright,
    its shorter side resized, the middle cut out; colours become grey, or grey colours, as needed.

    Raises:
        InputError: nothing, more than ``max_bytes``, no picture, a damaged one, one of more than
            ``max_pixels`` (found in its header, before it is decoded), or of more than 8 bits.
    """
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise InputError("the picture is empty: 0 bytes")
    if len(data) > max_bytes:
        raise InputError(
            f"the picture has {len(data)} bytes, at most {max_bytes} are taken: make it smaller"
        )
    if channels not in (1, 3):
        raise InputError(
            f"the network takes {channels} channels, a picture has 1 or 3: give an array instead"
        )
    bombs = (Image.DecompressionBombError, Image.DecompressionBombWarning)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            if picture.width * picture.height > max_pixels:
                raise InputError(
                    f"the picture has {picture.width} × {picture.height} pixels, at most "
                    f"{max_pixels} are taken: make it smaller"
                )
            if picture.mode in _DEEP:
                raise InputError(
                    "the picture has more than 8 bits per channel: save it with 8 bits"
                )
            pixels = fit_picture(picture, size, channels)
    except bombs as exc:
        raise InputError(f"the picture is too large ({exc}): make it smaller") from exc
    except UnidentifiedImageError as exc:  # its own words name an object in memory
        raise InputError("this is no picture: send a whole JPEG, PNG or WebP") from exc
    except UNREADABLE as exc:
        raise InputError(
            f"this is not a readable picture ({exc}): send a whole JPEG, PNG or WebP"
        ) from exc
    image: NDArray[np.float32] = normalise(pixels[None], mean, std)[0]
    return image


def check_images(
    images: ArrayLike,
    *,
    size: int,
    channels: int,
    mean: Sequence[float],
    std: Sequence[float],
    max_images: int = MAX_IMAGES,
) -> NDArray[np.float32]:
    """Images given as an array, as the network takes them: float32 (N, channels, size, size).

    - uint8 (N, size, size, channels), or one image of (size, size, channels) or, with one channel,
      (size, size): pixels, which are normalised.
    - floats (N, channels, size, size) or (channels, size, size): normalised already; must be
      finite.

    Nothing is resized, and the result is a copy: a buffer may be filled anew at once. Raises
    :class:`InputError` for anything else, for no images at all and for more than ``max_images``.
    """
    try:
        array = np.asarray(images)
    except (ValueError, TypeError) as exc:
        raise InputError(f"these are not images of one size ({exc})") from exc
    if array.dtype == np.uint8:
        wanted: tuple[int, ...] = (size, size, channels)
        if array.ndim == 2 and channels == 1:
            array = array[..., None]
    elif array.dtype.kind == "f":
        wanted = (channels, size, size)
    else:
        raise InputError(
            f"images of {array.dtype} are not taken: give pixels as uint8 (N, H, W, C) or "
            "normalised ones as float32 (N, C, H, W)"
        )
    if array.ndim == 3:
        array = array[None]
    if array.ndim != 4 or array.shape[1:] != wanted:
        order = "N, H, W, C" if array.dtype == np.uint8 else "N, C, H, W"
        raise InputError(
            f"images of shape {np.shape(images)} are not taken: {array.dtype} images must be "
            f"({order}) with {wanted} for each"
        )
    if not len(array):
        raise InputError("there are no images to answer")
    if len(array) > max_images:
        raise InputError(f"{len(array)} images at once, at most {max_images} are taken: ask twice")
    if array.dtype == np.uint8:
        return normalise(array, mean, std)
    with np.errstate(over="ignore"):
        narrow = np.array(array, np.float32, order="C")
    if not np.isfinite(narrow).all():
        raise InputError("some pixels are not finite numbers: check how they are normalised")
    return narrow
