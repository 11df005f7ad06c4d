"""Fuzz targets of `tensors`: encoded tensors and parameter packs."""

from __future__ import annotations

import math
import random
import struct
import zlib
from abc import abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from tensors.decoding import decode, decode_torch, nonzero
from tensors.errors import FormatError
from tensors.format import DEFAULT_LIMITS, Limits
from tensors.parameters import unpack_parameters
from tests.fuzz.mutate import INTERESTING, below, mutate
from tests.fuzz.seeds import corpus
from tests.fuzz.target import Target

Mask = npt.NDArray[np.bool_]
TENSOR_LIMITS = Limits(max_elements=2048, max_bytes=8192)
HEADER_REASONS = frozenset(
    (
        *("truncated", "trailing_bytes", "bad_magic", "unknown_version", "unknown_codec"),
        *("unknown_lossless", "unknown_dtype", "bad_flags", "bad_top", "too_many_dims"),
        *("too_large", "bad_count", "bad_length", "bad_checksum"),
    )
)
TENSOR_REASONS = HEADER_REASONS | {"bad_body", "bad_side_data"}


def seal(data: bytes) -> bytes:
    """The same bytes with a checksum that is right, if there is room for one."""
    if len(data) < 14:
        return data
    checksum = zlib.crc32(data[14:], zlib.crc32(data[:10]))
    return b"%b%b%b" % (data[:10], checksum.to_bytes(4, "little"), data[14:])


def damaged_tensor(data: bytes, rng: random.Random, seeds: list[bytes]) -> bytes:
    """A tensor with random or well-aimed damage, mostly under a checksum that is right."""
    kind = rng.random()
    if kind < 0.55:
        data = mutate(data, rng, seeds)
    elif kind < 0.95:
        data = _field_changed(data, rng) if kind < 0.8 else _body_changed(data, rng)
    return seal(data) if rng.random() < 0.95 else data


def _field_changed(data: bytes, rng: random.Random) -> bytes:
    """One field of the header as somebody wrote it who knows the format."""
    if len(data) < 22:
        return data
    field = below(10, rng)
    if field < 6:  # version, codec, lossless, dtype, flags, top
        at = 3 + field
        return b"%b%c%b" % (data[:at], rng.choice((0, 1, 2, 3, 4, 7, 8, 255)), data[at + 1 :])
    ndim = data[9]
    if field == 6:
        dims = [rng.choice(INTERESTING) % 2**32 for _ in range(below(10, rng))]
        packed = struct.pack(f"<{len(dims)}I", *dims)
        return b"%b%c%b%b%b" % (data[:9], len(dims), data[10:14], packed, data[14 + 4 * ndim :])
    at = 14 + 4 * below(ndim + 2, rng)
    number = rng.choice(INTERESTING) % 2**32
    return b"%b%b%b" % (data[:at], number.to_bytes(4, "little"), data[at + 4 :])


def _body_changed(data: bytes, rng: random.Random) -> bytes:
    """Other side data or another body, its length as it should be."""
    if len(data) < 22:
        return data
    sizes_at = 14 + 4 * data[9]
    if rng.random() < 0.4:
        at = sizes_at + 8 + 4 * below(3, rng)
        value = rng.choice((float("nan"), float("inf"), -1.0, 0.0, 3e38, 1e-45, 1.0, -3.5))
        return data[:at] + struct.pack("<f", value) + data[at + 4 :]
    side_at = sizes_at + 8
    side = data[side_at : side_at + 8] if data[4] == 3 else b""
    (values,) = struct.unpack("<I", data[sizes_at : sizes_at + 4].ljust(4, b"\0"))
    raw = min(values, 4000) * rng.choice((1, 1, 1, 2, 4))
    raw = max(0, raw + rng.choice((0, 0, 0, 1, -1)))
    content = rng.choice((bytes(raw), rng.randbytes(raw)))
    body = content if rng.random() < 0.3 else _COMPRESSORS[rng.random() < 0.9].compress(content)
    if rng.random() < 0.2:
        body = body[: below(len(body), rng)]
    elif rng.random() < 0.1:
        body += rng.choice((body, b"x"))
    sizes = struct.pack("<II", values, len(body))
    return b"%b\1%b%b%b%b" % (data[:5], data[6:sizes_at], sizes, side, body)


_COMPRESSORS = [zstandard.ZstdCompressor(write_content_size=stated) for stated in (False, True)]


