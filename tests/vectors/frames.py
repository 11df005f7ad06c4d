"""Frames as they arrive, and what comes of each."""

from __future__ import annotations

import zlib
from typing import Any

import msgpack

from broker.envelopes import encode_message
from broker.frames import split
from broker.maps import Pieces
from broker.training_messages import Report
from tests.vectors.messages import INFERENCE, STAMP

LIMITS: dict[str, Any] = {
    "message_bytes": 1000,
    "sender_bytes": 600,
    "total_bytes": 900,
    "sender_messages": 3,
    "timeout_s": 60.0,
}
TOPIC = "splitfleet/f/device/a/up/report"
LONG = b"".join(encode_message(Report(**STAMP, inference=INFERENCE)))
SHORT = bytes(range(10))


def frames() -> list[dict[str, Any]]:
    """frames.json."""
    return [
        _vector("a message in one frame", [_step(*_cut(LONG, 1000), message=LONG)]),
        _vector("an empty message", [_step(*_cut(b"", 100), message=b"")]),
        _vector("chunks in order", _arriving(_cut(LONG, 50), LONG)),
        _vector("chunks from the last to the first", _arriving(_cut(LONG, 50)[::-1], LONG)),
        _duplicates(),
        _interleaved(),
        _vector("an empty last chunk", _arriving(_empty_last_chunk(), SHORT[:4])),
        _vector("unknown fields", [_step(_frame(extra=[1, {}]), message=SHORT)]),
        _time_limit(),
        _restarted(),
        _oldest_goes(),
        _own_memory(),
        _all_memory(),
        _rejections(),
    ]


def _vector(name: str, steps: list[dict[str, Any]]) -> dict[str, Any]:
    return {"name": name, "limits": LIMITS, "steps": steps}


def _step(
    frame: bytes,
    *,
    message: bytes | None = None,
    reason: str | None = None,
    sender: str = "a",
    now: float = 0.0,
    expired: int = 0,
) -> dict[str, Any]:
    return {
        "sender": sender,
        "topic": TOPIC.replace("/a/", f"/{sender}/"),
        "now": now,
        "expired": expired,
        "frame": frame.hex(),
        "message": None if message is None else message.hex(),
        "reason": reason,
    }


def _cut(message: bytes, chunk_bytes: int, message_id: int = 2**32 - 1) -> list[bytes]:
    return list(split(Pieces((message,)), message_id, chunk_bytes))


def _arriving(frames: list[bytes], message: bytes, **where: Any) -> list[dict[str, Any]]:
    steps = [_step(frame, **where) for frame in frames]
    steps[-1]["message"] = message.hex()
    return steps


def _duplicates() -> dict[str, Any]:
    parts = _cut(LONG, 80)
    steps = _arriving([parts[1], parts[1], parts[0], parts[1], *parts[2:]], LONG)
    again = _step(parts[0])  # begins anew, and completes if all come again
    return _vector("duplicates", [*steps, again, *_arriving(parts[1:], LONG)])


def _interleaved() -> dict[str, Any]:
    one, two = _cut(LONG, 100, 1), _cut(SHORT, 5, 2)
    other = _cut(SHORT[::-1], 5, 2)
    return _vector(
        "messages and senders at once",
        [
            _step(one[0]),
            _step(two[0]),
            _step(other[1], sender="b"),
            _step(two[1], message=SHORT),
            _step(other[0], sender="b", message=SHORT[::-1]),
            *_arriving(one[1:], LONG),
        ],
    )


def _empty_last_chunk() -> list[bytes]:
    chunks = [SHORT[:2], SHORT[2:4], b""]
    return [_frame(i=i, n=3, size=4, d=chunk) for i, chunk in enumerate(chunks)]


def _time_limit() -> dict[str, Any]:
    parts = _cut(SHORT, 5)
    return _vector(
        "the time limit",
        [
            _step(parts[0], now=10.0),
            _step(parts[1], now=70.0, message=SHORT),
            _step(parts[0], now=80.0),
            _step(parts[1], now=140.5, expired=1),
            _step(parts[0], now=141.0, message=SHORT),
        ],
    )


