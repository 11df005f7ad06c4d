"""MessagePack maps whose blobs are not copied.

Every message and every frame is a MessagePack map with text keys and no extension types. A *blob*
is a bin value of the map itself, such as a tensor. Packing leaves blobs where they are and returns
the map in pieces; unpacking returns views of the data. What lies between the blobs is bounded
before memory is taken for it: a few bytes can announce, nested, lists of any size.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import msgpack

from broker.errors import MessageError

Buffer = bytes | bytearray | memoryview
"""What a blob may be."""


@runtime_checkable
class LazyBytes(Protocol):
    """A blob that is made when somebody wants its bytes; how many is known before."""

    def __len__(self) -> int: ...

    def __bytes__(self) -> bytes: ...


MAX_DEPTH = 8
"""Maps and arrays inside one another, the outermost included."""
MAX_ITEMS = 2**18
"""Keys, values and elements in all of a map, at any depth."""
MAX_PLAIN_BYTES = 2 << 20
"""Bytes of a map without its blobs."""


class Pieces(tuple[Buffer, ...]):
    """Bytes that lie in several places, in order."""

    __slots__ = ()

    @property
    def size(self) -> int:
        """Bytes of all together."""
        return sum(map(len, self))

    def cut(self, length: int) -> Iterator[Pieces]:
        """Pieces of ``length`` (≥ 1) bytes each, but the last, which may be shorter; no copies."""
        cut: list[Buffer] = []
        room = length
        for piece in self:
            view = memoryview(piece)
            while len(view) >= room:
                yield Pieces([*cut, view[:room]])
                view, room = view[room:], length
                cut.clear()
            cut.append(view)
            room -= len(view)
        if room < length:
            yield Pieces(cut)


def pack_map(fields: dict[str, Any]) -> Pieces:
    """The map as MessagePack. A blob that is its last value, whole or in pieces, is not copied."""
    name = next(reversed(fields))
    match last := fields[name]:
        case Pieces():
            blob = last
        case bytes() | bytearray() | memoryview():
            blob = Pieces((last,))
        case LazyBytes():
            blob = Pieces((bytes(last),))
        case _:
            return Pieces((msgpack.packb(fields),))
    plain = msgpack.packb({**fields, name: b""})
    return Pieces((plain[:-2] + _blob_header(blob.size), *blob))


def packed_size(fields: dict[str, Any]) -> int:
    """Bytes of ``pack_map(fields)``; a blob that is not made is not made for it."""
    name = next(reversed(fields))
    last = fields[name]
    if isinstance(last, LazyBytes):
        return len(msgpack.packb({**fields, name: b""})) - blob_bytes(0) + blob_bytes(len(last))
    return pack_map(fields).size


def unpack_map(data: Buffer) -> dict[str, Any]:
    """The map that fills ``data``; its blobs are read-only views of ``data``.

    Raises:
        MessageError: reason ``malformed``, for whatever else it is and beyond the limits above.
    """
    view = memoryview(data).toreadonly()
    try:
        count, blobs = _find_blobs(view)
        plain: list[Buffer] = []
        start = 0
        for _, marker, _, stop in blobs:
            plain += view[start:marker], _NIL
            start = stop
        plain.append(view[start:])
        fields: dict[str, Any] = msgpack.unpackb(b"".join(plain), strict_map_key=True)
    except (ValueError, IndexError, struct.error) as exc:
        raise MessageError("malformed", f"not a MessagePack map: {exc}") from None
    if len(fields) != count:
        raise MessageError("malformed", "a key comes twice")
    names = list(fields)
    if not all(isinstance(name, str) for name in names):
        raise MessageError("malformed", "a key that is not text")
    for entry, _, body, stop in blobs:
        fields[names[entry]] = view[body:stop]
    return fields


_NIL = b"\xc0"
_ARRAY, _MAP, _TEXT, _BLOB = range(-4, 0)
_LONG: dict[int, tuple[int, struct.Struct]] = {
    0xC4: (_BLOB, struct.Struct(">B")),
    0xC5: (_BLOB, struct.Struct(">H")),
    0xC6: (_BLOB, struct.Struct(">I")),
    0xD9: (_TEXT, struct.Struct(">B")),
    0xDA: (_TEXT, struct.Struct(">H")),
    0xDB: (_TEXT, struct.Struct(">I")),
    0xDC: (_ARRAY, struct.Struct(">H")),
    0xDD: (_ARRAY, struct.Struct(">I")),
    0xDE: (_MAP, struct.Struct(">H")),
    0xDF: (_MAP, struct.Struct(">I")),
}
"""Marker → what it begins, and how its length is written behind it."""


def _sizes() -> list[int]:
    sizes = [1] * 256  # small numbers, nil, false, true
    for text in range(0xA0, 0xC0):
        sizes[text] = 1 + (text & 0x1F)
    for markers, size in (((0xCC, 0xD0), 2), ((0xCD, 0xD1), 3), ((0xCA, 0xCE, 0xD2), 5)):
        for marker in markers:
            sizes[marker] = size
    for marker in (0xCB, 0xCF, 0xD3):
        sizes[marker] = 9
    # The reserved byte, extension types, and what says its length elsewhere.
    for marker in (0xC1, *range(0x80, 0xA0), *range(0xC7, 0xCA), *range(0xD4, 0xD9), *_LONG):
        sizes[marker] = 0
    return sizes


_SIZES = _sizes()
"""Marker → bytes of the whole item, 0 if that takes more than the marker to know."""


def _find_blobs(view: memoryview) -> tuple[int, list[tuple[int, int, int, int]]]:
    """How many entries the map has, and of each blob: entry, place of marker, body and end.

    Raises ValueError, IndexError or struct.error for what is no such map, or is too deep or large.
    """
    kind, entries, at = _open(view, 0)
    if kind != _MAP:
        raise ValueError("not a map")
    items = left = 2 * entries
    blobs: list[tuple[int, int, int, int]] = []
    outer: list[int] = []
    blob_bytes = 0
    while True:
        while left:
            left -= 1
            size = _SIZES[view[at]]
            if size:
                at += size
                continue
            kind, length, body = _open(view, at)
            if kind in (_ARRAY, _MAP):
                outer.append(left)
                left = length if kind == _ARRAY else 2 * length
                items += left
                if items > MAX_ITEMS or len(outer) >= MAX_DEPTH:
                    raise ValueError(f"more than {MAX_ITEMS} items, or deeper than {MAX_DEPTH}")
                at = body
                continue
            if kind == _BLOB and not outer and left % 2 == 0:
                blobs.append((entries - 1 - left // 2, at, body, body + length))
                blob_bytes += length
            at = body + length
        if not outer:
            break
        left = outer.pop()
    if at != len(view):
        raise ValueError(f"{len(view)} bytes where {at} were expected")
    if at - blob_bytes > MAX_PLAIN_BYTES:
        raise ValueError(f"{at - blob_bytes} bytes beside blobs, at most {MAX_PLAIN_BYTES} taken")
    return entries, blobs


def _open(view: memoryview, at: int) -> tuple[int, int, int]:
    """What begins at ``at`` and is no small item: its kind, its length and where that begins."""
    marker = view[at]
    if 0x80 <= marker < 0x90:
        return _MAP, marker & 0x0F, at + 1
    if 0x90 <= marker < 0xA0:
        return _ARRAY, marker & 0x0F, at + 1
    if marker not in _LONG:
        raise ValueError(f"0x{marker:02x} at byte {at}")
    kind, field = _LONG[marker]
    (length,) = field.unpack_from(view, at + 1)
    return kind, length, at + 1 + field.size


def blob_bytes(length: int) -> int:
    """Bytes that a blob of this length takes in a map, its header included."""
    return len(_blob_header(length)) + length


def _blob_header(length: int) -> bytes:
    for marker in (0xC4, 0xC5, 0xC6):
        field = _LONG[marker][1]
        if length < 1 << 8 * field.size:
            return bytes([marker]) + field.pack(length)
    raise ValueError(f"a blob of {length} bytes: at most 2^32 - 1 go")
