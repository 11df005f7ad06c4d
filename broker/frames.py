"""Frames: how a message of any size crosses a broker that takes small packets only.

Every MQTT payload of this project is one frame, a MessagePack map

    v     protocol version (1)
    id    number of the message, unique per sender and topic for longer than the time limit
    i, n  index of this chunk and how many there are
    size  bytes of the whole message
    crc   CRC-32 of this chunk
    d     the chunk: all are ``ceil(size / n)`` bytes long but the last, which may be shorter

so a receiver knows from any one frame where its bytes belong and how much memory the whole needs.
"""

from __future__ import annotations

import mmap
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from broker.errors import MessageError
from broker.maps import Buffer, Pieces, blob_bytes, pack_map, unpack_map
from broker.messages import PROTOCOL

OVERHEAD = 1024
"""Bytes kept free in a packet for topic, MQTT header and frame fields."""
MAX_CHUNKS = 65_536
SLOWEST = 30
"""How many time limits a message may take in all, as long as new chunks keep coming."""
LAZY_BYTES = 1 << 20
_U32 = 2**32
_FIELDS = ("id", "i", "n", "size", "crc")


def split(message: Pieces, message_id: int, chunk_bytes: int) -> Iterator[bytes]:
    """The frames of ``message``, each with at most ``chunk_bytes`` of it, which it copies once."""
    size = message.size
    count = max(1, -(-size // chunk_bytes))
    chunks = message.cut(-(-size // count)) if size else [message]
    for index, chunk in enumerate(chunks):
        crc = 0
        for piece in chunk:
            crc = zlib.crc32(piece, crc)
        yield b"".join(_frame(message_id, index, count, size, crc, chunk))


def frame_sizes(size: int, message_id: int, chunk_bytes: int) -> list[int]:
    """Bytes of each of the frames that :func:`split` makes of a message of ``size`` bytes.

    One frame in 65,536 is up to four bytes shorter: where its checksum happens to be that small.
    """
    count = max(1, -(-size // chunk_bytes))
    length = -(-size // count)
    plain = _frame(message_id, 0, count, size, _U32 - 1, Pieces()).size - blob_bytes(0) - 1
    # The index takes one byte up to 127, then one more for what it is, and one, two or four.
    widths = [1 if i < 128 else 2 if i < 256 else 3 if i < 65_536 else 5 for i in range(count)]
    chunks = [length] * (count - 1) + [size - length * (count - 1)]
    whole = blob_bytes(length)
    return [
        plain + width + (whole if chunk == length else blob_bytes(chunk))
        for width, chunk in zip(widths, chunks, strict=True)
    ]


def _frame(message_id: int, index: int, count: int, size: int, crc: int, chunk: Pieces) -> Pieces:
    return pack_map(
        {
            "v": PROTOCOL,
            "id": message_id % _U32,
            "i": index,
            "n": count,
            "size": size,
            "crc": crc,
            "d": chunk,
        }
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds on what a receiver holds; sizes in bytes, one more for every chunk of a message.

    A sender that exceeds ``sender_bytes`` loses its own oldest unfinished message, never another's.
    """

    message_bytes: int = 256 << 20
    sender_bytes: int = 320 << 20
    total_bytes: int = 2 << 30
    sender_messages: int = 64
    timeout_s: float = 60.0


@dataclass(slots=True)
class _Partial:
    buffer: memoryview
    arrived: bytearray
    """One byte a chunk: 1 once it is there."""
    missing: int
    started: float
    touched: float
    """When the last new chunk came."""

    @property
    def cost(self) -> int:
        return len(self.buffer) + len(self.arrived)


def _room(size: int) -> memoryview:
    """Memory for a message; much of it is not taken before something is written there."""
    return memoryview(bytearray(size) if size < LAZY_BYTES else mmap.mmap(-1, size))


class Reassembler:
    """Puts frames together, in any order, in bounded memory and time."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._partials: dict[str, OrderedDict[tuple[str, int], _Partial]] = {}
        self.held_bytes = 0

    def add(self, sender: str, topic: str, payload: Buffer, now: float) -> Buffer | None:
        """The whole message if ``payload`` completes one, else None; of one frame, a view of it.

        ``sender`` is whose memory bound counts (a device, or the coordinator), ``now`` a monotonic
        time in seconds.

        Raises:
            MessageError: the frame is dropped; reasons ``malformed``, ``foreign_version``,
                ``invalid``, ``corrupt``, ``oversized``, ``reassembly_full``.
        """
        index, count, size, message_id, chunk = self._read(payload)
        if count == 1:
            return chunk
        key = (topic, message_id)
        partial = self._partials[sender].get(key) if sender in self._partials else None
        if partial is None or len(partial.arrived) != count or len(partial.buffer) != size:
            if partial is not None:
                self._forget(sender, key)
            partial = self._start(sender, key, size, count, now)
        if not partial.arrived[index]:
            length = -(-size // count)
            partial.buffer[index * length : index * length + len(chunk)] = chunk
            partial.arrived[index] = 1
            partial.missing -= 1
            partial.touched = now
        if partial.missing:
            return None
        self._forget(sender, key)
        return partial.buffer

    def expire(self, now: float) -> list[str]:
        """Forget messages that stayed incomplete too long; their senders, one entry a message."""
        late = [
            (sender, key)
            for sender, mine in self._partials.items()
            for key, partial in mine.items()
            if now - partial.touched > self._limits.timeout_s
            or now - partial.started > SLOWEST * self._limits.timeout_s
        ]
        for sender, key in late:
            self._forget(sender, key)
        return [sender for sender, _ in late]

    def _read(self, payload: Buffer) -> tuple[int, int, int, int, memoryview]:
        fields = unpack_map(payload)
        if fields.get("v") != PROTOCOL:
            raise MessageError(
                "foreign_version",
                f"protocol version {str(fields.get('v'))[:20]}, this side speaks {PROTOCOL}: "
                "update the older one",
            )
        numbers = [fields.get(name) for name in _FIELDS]
        chunk = fields.get("d")
        if not isinstance(chunk, memoryview) or any(
            type(number) is not int or not 0 <= number < _U32 for number in numbers
        ):
            raise MessageError("invalid", "a frame field is missing or of the wrong type")
        message_id, index, count, size, crc = (int(str(number)) for number in numbers)
        if not 1 <= count <= MAX_CHUNKS or index >= count or size < count - 1:
            raise MessageError("invalid", f"frame {index} of {count} for {size} bytes")
        if size > self._limits.message_bytes:
            raise MessageError(
                "oversized", f"a message of {size} bytes; {self._limits.message_bytes} are allowed"
            )
        length = -(-size // count)
        if len(chunk) != max(0, min(length, size - index * length)):
            raise MessageError("invalid", f"frame {index} of {count} holds {len(chunk)} bytes")
        if zlib.crc32(chunk) != crc:
            raise MessageError("corrupt", "the checksum of a frame does not match")
        return index, count, size, message_id, chunk

    def _start(
        self, sender: str, key: tuple[str, int], size: int, count: int, now: float
    ) -> _Partial:
        limits, cost = self._limits, size + count
        while mine := self._partials.get(sender):
            held = sum(partial.cost for partial in mine.values())
            if len(mine) < limits.sender_messages and held + cost <= limits.sender_bytes:
                break
            self._forget(sender, next(iter(mine)))
        if cost > limits.sender_bytes or self.held_bytes + cost > limits.total_bytes:
            raise MessageError("reassembly_full", f"no memory left for a message of {size} bytes")
        partial = _Partial(_room(size), bytearray(count), count, now, now)
        self._partials.setdefault(sender, OrderedDict())[key] = partial
        self.held_bytes += cost
        return partial

    def _forget(self, sender: str, key: tuple[str, int]) -> None:
        mine = self._partials[sender]
        self.held_bytes -= mine.pop(key).cost
        if not mine:
            del self._partials[sender]
