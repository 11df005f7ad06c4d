"""Fuzz targets of `broker`: frames, messages, and the two together as a link opens them."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgpack

from broker.envelopes import decode_message
from broker.errors import MessageError
from broker.fields import Message
from broker.frames import Limits, Reassembler, split
from broker.link import Framing
from broker.maps import Pieces, unpack_map
from broker.messages import KINDS
from broker.topics import Address, Topics
from tests.fuzz.mutate import INTERESTING, any_value, below, mutate
from tests.fuzz.seeds import corpus
from tests.fuzz.target import Target

FRAME_LIMITS = Limits(
    message_bytes=2000, sender_bytes=5000, total_bytes=12_000, sender_messages=4, timeout_s=60.0
)
LINK_LIMITS = replace(FRAME_LIMITS, sender_bytes=3000, total_bytes=4000)
FRAME_REASONS = frozenset(
    ("malformed", "foreign_version", "invalid", "corrupt", "oversized", "reassembly_full")
)


class _Chunks:
    """Frames of a few messages at once, some damaged, some lost, some again."""

    def __init__(self, rng: random.Random, contents: Callable[[], bytes]) -> None:
        self._rng = rng
        self._contents = contents
        self._waiting: list[bytes] = []
        self._number = 0

    def next(self) -> bytes:
        rng = self._rng
        if not self._waiting:
            for _ in range(1 + below(3, rng)):
                whole = self._contents()
                self._number = self._number + 1 if rng.random() < 0.9 else below(4, rng)
                most = rng.choice((20, 100, 400, 1 << 20))
                self._waiting += split(Pieces((whole,)), self._number, max(most, len(whole) // 8))
            rng.shuffle(self._waiting)
        frame = self._waiting.pop()
        choice = rng.random()
        if choice < 0.45:
            return frame
        if choice < 0.5:
            self._waiting.append(frame)
            return frame
        if choice < 0.7:
            return mutate(frame, rng, self._waiting or [frame])
        return self._rewritten(frame)

    def _rewritten(self, frame: bytes) -> bytes:
        """Another value for a field or two, by somebody who can count checksums."""
        rng = self._rng
        fields: dict[str, Any] = msgpack.unpackb(frame)
        for _ in range(1 + (rng.random() < 0.3)):
            name = rng.choice(("v", "id", "i", "n", "size", "crc", "d", "d", "x"))
            if name == "d" and rng.random() < 0.9:
                if isinstance(fields.get("d"), bytes):
                    fields["d"] = mutate(fields["d"], rng, [frame])
            elif rng.random() < 0.7:
                fields[name] = rng.choice(INTERESTING)
            elif rng.random() < 0.3:
                fields.pop(name, None)
            else:
                fields[name] = any_value(rng)
        if isinstance(fields.get("d"), bytes) and rng.random() < 0.9:
            fields["crc"] = zlib.crc32(fields["d"])
            if rng.random() < 0.5:
                fields["size"] = len(fields["d"]) * (fields["n"] if fields.get("n") == 2 else 1)
        packed: bytes = msgpack.packb(fields)
        return packed


class Frames(Target):
    reasons = FRAME_REASONS | {"reassembly_timeout"}
    memory = 600_000

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self._reassembler = Reassembler(FRAME_LIMITS)
        self._chunks = _Chunks(rng, lambda: rng.randbytes(rng.choice((0, 1, 10, 500, 1900))))
        self._now = 0.0

    def once(self) -> str:
        rng, reassembler = self.rng, self._reassembler
        self.input = self._chunks.next()
        self._now += rng.random()
        if rng.random() < 0.01 and reassembler.expire(self._now):
            return "reassembly_timeout"
        sender, topic = rng.choice("aaabcdef"), rng.choice("ttu")
        try:
            whole = reassembler.add(sender, topic, self.input, self._now)
        except MessageError as exc:
            whole, reason = None, exc.reason
        else:
            reason = ""
        if whole is not None:
            assert len(whole) <= FRAME_LIMITS.message_bytes
        assert 0 <= reassembler.held_bytes <= FRAME_LIMITS.total_bytes
        if rng.random() < 0.01:
            self._check_senders()
        return reason

    def _check_senders(self) -> None:
        total = 0
        for mine in self._reassembler._partials.values():
            held = sum(partial.cost for partial in mine.values())
            assert 0 < held <= FRAME_LIMITS.sender_bytes
            assert len(mine) <= FRAME_LIMITS.sender_messages
            total += held
        assert total == self._reassembler.held_bytes


TOPICS = Topics("fleet-1")


def _message_seeds() -> list[tuple[str, bytes]]:
    return [(t.decode(), d) for t, _, d in (seed.partition(b"\n") for seed in corpus("messages"))]


def _fields_of(data: bytes) -> dict[str, Any]:
    try:
        return unpack_map(data)
    except MessageError:  # a past failure
        return {"state": "online"}


class _Contents:
    """Messages of every kind, damaged as bytes or field by field."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.seeds = _message_seeds()
        self._bytes = [data for _, data in self.seeds]
        self._fields = [_fields_of(data) for data in self._bytes]

    def damaged(self, at: int) -> bytes:
        rng = self._rng
        choice = rng.random()
        if choice < 0.1:
            return self._bytes[at]
        if choice < 0.5:
            return mutate(self._bytes[at], rng, self._bytes)
        fields = dict(self._fields[at])
        for _ in range(1 + (rng.random() < 0.3)):
            name = rng.choice(list(fields))
            if rng.random() < 0.2:
                del fields[name]
            elif isinstance(fields[name], dict) and fields[name] and rng.random() < 0.7:
                inner = rng.choice(list(fields[name]))
                fields[name] = {**fields[name], inner: any_value(rng)}
            else:
                fields[name] = any_value(rng)
            if not fields:
                break
        packed: bytes = msgpack.packb(fields)
        return packed


