from __future__ import annotations

import contextlib
import random
import zlib
from collections.abc import Iterator
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker import frames
from broker.errors import MessageError
from broker.frames import MAX_CHUNKS, OVERHEAD, Limits, Reassembler
from broker.link import DEFAULT_CHUNK_BYTES
from broker.maps import Pieces
from broker.messages import PROTOCOL

TOPIC = "t"
SMALL = Limits(
    message_bytes=1000,
    sender_bytes=2100,
    total_bytes=3100,
    sender_messages=4,
    timeout_s=60.0,
)


def split(message: bytes, message_id: int, chunk_bytes: int) -> Iterator[bytes]:
    return frames.split(Pieces((message,)), message_id, chunk_bytes)


def frame(**changes: Any) -> bytes:
    """The first of two chunks of four bytes each."""
    chunk = changes.get("d", b"abcd")
    fields: dict[str, Any] = {
        "v": PROTOCOL,
        "id": 7,
        "i": 0,
        "n": 2,
        "size": 8,
        "crc": zlib.crc32(chunk) if isinstance(chunk, bytes) else 0,
        "d": chunk,
    }
    packed: bytes = msgpack.packb({k: v for k, v in (fields | changes).items() if v is not None})
    return packed


def refused(reassembler: Reassembler, payload: bytes, *, sender: str = "a") -> str:
    with pytest.raises(MessageError) as caught:
        reassembler.add(sender, TOPIC, payload, 0.0)
    return caught.value.reason


def deliver(
    reassembler: Reassembler, frames: list[bytes], *, sender: str = "a", now: float = 0.0
) -> list[bytes]:
    arrived = (reassembler.add(sender, TOPIC, payload, now) for payload in frames)
    return [bytes(message) for message in arrived if message is not None]


# -- what is sent ---------------------------------------------------------------------------------


@given(message=st.binary(max_size=500), chunk=st.integers(1, 200), number=st.integers(0, 2**40))
def test_in_order_a_message_arrives_once_and_whole(message: bytes, chunk: int, number: int) -> None:
    reassembler = Reassembler(SMALL)
    assert deliver(reassembler, list(split(message, number, chunk))) == [message]
    assert reassembler.held_bytes == 0


@pytest.mark.parametrize("size", [0, 1, DEFAULT_CHUNK_BYTES, DEFAULT_CHUNK_BYTES + 1, 3_000_000])
def test_no_frame_is_larger_than_a_packet_may_be(size: int) -> None:
    frames = list(split(random.Random(size).randbytes(size), 2**40, DEFAULT_CHUNK_BYTES))
    assert max(map(len, frames)) <= DEFAULT_CHUNK_BYTES + 128 <= DEFAULT_CHUNK_BYTES + OVERHEAD
    assert DEFAULT_CHUNK_BYTES + OVERHEAD <= 131_072


@given(
    st.lists(st.binary(min_size=1, max_size=200), min_size=1, max_size=4),
    st.integers(1, 50),
    st.randoms(),
    st.integers(0, 2),
)
def test_in_any_order_mixed_and_doubled_every_message_arrives(
    messages: list[bytes], chunk: int, rng: random.Random, copies: int
) -> None:
    frames = [f for number, m in enumerate(messages) for f in split(m, number, chunk)]
    frames += rng.choices(frames, k=copies * len(frames))
    rng.shuffle(frames)
    arrived = deliver(Reassembler(Limits(sender_messages=10)), frames)
    assert set(arrived) == set(messages)


@given(message=st.binary(min_size=2, max_size=300), chunk=st.integers(1, 50), data=st.data())
def test_with_a_chunk_missing_nothing_arrives_and_with_it_everything(
    message: bytes, chunk: int, data: st.DataObject
) -> None:
    frames = list(split(message, 1, chunk))
    if len(frames) == 1:
        return
    missing = data.draw(st.sampled_from(frames))
    reassembler = Reassembler(SMALL)
    assert deliver(reassembler, [f for f in frames if f != missing]) == [] or (
        frames.count(missing) > 1
    )
    assert deliver(reassembler, [missing]) in ([message], [])


