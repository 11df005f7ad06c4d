"""Parameter packs: the state of a network, or of a part of it, as bytes.

Little endian: u32 record count, then for each record u16 name length, the name in UTF-8,
u64 tensor length and the tensor in the format of `tensors.format`.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy.typing as npt

from tensors.codecs import encode_exact, parse_codec
from tensors.decoding import decode
from tensors.errors import CodecError, FormatError
from tensors.format import DEFAULT_LIMITS, Buffer, Limits

_COUNT = struct.Struct("<I")
_NAME_LENGTH = struct.Struct("<H")
_TENSOR_LENGTH = struct.Struct("<Q")


def pack_parameters(state: Mapping[str, npt.NDArray[Any]], *, codec: str = "fp32") -> bytes:
    """Pack named arrays in their order: floating point ones by `codec`, all others unchanged.

    Floating point arrays come back as float32. Raises CodecError naming the array that cannot go.
    """
    chosen = parse_codec(codec)
    records = {}
    for name, array in state.items():
        try:
            records[name] = chosen.encode(array) if array.dtype.kind == "f" else encode_exact(array)
        except CodecError as error:
            raise CodecError(f"parameter {name}: {error}") from error
    return join_records(records)


def join_records(records: Mapping[str, bytes]) -> bytes:
    """A pack of tensors that are encoded already, by name, in their order."""
    parts = [_COUNT.pack(len(records))]
    for name, tensor in records.items():
        encoded_name = name.encode()
        if len(encoded_name) > 0xFFFF:
            raise CodecError(f"parameter name of {len(encoded_name)} bytes: at most 65535")
        parts += _NAME_LENGTH.pack(len(encoded_name)), encoded_name
        parts += _TENSOR_LENGTH.pack(len(tensor)), tensor
    return b"".join(parts)


def unpack_parameters(
    data: Buffer,
    *,
    limits: Limits = DEFAULT_LIMITS,
    names: Collection[str] | None = None,
) -> dict[str, npt.NDArray[Any]]:
    """The named arrays in a pack, each writable and independent of `data`.

    `limits` bounds all of them together; with `names` others are refused before they are decoded.
    Raises FormatError: the reasons of `codecs.decode`, and `bad_name` (not UTF-8, twice, or none of
    `names`).
    """
    reader = _Reader(memoryview(data))
    (count,) = _COUNT.unpack(reader.take(_COUNT.size))
    state: dict[str, npt.NDArray[Any]] = {}
    left = limits
    for _ in range(count):
        name = _read_name(reader)
        if name in state:
            raise FormatError("bad_name", f"parameter {name!r} comes twice")
        if names is not None and name not in names:
            raise FormatError("bad_name", f"parameter {name!r} does not belong here")
        (length,) = _TENSOR_LENGTH.unpack(reader.take(_TENSOR_LENGTH.size))
        array = decode(reader.take(length), limits=left)
        left = replace(
            left,
            max_elements=left.max_elements - array.size,
            max_bytes=left.max_bytes - array.nbytes,
        )
        state[name] = array
    if reader.left:
        raise FormatError("trailing_bytes", f"{reader.left} bytes after the last parameter")
    return state


def _read_name(reader: _Reader) -> str:
    (length,) = _NAME_LENGTH.unpack(reader.take(_NAME_LENGTH.size))
    try:
        return str(reader.take(length), "utf-8")
    except UnicodeDecodeError as error:
        raise FormatError("bad_name", f"parameter name is not UTF-8: {error}") from error


class _Reader:
    def __init__(self, data: memoryview) -> None:
        self._data = data

    @property
    def left(self) -> int:
        return len(self._data)

    def take(self, length: int) -> memoryview:
        if length > len(self._data):
            raise FormatError(
                "truncated", f"pack cut short: {len(self._data)} bytes left of {length}"
            )
        taken, self._data = self._data[:length], self._data[length:]
        return taken
