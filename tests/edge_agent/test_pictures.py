from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from edge_agent.errors import InputError
from edge_agent.pictures import MAX_IMAGES, PictureSpec, check_images, read_picture
from tensors.batches import normalise
from tensors.image_folder import read_image

GREY: dict[str, Any] = {"size": 8, "channels": 1, "mean": (0.3,), "std": (0.25,)}
RGB: dict[str, Any] = {"size": 8, "channels": 3, "mean": (0.5,) * 3, "std": (0.2,) * 3}


def picture(mode: str = "RGB", size: tuple[int, int] = (20, 30), kind: str = "PNG") -> bytes:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, kind)
    return out.getvalue()


def header_of(width: int, height: int) -> bytes:
    """A PNG that claims to be so large; its body is missing."""
    fields = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + fields + struct.pack(">I", zlib.crc32(fields))
    data = b"IDAT" + zlib.compress(bytes(64))
    body = struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    return b"\x89PNG\r\n\x1a\n" + chunk + body


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("spec", [GREY, RGB], ids=["grey", "rgb"])
def test_a_picture_of_any_size_becomes_what_the_network_takes(
    spec: dict[str, Any], kind: str
) -> None:
    image = read_picture(picture(kind=kind), **spec)
    assert image.shape == (spec["channels"], 8, 8)
    assert image.dtype == np.float32
    assert np.isfinite(image).all()


def test_it_is_resized_and_normalised_as_the_pictures_it_was_trained_with(tmp_path: Path) -> None:
    data = picture(size=(50, 33))
    (tmp_path / "a.png").write_bytes(data)
    expected = normalise(read_image(tmp_path / "a.png", 8)[None], RGB["mean"], RGB["std"])[0]
    np.testing.assert_array_equal(read_picture(data, **RGB), expected)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "LA"])
def test_any_kind_of_8_bit_picture_is_taken(mode: str) -> None:
    assert read_picture(picture(mode), **GREY).shape == (1, 8, 8)
    assert read_picture(picture(mode), **RGB).shape == (3, 8, 8)


def test_a_palette_with_transparency_is_taken_without_a_word() -> None:
    out = io.BytesIO()
    Image.new("P", (9, 9)).save(out, "PNG", transparency=bytes([0, 128]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_picture(out.getvalue(), **RGB).shape == (3, 8, 8)


def deep() -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (b"hello", "this is no picture"),
        (b"%PDF-1.7 and so on", "this is no picture"),
        (picture()[:200], "not a readable picture"),
        (picture(kind="JPEG")[:300], "not a readable picture"),
        (picture(kind="BMP"), "JPEG, PNG or WebP"),
        (header_of(60_000, 60_000), "too large|pixels"),
        (header_of(12_000, 9_000), "too large|pixels"),
        (header_of(9_000, 9_000), "9000 × 9000 pixels"),
        (header_of(0, 5), "this is no picture"),
        (deep(), "8 bits"),
    ],
)
def test_what_is_no_picture_or_too_much_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(InputError, match=says):
        read_picture(data, **GREY)


def test_bytes_are_bounded_before_they_are_looked_at() -> None:
    with pytest.raises(InputError, match="has 101 bytes, at most 100"):
        read_picture(bytes(101), **GREY, max_bytes=100)


def test_a_network_with_odd_channels_wants_arrays() -> None:
    with pytest.raises(InputError, match="give an array"):
        read_picture(picture(), size=8, channels=4, mean=(0,) * 4, std=(1,) * 4)


@given(cut=st.integers(0, 2000), noise=st.binary(max_size=30), where=st.integers(0, 2000))
def test_damaged_pictures_are_read_or_refused_and_nothing_else(
    cut: int, noise: bytes, where: int
) -> None:
    whole = picture(size=(12, 12))
    damaged = (whole[:where] + noise + whole[where + len(noise) :])[: len(whole) - cut % 50]
    try:
        image = read_picture(damaged, **RGB)
    except InputError:
        return
    assert image.shape == (3, 8, 8)


def test_pixels_are_normalised_one_image_or_several() -> None:
    pixels = np.arange(2 * 8 * 8, dtype=np.uint8).reshape(2, 8, 8, 1)
    expected = normalise(pixels, GREY["mean"], GREY["std"])
    np.testing.assert_array_equal(check_images(pixels, **GREY), expected)
    np.testing.assert_array_equal(check_images(pixels[0], **GREY), expected[:1])
    np.testing.assert_array_equal(check_images(pixels[1, :, :, 0], **GREY), expected[1:])


def test_floats_are_taken_as_they_are() -> None:
    images = np.random.default_rng(0).standard_normal((3, 1, 8, 8))
    taken = check_images(images, **GREY)
    assert taken.dtype == np.float32
    np.testing.assert_array_equal(taken, images.astype(np.float32))
    np.testing.assert_array_equal(PictureSpec(**GREY).check(images[0]), taken[:1])


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (np.zeros((0, 1, 8, 8), np.float32), "no images"),
        (np.zeros((2, 3, 8, 8), np.float32), r"\(2, 3, 8, 8\) are not taken"),
        (np.zeros((2, 1, 8, 9), np.float32), "are not taken"),
        (np.zeros((8, 8), np.float32), "are not taken"),
        (np.zeros((2, 9, 8, 1), np.uint8), "N, H, W, C"),
        (np.zeros((8, 8, 3), np.uint8), "are not taken"),
        (np.zeros((), np.float32), "are not taken"),
        (np.zeros((1, 1, 8, 8), np.int64), "int64 are not taken"),
        (np.zeros((1, 1, 8, 8), complex), "are not taken"),
        (np.full((1, 1, 8, 8), np.nan), "not finite"),
        (np.full((1, 1, 8, 8), 1e300), "not finite"),
        (np.zeros((MAX_IMAGES + 1, 1, 8, 8), np.float32), "at most"),
        ("a string", "are not taken"),
        ([[1.0], [1.0, 2.0]], "not images of one size"),
    ],
)
def test_arrays_that_are_no_images_are_refused(images: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        check_images(images, **GREY)


@pytest.mark.parametrize("kind", [np.float32, np.uint8])
def test_a_buffer_may_be_filled_anew_while_its_images_are_answered(kind: Any) -> None:
    buffer = np.zeros((2, 1, 8, 8) if kind is np.float32 else (2, 8, 8, 1), kind)
    assert not np.shares_memory(check_images(buffer, **GREY), buffer)