def test_messages_of_two_senders_or_topics_do_not_mix() -> None:
    reassembler = Reassembler(SMALL)
    ours, theirs = list(split(b"a" * 20, 1, 10)), list(split(b"b" * 20, 1, 10))
    assert reassembler.add("a", TOPIC, ours[0], 0) is None
    assert reassembler.add("b", TOPIC, theirs[1], 0) is None
    assert reassembler.add("a", "u", theirs[1], 0) is None
    assert reassembler.add("a", TOPIC, ours[1], 0) == b"a" * 20


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"v": 2}, "foreign_version"),
        ({"v": None}, "foreign_version"),
        ({"v": "x" * 1000}, "foreign_version"),
        ({"id": None}, "invalid"),
        ({"id": -1}, "invalid"),
        ({"id": 2**32}, "invalid"),
        ({"id": 1.0}, "invalid"),
        ({"i": True}, "invalid"),
        ({"i": 2}, "invalid"),
        ({"n": 0}, "invalid"),
        ({"n": MAX_CHUNKS + 1}, "invalid"),
        ({"n": 100, "size": 8}, "invalid"),
        ({"size": 9}, "invalid"),
        ({"size": 1001, "n": 200, "d": b"abcdef"}, "oversized"),
        ({"size": 2**32 - 1, "n": 1}, "oversized"),
        ({"size": 2**40}, "invalid"),
        ({"d": "text"}, "invalid"),
        ({"d": None, "crc": 0}, "invalid"),
        ({"d": b"abcdX"}, "invalid"),
        ({"crc": 1}, "corrupt"),
        ({"crc": None}, "invalid"),
    ],
    ids=str,
)
def test_a_frame_that_makes_no_sense_is_refused_and_holds_nothing(
    changes: dict[str, Any], reason: str
) -> None:
    reassembler = Reassembler(SMALL)
    assert refused(reassembler, frame(**changes)) == reason
    assert reassembler.held_bytes == 0


@pytest.mark.parametrize("payload", [b"", b"rubbish", msgpack.packb([1]), b"\xc1"])
def test_rubbish_is_malformed(payload: bytes) -> None:
    assert refused(Reassembler(SMALL), payload) == "malformed"


def test_a_corrupt_chunk_can_be_sent_again() -> None:
    reassembler = Reassembler(SMALL)
    first, second = split(b"abcdefgh", 1, 4)
    damaged = second.replace(b"efgh", b"efgX")
    assert reassembler.add("a", TOPIC, first, 0) is None
    assert refused(reassembler, damaged) == "corrupt"
    assert reassembler.add("a", TOPIC, second, 0) == b"abcdefgh"


def test_the_number_of_a_message_used_again_starts_it_anew() -> None:
    """E.g. a device that restarted, or one that means harm."""
    reassembler = Reassembler(SMALL)
    assert deliver(reassembler, list(split(b"a" * 30, 1, 10))[:2]) == []
    assert deliver(reassembler, list(split(b"b" * 45, 1, 10))) == [b"b" * 45]
    assert deliver(reassembler, list(split(b"c" * 40, 1, 20))[:1]) == []
    assert deliver(reassembler, list(split(b"d" * 40, 1, 10))) == [b"d" * 40]
    assert reassembler.held_bytes == 0


# -- bounds ---------------------------------------------------------------------------------------


