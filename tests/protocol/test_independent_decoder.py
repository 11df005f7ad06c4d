"""Whoever knows docs/protocol.md can read the wire: a decoder without this project's code does."""

from __future__ import annotations

import ast
import hashlib
import struct
import zlib
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import zstandard

from tests.protocol import independent_decoder
from tests.protocol.test_vectors import named
from tests.vectors.messages import plain

independent: Any = independent_decoder  # untyped, as it stands alone
REFUSALS = (ValueError, zstandard.ZstdError)
FORMS = {"1": "02x", "2": "04x", "4": "08x", "8": "016x"}


def described(name: str, dtype: str, shape: list[int], bits: list[int]) -> dict[str, Any]:
    form = FORMS[dtype[1]]
    return {
        "name": name,
        "dtype": dtype,
        "shape": shape,
        "decoded": [format(b, form) for b in bits],
    }


def test_it_is_short_and_stands_alone() -> None:
    source = Path(independent.__file__).read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 150
    imported = {
        alias.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert imported == {"ctypes", "io", "math", "struct", "zlib", "zstandard"}
    assert "import_module" not in source
    assert not any(isinstance(node, ast.ImportFrom) for node in ast.walk(ast.parse(source)))


@named("tensors")
def test_tensors(vector: dict[str, Any]) -> None:
    read = independent.read_tensor(bytes.fromhex(vector["encoded"]), vector["keep"])
    expected = {key: vector[key] for key in ("name", "dtype", "shape", "decoded")}
    assert described(vector["name"], *read) == expected


@named("parameters")
def test_packs(vector: dict[str, Any]) -> None:
    records = independent.read_pack(bytes.fromhex(vector["encoded"]))
    assert [described(name, *tensor) for name, tensor in records.items()] == vector["records"]
    held = {entry["name"]: entry["decoded"] for entry in vector["base"] or []}
    state = {}
    for record, (dtype, shape, bits) in records.items():
        name = record.removeprefix("+") if held else record
        new = bits if record == name else add(held[name], bits)
        state[name] = described(name, dtype, shape, new)
    assert sorted(vector["state"], key=itemgetter("name")) == [
        state[name] for name in sorted(state)
    ]
    assert fingerprint(list(state.values())) == vector["sha256"]


def add(held: list[str], difference: list[int]) -> list[int]:
    """The bits of the sums of float32 values."""
    sums = []
    for one, other in zip(held, difference, strict=True):
        (a,) = struct.unpack(">f", bytes.fromhex(one))
        (b,) = struct.unpack(">f", other.to_bytes(4))
        sums.append(int.from_bytes(struct.pack(">f", a + b)))
    return sums


def fingerprint(state: list[dict[str, Any]]) -> str:
    """SHA-256 of a state, of the bytes that the document describes."""
    pack = struct.pack("<I", len(state))
    for entry in sorted(state, key=lambda entry: entry["name"].encode()):
        name, shape, elements = entry["name"].encode(), entry["shape"], entry["decoded"]
        body = b"".join(bytes.fromhex(bits)[::-1] for bits in elements)
        start = b"SFT" + bytes([2, 0, 0, list(independent.SIZES).index(entry["dtype"])])
        start += bytes([0, 0, len(shape)])
        rest = struct.pack(f"<{len(shape) + 2}I", *shape, len(elements), len(body)) + body
        tensor = start + struct.pack("<I", zlib.crc32(start + rest)) + rest
        pack += struct.pack("<H", len(name)) + name + struct.pack("<Q", len(tensor)) + tensor
    return hashlib.sha256(pack).hexdigest()


@named("messages")
def test_messages(vector: dict[str, Any]) -> None:
    fields = independent.read_message(bytes.fromhex(vector["encoded"]))
    # What was left out has the value that the document states.
    assert plain(fields).items() <= vector["fields"].items()


@named("frames")
def test_frames(vector: dict[str, Any]) -> None:
    frames = independent.Frames(vector["limits"])
    for step in vector["steps"]:
        assert frames.expire(step["now"]) == step["expired"]
        where = step["sender"], step["topic"], bytes.fromhex(step["frame"]), step["now"]
        if step["reason"] is not None:
            with pytest.raises(REFUSALS):
                frames.add(*where)
            continue
        message = frames.add(*where)
        assert (None if message is None else message.hex()) == step["message"]


@named("rejected")
def test_what_must_be_refused(vector: dict[str, Any]) -> None:
    data, limits = bytes.fromhex(vector["encoded"]), vector.get("limits") or {}
    if vector["kind"] == "message":
        if vector["reason"] == "malformed":  # it knows MessagePack, not each field's bounds
            with pytest.raises(REFUSALS):
                independent.read_message(data)
        return
    if vector["kind"] == "delta":  # a pack like any other: it fits no state
        independent.read_pack(data)
        return
    with pytest.raises(REFUSALS):
        read_whatever(vector["kind"], data, vector.get("keep"), limits)


def read_whatever(kind: str, data: bytes, keep: str | None, limits: dict[str, int]) -> None:
    if kind == "pack":
        independent.read_pack(data, **limits)
    else:
        independent.read_tensor(data, keep, **limits)
