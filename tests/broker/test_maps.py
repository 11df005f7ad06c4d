from __future__ import annotations

import random
import struct
import tracemalloc
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import MessageError
from broker.maps import (
    MAX_DEPTH,
    MAX_ITEMS,
    MAX_PLAIN_BYTES,
    Pieces,
    pack_map,
    packed_size,
    unpack_map,
)

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(), st.binary()
)
VALUES = st.recursive(
    SCALARS,
    lambda v: st.lists(v, max_size=20) | st.dictionaries(st.text(), v, max_size=20),
    max_leaves=40,
)
MAPS = st.dictionaries(st.text(max_size=40), VALUES, min_size=1, max_size=20)


def depth(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth, value.values()), default=0)
    return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0


def refused(data: bytes) -> str:
    with pytest.raises(MessageError) as caught:
        unpack_map(data)
    assert caught.value.reason == "malformed"
    return str(caught.value)


@given(MAPS)
def test_packing_is_plain_messagepack(fields: dict[str, Any]) -> None:
    assert b"".join(pack_map(fields)) == msgpack.packb(fields)


@given(MAPS)
def test_unpacking_reads_any_messagepack_map(fields: dict[str, Any]) -> None:
    data = msgpack.packb(fields)
    if depth(fields) > MAX_DEPTH:
        assert "deeper" in refused(data)
        return
    for form in (data, bytearray(data), memoryview(data)):
        assert repr(plain(unpack_map(form))) == repr(msgpack.unpackb(data))


def plain(fields: dict[str, Any]) -> dict[str, Any]:
    return {k: bytes(v) if isinstance(v, memoryview) else v for k, v in fields.items()}


@given(st.binary(max_size=200))
def test_no_bytes_make_anything_but_a_map_or_a_message_error(data: bytes) -> None:
    try:
        expected = msgpack.unpackb(data, strict_map_key=True, max_ext_len=0)
    except Exception:  # noqa: BLE001 whatever the library says
        refused(data)
        return
    if isinstance(expected, dict) and repr(msgpack.packb(expected)) == repr(data):
        assert repr(plain(unpack_map(data))) == repr(expected)


@pytest.mark.parametrize("length", [0, 1, 255, 256, 65_535, 65_536, 1_000_000])
def test_a_blob_is_neither_copied_on_its_way_out_nor_in(length: int) -> None:
    blob = random.Random(length).randbytes(length)
    pieces = pack_map({"a": 1, "b": blob})
    assert pieces[-1] is blob
    data = b"".join(pieces)
    assert data == msgpack.packb({"a": 1, "b": blob})
    view = unpack_map(data)["b"]
    assert view == blob
    assert view.obj is data
    assert view.readonly


def test_blobs_anywhere_and_in_any_number_are_views() -> None:
    fields = {"x": b"first", "n": 7, "y": b"", "t": ["text", {"inner": b"copied"}], "z": b"last"}
    data = msgpack.packb(fields)
    unpacked = unpack_map(data)
    assert unpacked == fields
    assert list(unpacked) == list(fields)
    assert [type(value) for value in unpacked.values()] == [
        memoryview,
        int,
        memoryview,
        list,
        memoryview,
    ]


@given(st.lists(st.binary(max_size=30), max_size=6), st.integers(1, 40))
def test_cut_pieces_are_the_same_bytes(parts: list[bytes], length: int) -> None:
    whole = b"".join(parts)
    cut = list(Pieces(parts).cut(length))
    assert b"".join(b"".join(chunk) for chunk in cut) == whole
    assert all(chunk.size == length for chunk in cut[:-1])
    assert len(cut) == -(-len(whole) // length)


@given(MAPS, st.data())
def test_a_map_cut_short_or_followed_by_something_is_refused(
    fields: dict[str, Any], data: st.DataObject
) -> None:
    packed = msgpack.packb(fields)
    refused(packed[: data.draw(st.integers(0, len(packed) - 1))])
    refused(packed + data.draw(st.binary(min_size=1, max_size=3)))


def nested(levels: int) -> bytes:
    data: bytes = msgpack.packb({"a": 0})
    return data[:-1] + b"\x91" * (levels - 2) + b"\x90"


def test_nesting_is_bounded() -> None:
    assert depth(unpack_map(nested(MAX_DEPTH))) == MAX_DEPTH
    assert "deeper" in refused(nested(MAX_DEPTH + 1))


def test_items_are_bounded() -> None:
    most = MAX_ITEMS - 2
    assert len(unpack_map(msgpack.packb({"a": [0] * most}))["a"]) == most
    assert "items" in refused(msgpack.packb({"a": [0] * (most + 1)}))
    assert "items" in refused(msgpack.packb({"a": [[0] * (most // 2), [0] * (most // 2)]}))


def test_what_is_no_blob_is_bounded() -> None:
    blob = bytes(2 * MAX_PLAIN_BYTES)
    assert unpack_map(msgpack.packb({"a": blob, "t": "x" * (MAX_PLAIN_BYTES - 20)}))["a"] == blob
    assert "beside blobs" in refused(msgpack.packb({"t": "x" * MAX_PLAIN_BYTES, "a": blob}))
    assert "beside blobs" in refused(msgpack.packb({"a": [blob]}))


@pytest.mark.parametrize(
    "data",
    [
        b"\x81\xa1a" + (b"\xdd" + struct.pack(">I", 2**17)) * 1000,
        b"\x81\xa1a" + (b"\xdd" + struct.pack(">I", 2**15)) * 1000 + bytes(2**20),
        b"\x81\xa1a\xdd" + struct.pack(">I", 2**18 - 3) + bytes(1000),
        b"\xdf" + struct.pack(">I", 2**32 - 1),
        b"\xdf" + struct.pack(">I", 2**17 - 1),
        b"\x81\xa1a\xc6" + struct.pack(">I", 2**32 - 1),
        b"\x81\xa1a\xdb" + struct.pack(">I", 2**32 - 1) + b"x",
    ],
)
def test_lengths_that_are_announced_take_no_memory(data: bytes) -> None:
    refused(data)
    tracemalloc.start()
    try:
        refused(data)
        assert tracemalloc.get_traced_memory()[1] < 50_000
    finally:
        tracemalloc.stop()


def test_a_key_that_comes_twice_is_refused() -> None:
    """Else two readers could see two messages."""
    assert "twice" in refused(b"\x82\xa1a\x01\xa1a\x02")
    assert "twice" in refused(b"\x82\xa1a\x01\xa1a\xc4\x01b")


def test_a_key_that_is_not_text_is_malformed() -> None:
    with pytest.raises(MessageError, match="text") as error:
        unpack_map(msgpack.packb({b"a": 1}))
    assert error.value.reason == "malformed"


class Later:
    """Bytes that count how often they are made."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.made = 0

    def __len__(self) -> int:
        return len(self.data)

    def __bytes__(self) -> bytes:
        self.made += 1
        return self.data


@given(st.binary(max_size=300) | st.integers(0, 70_000).map(bytes))
def test_a_blob_may_be_made_when_it_is_packed(data: bytes) -> None:
    later = Later(data)
    packed = pack_map({"name": "x", "blob": data})
    assert packed_size({"name": "x", "blob": later}) == packed.size
    assert later.made == 0
    assert pack_map({"name": "x", "blob": later}) == packed
    assert later.made == 1


@given(MAPS)
def test_the_size_of_any_map_is_known(fields: dict[str, Any]) -> None:
    assert packed_size(fields) == pack_map(fields).size