def begin(size: int, number: int) -> bytes:
    return next(iter(split(bytes(size), number, size // 2)))


def test_a_sender_that_takes_too_much_loses_its_own_oldest_message() -> None:
    reassembler = Reassembler(SMALL)
    older, newer = list(split(b"a" * 1000, 1, 500)), list(split(b"b" * 1000, 2, 500))
    deliver(reassembler, [older[0], newer[0]])
    deliver(reassembler, [begin(200, 3)])
    assert deliver(reassembler, [newer[1]]) == [b"b" * 1000]
    assert deliver(reassembler, [older[1]]) == []


def test_a_sender_has_only_so_many_messages_under_way() -> None:
    reassembler = Reassembler(SMALL)
    started = [list(split(bytes([n]) * 10, n, 5)) for n in range(5)]
    deliver(reassembler, [frames[0] for frames in started])
    arrived = deliver(reassembler, [frames[1] for frames in reversed(started)])
    assert arrived == [bytes([n]) * 10 for n in (4, 3, 2, 1)]


def test_one_sender_never_costs_another_its_message() -> None:
    reassembler = Reassembler(SMALL)
    ours = list(split(b"a" * 1000, 1, 500))
    deliver(reassembler, ours[:1])
    deliver(reassembler, [begin(1000, 1), begin(1000, 2)], sender="b")
    assert refused(reassembler, begin(1000, 1), sender="c") == "reassembly_full"
    assert deliver(reassembler, ours[1:]) == [b"a" * 1000]
    deliver(reassembler, [begin(1000, 1)], sender="c")


def test_what_stays_incomplete_is_forgotten() -> None:
    reassembler = Reassembler(SMALL)
    first, second = split(b"abcdefgh", 1, 4)
    deliver(reassembler, [first], now=10.0)
    assert reassembler.expire(70.0) == []
    assert reassembler.expire(70.1) == ["a"]
    assert reassembler.expire(70.1) == []
    assert reassembler.held_bytes == 0
    assert deliver(reassembler, [second], now=71.0) == []
    assert deliver(reassembler, [first], now=72.0) == [b"abcdefgh"]


def tracked(reassembler: Reassembler) -> int:
    """Bytes of everything the reassembler refers to."""
    import sys

    seen: set[int] = set()
    total, stack = 0, [vars(reassembler)["_partials"]]
    while stack:
        thing: Any = stack.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        total += sys.getsizeof(thing)
        if isinstance(thing, dict):
            stack += [*thing.keys(), *thing.values()]
        elif isinstance(thing, (list, tuple, set)):
            stack += list(thing)
        elif hasattr(thing, "__slots__"):
            stack += [getattr(thing, slot) for slot in thing.__slots__]
    return total


def test_many_tiny_chunks_do_not_take_more_memory_than_the_bound() -> None:
    """What is kept to know which chunks are missing counts too."""
    limits = Limits(message_bytes=100_000, sender_bytes=200_000, total_bytes=200_000)
    reassembler = Reassembler(limits)
    for number in range(100):
        deliver(reassembler, [next(iter(split(bytes(60_000), number, 1)))])
    assert reassembler.held_bytes <= limits.total_bytes
    assert tracked(reassembler) < 3 * limits.total_bytes


def test_senders_that_were_refused_leave_nothing_behind() -> None:
    reassembler = Reassembler(SMALL)
    for sender in "abc":
        deliver(reassembler, [begin(1000, 1)], sender=sender)
    before = tracked(reassembler)
    for number in range(1000):
        assert refused(reassembler, begin(1000, 1), sender=f"s{number}") == "reassembly_full"
    assert tracked(reassembler) <= before + 1000


def held_by(reassembler: Reassembler, sender: str) -> tuple[int, int]:
    """How many messages of a sender are under way, and the memory they count for."""
    if sender not in reassembler._partials:
        return 0, 0
    mine = reassembler._partials[sender]
    return len(mine), sum(partial.cost for partial in mine.values())


TIGHT = Limits(
    message_bytes=300, sender_bytes=500, total_bytes=900, sender_messages=3, timeout_s=60.0
)


@settings(max_examples=300)
@given(
    sent=st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 250), st.integers(1, 60)),
        min_size=1,
        max_size=8,
    ),
    limits=st.sampled_from([TIGHT, Limits()]),
    lost=st.floats(0, 0.3),
    doubled=st.integers(0, 2),
    rng=st.randoms(use_true_random=False),
)
def test_chunks_shuffled_doubled_and_lost_of_several_senders(
    sent: list[tuple[str, int, int]],
    limits: Limits,
    lost: float,
    doubled: int,
    rng: random.Random,
) -> None:
    messages: dict[tuple[str, int], bytes] = {}
    arriving: list[tuple[str, int, bytes]] = []
    complete = set()
    for number, (sender, size, chunk) in enumerate(sent):
        message = rng.randbytes(size)
        messages[sender, number] = message
        chunks = [f for f in split(message, number, chunk) if rng.random() >= lost]
        if len(chunks) == -(-size // chunk):
            complete.add((sender, message))
        arriving += [(sender, number, payload) for payload in chunks]
    arriving += rng.choices(arriving, k=doubled * len(arriving)) if arriving else []
    rng.shuffle(arriving)

    reassembler = Reassembler(limits)
    arrived = set()
    for sender, number, payload in arriving:
        whole = None
        with contextlib.suppress(MessageError):
            whole = reassembler.add(sender, TOPIC, payload, 0.0)
        if whole is not None:
            assert whole == messages[sender, number]
            arrived.add((sender, bytes(whole)))
        each = [held_by(reassembler, name) for name in "abc"]
        assert all(count <= limits.sender_messages for count, _ in each)
        assert all(cost <= limits.sender_bytes for _, cost in each)
        assert sum(cost for _, cost in each) == reassembler.held_bytes <= limits.total_bytes
    assert arrived <= complete
    if limits != TIGHT:
        assert arrived == complete
    reassembler.expire(61.0)
    assert reassembler.held_bytes == 0


def test_the_memory_a_message_takes_does_not_depend_on_how_it_is_cut() -> None:
    """The bytes of the message and one more for each chunk, from the first one on."""
    reassembler = Reassembler(Limits())
    for chunk in (1, 10, 500):
        deliver(reassembler, list(split(bytes(1000), chunk, chunk))[:-1])
        assert reassembler.held_bytes == 1000 + 1000 // chunk
        reassembler.expire(100.0)


FRAMES = st.builds(
    frame,
    id=st.integers(0, 3),
    i=st.integers(0, 3),
    n=st.integers(0, 4),
    size=st.one_of(st.integers(0, 16), st.sampled_from([900, 1000, 2**31])),
    d=st.binary(max_size=5),
)


@settings(max_examples=300)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from("abc"), st.sampled_from("tu"), FRAMES),
            st.tuples(
                st.sampled_from("abc"),
                st.sampled_from("tu"),
                st.builds(begin, st.sampled_from([4, 500, 1000]), st.integers(0, 9)),
            ),
            st.floats(0, 100),
        ),
        max_size=60,
    )
)
def test_whatever_arrives_the_bounds_hold(
    events: list[tuple[str, str, bytes] | float],
) -> None:
    reassembler, now = Reassembler(SMALL), 0.0
    for event in events:
        if isinstance(event, float):
            now += event
            reassembler.expire(now)
        else:
            sender, topic, payload = event
            with contextlib.suppress(MessageError):
                reassembler.add(sender, topic, payload, now)
        assert 0 <= reassembler.held_bytes <= SMALL.total_bytes
    reassembler.expire(now + 100)
    assert reassembler.held_bytes == 0