def _restarted() -> dict[str, Any]:
    return _vector(
        "another size begins anew",
        [
            _step(_frame(i=0, n=2, size=8, d=b"abcd")),
            _step(_frame(i=1, n=2, size=10, d=SHORT[5:])),
            _step(_frame(i=1, n=2, size=8, d=b"efgh")),
            _step(_frame(i=0, n=2, size=8, d=b"ABCD"), message=b"ABCDefgh"),
        ],
    )


def _oldest_goes() -> dict[str, Any]:
    parts = [_cut(SHORT, 5, number) for number in range(4)]
    return _vector(
        "more unfinished messages than allowed",
        [
            *(_step(first) for first, _ in parts),
            _step(parts[1][1], message=SHORT),
            _step(parts[0][1]),  # its first half was given up
            _step(parts[0][0], message=SHORT),
        ],
    )


def _own_memory() -> dict[str, Any]:
    big = [_cut(bytes(400), 200, number) for number in range(2)]
    return _vector(
        "more memory than a sender may take",
        [
            _step(big[0][0]),
            _step(big[1][0]),
            _step(big[1][1], message=bytes(400)),
            _step(_cut(bytes(700), 350)[0], reason="reassembly_full"),
        ],
    )


def _all_memory() -> dict[str, Any]:
    big = _cut(bytes(400), 200, 1)
    return _vector(
        "more memory than there is",
        [
            _step(big[0]),
            _step(big[0], sender="b"),
            _step(big[0], sender="c", reason="reassembly_full"),
            _step(_frame(d=SHORT), sender="c", message=SHORT),
            _step(big[1], message=bytes(400)),
            _step(big[0], sender="c"),
            _step(big[1], sender="c", message=bytes(400)),
            _step(big[1], sender="b", message=bytes(400)),
        ],
    )


def _frame(**changes: Any) -> bytes:
    chunk = changes.get("d", SHORT)
    fields: dict[str, Any] = {
        "v": 1,
        "id": 7,
        "i": 0,
        "n": 1,
        "size": len(SHORT),
        "crc": zlib.crc32(chunk) if isinstance(chunk, bytes) else 0,
        "d": chunk,
    } | changes
    packed: bytes = msgpack.packb({k: v for k, v in fields.items() if v is not ...})
    return packed


def _rejections() -> dict[str, Any]:
    malformed = [
        b"",
        b"\xc1",
        b"rubbish",
        _frame() + b"\x00",
        _frame()[:-1],
        b"\x93\x01\x02\x03",
        _frame(extra=msgpack.Timestamp(0)),
    ]
    invalid: list[dict[str, Any]] = [
        {"id": ...},
        {"d": ...},
        {"d": "text"},
        {"id": -1},
        {"id": 2**32},
        {"i": True},
        {"i": 1.0},
        {"i": 1},
        {"n": 0, "i": 0},
        {"n": 65_537, "size": 100},
        {"n": 12, "size": 10, "d": SHORT[:1]},
        {"size": 9},
        {"size": 11},
        {"n": 2, "i": 1, "d": SHORT[:4]},
    ]
    return _vector(
        "what is dropped",
        [
            *(_step(data, reason="malformed") for data in malformed),
            *(_step(_frame(v=version), reason="foreign_version") for version in (0, 2, "1", ...)),
            *(_step(_frame(**changes), reason="invalid") for changes in invalid),
            _step(_frame(crc=0), reason="corrupt"),
            _step(_frame(d=SHORT[::-1], crc=zlib.crc32(SHORT)), reason="corrupt"),
            _step(_frame(n=2, size=1001, d=bytes(501)), reason="oversized"),
            _step(_frame(n=2, size=2**32 - 1, d=b""), reason="oversized"),
        ],
    )
