"""Bytes that must be refused, each with its reason."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import msgpack
import numpy as np
import zstandard

from tensors.codecs import encode_exact, parse_codec
from tensors.parameters import pack_parameters
from tests.vectors.messages import messages
from tests.vectors.tensors import by_hand, described

GOOD = parse_codec("int8").encode(np.arange(6, dtype=np.float32).reshape(2, 3))
FLOATS = encode_exact(np.arange(6, dtype=np.float32).reshape(2, 3))
EVERYWHERE = 2**32 - 1
NAN, INFINITY = float("nan"), float("inf")


def rejected() -> list[dict[str, Any]]:
    """rejected.json."""
    return [*_tensors(), *_sizes(), *_bodies(), *_masks(), *_packs(), *_deltas(), *_messages()]


def _entry(kind: str, name: str, data: bytes, reason: str, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "name": name, "encoded": data.hex(), "reason": reason} | more


def _tensor(
    name: str,
    data: bytes,
    reason: str,
    *,
    limits: dict[str, int] | None = None,
    keep: str | None = None,
) -> dict[str, Any]:
    return _entry("tensor", name, data, reason, limits=limits, keep=keep)


def seal(data: bytes) -> bytes:
    """The same bytes with a checksum that is right."""
    return data[:10] + struct.pack("<I", zlib.crc32(data[:10] + data[14:])) + data[14:]


def patched(data: bytes, at: int, new: bytes) -> bytes:
    """The same bytes with some replaced, and a checksum that is right."""
    return seal(data[:at] + new + data[at + len(new) :])


def header(
    *dims: int,
    codec: int = 0,
    lossless: int = 0,
    dtype: int = 0,
    flags: int = 0,
    top: int = 0,
    values: int = 0,
    body: int = 0,
    rest: bytes = b"",
) -> bytes:
    """A tensor as its fields say, whether they make sense or not."""
    fixed = b"SFT" + bytes([2, codec, lossless, dtype, flags, top, len(dims)]) + bytes(4)
    return seal(fixed + struct.pack(f"<{len(dims) + 2}I", *dims, values, body) + rest)


def _tensors() -> list[dict[str, Any]]:
    return [
        *(
            _tensor(f"cut after {length} bytes", GOOD[:length], "truncated")
            for length in (0, 3, 13, 14, 29, len(GOOD) - 1)
        ),
        _tensor("a byte behind it", seal(GOOD + b"\0"), "trailing_bytes"),
        _tensor("bad magic", patched(GOOD, 0, b"PK\3"), "bad_magic"),
        _tensor("version 1", patched(GOOD, 3, b"\1"), "unknown_version"),
        _tensor("version 3", patched(GOOD, 3, b"\3"), "unknown_version"),
        _tensor("codec 4", patched(GOOD, 4, b"\4"), "unknown_codec"),
        _tensor("lossless stage 2", patched(GOOD, 5, b"\2"), "unknown_lossless"),
        _tensor("dtype 8", patched(FLOATS, 6, b"\x08"), "unknown_dtype"),
        _tensor("dtype of an affine tensor", patched(GOOD, 6, b"\1"), "unknown_dtype"),
        _tensor("both flags", patched(GOOD, 7, b"\3"), "bad_flags"),
        _tensor("unknown flag", patched(GOOD, 7, b"\4"), "bad_flags"),
        _tensor("exact per channel", patched(FLOATS, 7, b"\1"), "bad_flags"),
        _tensor("exact, masked", patched(FLOATS, 7, b"\2"), "bad_flags", keep="111111"),
        _tensor("no highest level", patched(GOOD, 8, b"\0"), "bad_top"),
        _tensor("exact with a highest level", patched(FLOATS, 8, b"\1"), "bad_top"),
        _tensor("checksum off by one bit", GOOD[:10] + b"\0\0\0\0" + GOOD[14:], "bad_checksum"),
        _tensor("a body bit flipped", GOOD[:-1] + bytes([GOOD[-1] ^ 1]), "bad_checksum"),
        _tensor("a dim changed", GOOD[:14] + b"\3\0\0\0\2" + GOOD[19:], "bad_checksum"),
    ]


def _sizes() -> list[dict[str, Any]]:
    four = bytes(4)
    small = {"max_elements": 5, "max_bytes": 2**28, "max_ndim": 8}
    narrow = {"max_elements": 2**26, "max_bytes": 23, "max_ndim": 8}
    flat = {"max_elements": 2**26, "max_bytes": 2**28, "max_ndim": 1}
    whole = EVERYWHERE
    return [
        _tensor("nine dims", header(*[1] * 9, values=1, body=4, rest=four), "too_many_dims"),
        _tensor("255 dims", header(*[1] * 255, values=1, body=4, rest=four), "too_many_dims"),
        _tensor("more dims than taken", FLOATS, "too_many_dims", limits=flat),
        _tensor("huge dim", header(whole, values=whole, body=4, rest=four), "too_large"),
        _tensor("huge dims", header(*[whole] * 8, values=1, body=4, rest=four), "too_large"),
        _tensor("huge dims and a zero", header(0, whole, whole, whole), "too_large"),
        _tensor("product wraps at 2^32", header(2**16, 2**16), "too_large"),
        _tensor("product wraps at 2^64", header(2**22, 2**21, 2**21), "too_large"),
        _tensor(
            "huge and compressed",
            header(2**31, codec=3, lossless=1, top=3, values=2**31, body=4, rest=bytes(12)),
            "too_large",
        ),
        _tensor("more elements than taken", FLOATS, "too_large", limits=small),
        _tensor("more bytes than taken", FLOATS, "too_large", limits=narrow),
        _tensor("too few values", header(2, values=1, body=4, rest=four), "bad_count"),
        _tensor("too many values", header(2, values=3, body=12, rest=bytes(12)), "bad_count"),
        _tensor(
            "masked, more values than elements",
            by_hand(3, (3,), [0, 1], b"\0", values=4, masked=True),
            "bad_count",
            keep="111",
        ),
        _tensor("body too short", header(2, values=2, body=4, rest=four), "bad_length"),
        _tensor("body too long", header(2, values=2, body=12, rest=bytes(12)), "bad_length"),
        _tensor("body of 4 GiB", header(1, values=1, body=whole, rest=four), "truncated"),
        _tensor("levels without planes", by_hand(7, (5,), [0, 1], b"\0\0"), "bad_length"),
    ]


def _bodies() -> list[dict[str, Any]]:
    def side(offset: float, scale: float, **fields: Any) -> bytes:
        return by_hand(255, (2, 1), [offset, scale], b"\0\0", **fields)

    def squeezed(frame: bytes) -> bytes:
        rest = struct.pack("<2f", 0, 1) + frame
        return header(2, 2, codec=3, lossless=1, top=255, values=4, body=len(frame), rest=rest)

    def frame(length: int, *, stated: bool = True) -> bytes:
        return zstandard.ZstdCompressor(write_content_size=stated).compress(bytes(length))

    return [
        *(
            _tensor(f"offset {offset}, scale {scale}", side(offset, scale), "bad_side_data")
            for offset, scale in [
                (NAN, 1.0),
                (INFINITY, 1.0),
                (0.0, NAN),
                (0.0, INFINITY),
                (0.0, -1.0),
                (3e38, 1e37),
                (0.0, 3e38),
            ]
        ),
        _tensor("NaN scale of a channel", side(0.0, NAN, per_channel=True), "bad_side_data"),
        _tensor("a level above the highest", by_hand(11, (2,), [0, 1], b"\xc0"), "bad_body"),
        _tensor("zip bomb", squeezed(frame(50_000_000)), "bad_body"),
        _tensor("zip bomb that hides its size", squeezed(frame(9999, stated=False)), "bad_body"),
        _tensor("frame of another size", squeezed(frame(3)), "bad_body"),
        _tensor("no frame", squeezed(b""), "bad_body"),
        _tensor("not a frame", squeezed(b"garbage garbage"), "bad_body"),
        _tensor("frame cut short", squeezed(frame(4)[:-1]), "bad_body"),
        _tensor("a byte behind the frame", squeezed(frame(4) + b"x"), "bad_body"),
        _tensor("two frames", squeezed(frame(4) + frame(4)), "bad_body"),
        _tensor("skippable frame", squeezed(b"\x50\x2a\x4d\x18\x04\0\0\0abcd"), "bad_body"),
    ]


def _masks() -> list[dict[str, Any]]:
    masked = by_hand(3, (7,), [-0.5, 0.5], b"\x38", values=3, masked=True)
    no_zero = by_hand(3, (7,), [-0.25, 0.5], b"\x38", values=3, masked=True)
    above = by_hand(3, (7,), [-2.0, 0.5], b"\x38", values=3, masked=True)
    return [
        _tensor("masked where no mask is", masked, "wrong_mask"),
        _tensor("mask of another number", masked, "wrong_mask", keep="0111100"),
        _tensor("masked without a level for zero", no_zero, "bad_side_data", keep="0110100"),
        _tensor("level for zero above the highest", above, "bad_side_data", keep="0110100"),
    ]


def _packs() -> list[dict[str, Any]]:
    one = {"a": np.arange(3, dtype=np.float32)}
    pack = pack_parameters(one)
    record = pack[4:]
    two = {"max_elements": 5, "max_bytes": 2**28, "max_ndim": 8}
    named = [
        ("empty", b"", "truncated", None),
        ("no record", struct.pack("<I", 1), "truncated", None),
        ("2^32 - 1 records", struct.pack("<I", EVERYWHERE) + record, "truncated", None),
        ("name cut short", pack[:4] + b"\xff\xff" + pack[6:], "truncated", None),
        ("tensor of 2^64 - 1 bytes", pack[:7] + b"\xff" * 8 + pack[15:], "truncated", None),
        ("tensor longer than said", pack[:7] + b"\x20" + pack[8:], "truncated", None),
        ("bytes behind it", pack + b"\0", "trailing_bytes", None),
        ("a name twice", struct.pack("<I", 2) + 2 * record, "bad_name", None),
        ("name not UTF-8", pack[:6] + b"\xff" + pack[7:], "bad_name", None),
        ("tensor damaged", pack[:-1] + b"\x01", "bad_checksum", None),
        ("too much together", pack_parameters(one | {"b": one["a"]}), "too_large", two),
    ]
    return [
        _entry("pack", name, data, reason, limits=limits) for name, data, reason, limits in named
    ]


def _deltas() -> list[dict[str, Any]]:
    a, n, z = np.ones((2, 2), np.float32), np.array(3, np.int64), np.ones(8, np.float32)
    base: dict[str, Any] = {"a": a, "n": n, "z": z}
    wrong: list[tuple[str, dict[str, Any], str]] = [
        ("a name that is not held", {"+b": a, "n": n, "z": z}, "bad_name"),
        ("both forms of a name", {"+a": a, "a": a, "n": n}, "bad_name"),
        ("two signs", {"++a": a, "n": n, "z": z}, "bad_name"),
        ("a name missing", {"+a": a, "z": z}, "bad_name"),
        ("another shape", {"+a": a[:1], "n": n, "z": z}, "wrong_shape"),
        ("an integer as difference", {"+a": a, "+n": n, "z": z}, "wrong_dtype"),
        ("a float for an integer", {"+a": a, "n": a[0, 0], "z": z}, "wrong_dtype"),
        ("integers for floats", {"a": a.astype(np.int8), "n": n, "z": z}, "wrong_dtype"),
        ("more than is held", {"+a": np.ones((2, 3), np.float32), "n": n, "z": z}, "too_large"),
    ]
    return [
        _entry(
            "delta",
            name,
            pack_parameters({key: np.asarray(array) for key, array in state.items()}),
            reason,
            base=described(base),
        )
        for name, state, reason in wrong
    ]


def _messages() -> list[dict[str, Any]]:
    good = {
        "/".join(vector["topic"].split("/")[-2:]): vector
        for vector in messages()
        if vector["name"].split(", ")[1] != "probe"
    }

    def changed(kind: str, **changes: Any) -> bytes:
        fields = msgpack.unpackb(bytes.fromhex(good[kind]["encoded"])) | changes
        packed: bytes = msgpack.packb({k: v for k, v in fields.items() if v is not ...})
        return packed

    invalid: list[tuple[str, str, dict[str, Any]]] = [
        ("a field missing", "up/activations", {"batch": ...}),
        ("nil where a value must be", "up/activations", {"attempt": None}),
        ("batch negative", "up/activations", {"batch": -1}),
        ("batch above 2^53", "up/activations", {"batch": 2**53 + 1}),
        ("batch a float", "up/activations", {"batch": 1.0}),
        ("batch a bool", "up/activations", {"batch": True}),
        ("4097 labels", "up/activations", {"labels": [0] * 4097}),
        ("label negative", "up/activations", {"labels": [-1]}),
        ("tensor a text", "up/activations", {"tensor": "text"}),
        ("run a path", "up/activations", {"run": "../etc"}),
        ("run of 65 characters", "up/activations", {"run": "r" * 65}),
        ("unknown state", "up/status", {"state": "asleep"}),
        ("phase of 257 characters", "up/status", {"phase": "x" * 257}),
        ("cut 0", "up/hello", {"cut": 0}),
        ("two numbers for an image", "up/hello", {"image": [1, 28]}),
        ("measurement empty", "up/hello", {"measurement": {}}),
        ("deadline 0", "up/features", {"deadline_ms": 0}),
        ("unknown request", "up/request", {"what": "coffee"}),
        ("reason no name", "up/report", {"discarded": {"two words": 1}}),
        ("exit loss NaN", "up/report", {"exit_loss": NAN}),
        ("learning rate infinite", "all/round", {"learning_rate": INFINITY}),
        ("learning rate negative", "all/round", {"learning_rate": -0.5}),
        ("unknown phase", "all/round", {"phase": "sleeping"}),
        ("range of one number", "down/receipt", {"applied": [[1]]}),
        ("credits above 1024", "down/receipt", {"credits": 1025}),
        ("time-out 0", "down/assignment", {"gradient_timeout_s": 0.0}),
        ("unknown feedback", "down/assignment", {"feedback": "both"}),
        ("SHA-256 in capitals", "3/manifest", {"sha256": "A" * 64}),
    ]
    nested = b"\x81\xa1a" + b"\x91" * 8 + b"\xc0"
    malformed = [
        ("empty", b""),
        ("an array", b"\x92\x01\x02"),
        ("a number as key", b"\x81\x01\x02"),
        ("bytes behind it", changed("up/status") + b"\0"),
        ("cut short", changed("up/status")[:-1]),
        ("reserved byte", b"\x81\xa1a\xc1"),
        ("extension type", changed("up/status", x=msgpack.ExtType(5, b"x"))),
        ("timestamp", changed("up/status", x=msgpack.Timestamp(1))),
        ("text not UTF-8", b"\x81\xa1a\xa2\xff\xfe"),
        ("map of 2^32 - 1 entries", b"\xdf\xff\xff\xff\xff"),
        ("array of 2^32 - 1 entries", b"\x81\xa1a\xdd\xff\xff\xff\xff"),
        ("bytes of 4 GiB", b"\x81\xa1a\xc6\xff\xff\xff\xff"),
        ("nested 9 deep", nested),
        ("nested 1001 deep", b"\x81\xa1a" + b"\x91" * 1000 + b"\xc0"),
        ("a key twice", b"\x82\xa1a\x01\xa1a\x02"),
    ]
    status = good["up/status"]["topic"]
    return [
        *(_entry("message", name, data, "malformed", topic=status) for name, data in malformed),
        *(
            _entry("message", name, changed(kind, **changes), "invalid", topic=good[kind]["topic"])
            for name, kind, changes in invalid
        ),
        *(
            _entry("message", f"on {topic}", changed("up/status"), "unexpected_topic", topic=topic)
            for topic in (
                "splitfleet/fleet-1/device/cam-1/down/hello",
                "splitfleet/fleet-1/device/coordinator/up/status",
                "splitfleet/fleet-1/device/cam-1/up",
                "splitfleet/fleet-1/cut/03/manifest",
                "splitfleet/other/device/cam-1/up/status",
            )
        ),
    ]