def test_a_slow_message_arrives_as_long_as_chunks_keep_coming() -> None:
    frames = list(split(bytes(1000), 1, 100))
    limits = Limits(timeout_s=60.0)
    slow, stuck = Reassembler(limits), Reassembler(limits)
    for number, frame in enumerate(frames):
        whole = slow.add("d", "t", frame, 50.0 * number)
        assert slow.expire(50.0 * number) == []
    assert whole is not None
    for number in range(40):
        stuck.add("d", "t", frames[number % 2], 50.0 * number)
    assert stuck.expire(50.0 * 40) == ["d"]
    assert stuck.held_bytes == 0


@given(
    st.integers(0, 3000), st.integers(0, 2**33), st.sampled_from([1, 7, 100, 128, 255, 257, 1000])
)
def test_sizes_are_known_without_frames(size: int, message_id: int, chunk_bytes: int) -> None:
    message = random.Random(size).randbytes(size)
    made = list(split(message, message_id, chunk_bytes))
    expected = [len(each) for each in made]
    checksums = [msgpack.unpackb(each)["crc"] for each in made]
    for known, length, crc in zip(
        frames.frame_sizes(size, message_id, chunk_bytes), expected, checksums, strict=True
    ):
        assert known == length or (crc < 2**16 and 0 < known - length <= 4)


def test_sizes_are_known_of_large_chunks() -> None:
    message = bytes(300_000)
    made = [len(each) for each in split(message, 3, 96 << 10)]
    assert frames.frame_sizes(len(message), 3, 96 << 10) == made