def mask_for(data: bytes, more: int = 0) -> Mask | None:
    """A mask for a masked tensor, with as many entries as it has values, and ``more``."""
    if len(data) < 22 or data[7] != 2:
        return None
    ndim = min(data[9], 8)
    if len(data) < 22 + 4 * ndim:
        return None
    *dims, values = struct.unpack_from(f"<{ndim + 1}I", data, 14)
    if math.prod(max(dim, 1) for dim in dims) > TENSOR_LIMITS.max_elements:
        return None
    keep = np.zeros(math.prod(dims), np.bool_)
    keep[: values + more] = True
    return keep.reshape(dims)


class _Tensor(Target):
    reasons = TENSOR_REASONS | {"wrong_mask"}
    memory = 150_000

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.seeds = corpus("tensors")

    def once(self) -> str:
        rng = self.rng
        self.input = damaged_tensor(rng.choice(self.seeds), rng, self.seeds)
        # Under the usual limits too no memory is taken for what is only announced.
        limits = TENSOR_LIMITS if rng.random() < 0.8 else DEFAULT_LIMITS
        try:
            keep = None if rng.random() < 0.05 else mask_for(self.input, rng.random() < 0.05)
            tensor = self.decode(self.input, keep, limits)
        except FormatError as exc:
            return exc.reason
        assert math.prod(tensor.shape) <= limits.max_elements
        assert tensor.nbytes <= limits.max_bytes
        assert len(tensor.shape) <= limits.max_ndim
        return ""

    @abstractmethod
    def decode(self, data: bytes, keep: Mask | None, limits: Limits) -> Any:
        """What is to be tried."""


class Decode(_Tensor):
    def decode(self, data: bytes, keep: Mask | None, limits: Limits) -> Any:
        array = decode(data, limits=limits, keep=keep)
        assert array.flags.c_contiguous
        assert array.flags.writeable
        return array


class DecodeTorch(_Tensor):
    def decode(self, data: bytes, keep: Mask | None, limits: Limits) -> Any:
        last = self.rng.random() < 0.3
        return decode_torch(data, limits=limits, keep=keep, channels_last=last)


class Nonzero(_Tensor):
    def decode(self, data: bytes, keep: Mask | None, limits: Limits) -> Any:
        differs = nonzero(data, limits=limits)
        assert differs.dtype == np.bool_
        return differs


class Pack(Target):
    """Packs of parameters: damaged as bytes, or record by record."""

    reasons = TENSOR_REASONS | {"wrong_mask", "bad_name"}
    memory = 150_000

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.seeds = corpus("packs")
        self.tensors = corpus("tensors")
        self.records = [_records(seed) for seed in self.seeds]

    def once(self) -> str:
        self.input = self._make()
        try:
            state = unpack_parameters(self.input, limits=TENSOR_LIMITS)
        except FormatError as exc:
            return exc.reason
        assert sum(array.size for array in state.values()) <= TENSOR_LIMITS.max_elements
        assert sum(array.nbytes for array in state.values()) <= TENSOR_LIMITS.max_bytes
        return ""

    def _make(self) -> bytes:
        rng = self.rng
        if rng.random() < 0.3:
            return mutate(rng.choice(self.seeds), rng, self.seeds)
        records = list(rng.choice(self.records))
        if not records or rng.random() < 0.1:
            records.append((rng.randbytes(2), rng.choice(self.tensors)))
        at = below(len(records), rng)
        name, tensor = records[at]
        choice = rng.random()
        if choice < 0.6:
            records[at] = name, damaged_tensor(tensor, rng, self.tensors)
        elif choice < 0.7:
            records[at] = mutate(name, rng, self.seeds), tensor
        elif choice < 0.75:
            records += rng.choices(records, k=rng.choice((1, 1, 2, 40)))
        else:
            records[at] = name, rng.choice(self.tensors)
        count = len(records) if rng.random() < 0.95 else rng.choice(INTERESTING) % 2**32
        parts = [count.to_bytes(4, "little")]
        for name, tensor in records:
            length = len(tensor) if rng.random() < 0.99 else rng.choice(INTERESTING)
            parts += (len(name).to_bytes(2, "little"), name, length.to_bytes(8, "little"), tensor)
        return b"".join(parts)


def _records(pack: bytes) -> list[tuple[bytes, bytes]]:
    records, at = [], 4
    while at < len(pack):
        name_end = at + 2 + int.from_bytes(pack[at : at + 2], "little")
        tensor_at = name_end + 8
        end = tensor_at + int.from_bytes(pack[name_end:tensor_at], "little")
        records.append((pack[at + 2 : name_end], pack[tensor_at:end]))
        at = end
    return records