def _check_message(message: Message, size: int) -> None:
    """Its blobs, being views of what arrived, are no longer than that; the model is as declared."""
    for value in message.__dict__.values():
        if isinstance(value, memoryview):
            assert len(value) <= size
    assert isinstance(message, Message)


class Messages(Target):
    reasons = frozenset(("malformed", "invalid"))
    memory = 1_000_000

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self._contents = _Contents(rng)
        self._addresses = [TOPICS.parse(topic) for topic, _ in self._contents.seeds]

    def once(self) -> str:
        rng = self.rng
        at = below(len(self._addresses), rng)
        address = self._addresses[at]
        if rng.random() < 0.03:
            address = rng.choice(self._addresses)
        self.input = self._contents.damaged(at)
        try:
            message = decode_message(address, self.input)
        except MessageError as exc:
            return exc.reason
        assert type(message) in KINDS.values()
        _check_message(message, len(self.input))
        return ""


class _Drops:
    """What a link tells its observer."""

    def __init__(self) -> None:
        self.reason = ""

    def sent(self, address: Address, size: int) -> None: ...

    def received(self, address: Address, size: int) -> None: ...

    def dropped(self, reason: str, device: str | None) -> None:
        self.reason = reason


class Opening(Target):
    """Whatever arrives on whatever topic, up to a message for the core."""

    reasons = FRAME_REASONS | {"unexpected_topic", "reassembly_timeout"}
    memory = 1_000_000

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self._drops = _Drops()
        self._now = 0.0
        self._framing = Framing(
            TOPICS,
            observer=self._drops,
            clock=lambda: self._now,
            first_id=0,
            limits=LINK_LIMITS,
        )
        contents = _Contents(rng)
        self._topics = [topic for topic, _ in contents.seeds]
        self._at = 0
        self._chunks = _Chunks(rng, lambda: contents.damaged(self._at))

    def once(self) -> str:
        rng = self.rng
        if rng.random() < 0.3:
            self._at = below(len(self._topics), rng)
        topic = self._topics[self._at]
        if rng.random() < 0.7:
            topic = topic.replace("cam-1", rng.choice("abcdefgh"))
        elif rng.random() < 0.05:
            topic = mutate(topic.encode(), rng, [topic.encode()]).decode(errors="replace")
        self.input = self._chunks.next()
        self._now += rng.random() * 0.5
        self._drops.reason = ""
        if rng.random() < 0.01:
            self._framing.expire()
            return self._drops.reason
        envelope = self._framing.open(topic, self.input)
        assert self._framing.held_bytes <= LINK_LIMITS.total_bytes
        if envelope is not None:
            assert not self._drops.reason
            _check_message(envelope.message, LINK_LIMITS.message_bytes)
        return self._drops.reason
