"""The pure parts of the seam, and what only the in-memory twin can be asked."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

import broker
from broker.memory import MemoryBroker, MemoryTransport
from broker.transport import (
    MAX_WAITING_QOS0,
    Backoff,
    Connected,
    Disconnected,
    Inbox,
    Packet,
    packet_size,
)


@given(st.floats(0.01, 10), st.floats(1, 1000), st.integers(0, 2**32), st.integers(1, 2000))
def test_delays_double_up_to_the_cap_within_the_jitter(
    initial: float, factor: float, seed: int, count: int
) -> None:
    maximum = initial * factor
    backoff = Backoff(initial, maximum, random.Random(seed))
    for n in range(count):
        full = min(maximum, initial * 2.0 ** min(n, 1000))
        assert full / 2 <= backoff.next() <= full
    backoff.reset()
    assert backoff.next() <= initial


@pytest.mark.parametrize(
    ("payload", "size"), [(0, 8), (119, 127), (120, 129 - 1), (122, 131), (16_375, 16_386)]
)
def test_packet_size_counts_the_header(payload: int, size: int) -> None:
    # fixed header 1, length 1 to 4, topic 2 + 1, packet id 2, properties 1
    remaining = 3 + 2 + 1 + payload
    length_bytes = next(n for n in (1, 2, 3, 4) if remaining < 128**n)
    assert packet_size("t", bytes(payload), 1) == 1 + length_bytes + remaining
    assert packet_size("t", bytes(payload), 0) <= size


async def test_too_many_waiting_qos_0_packets_are_dropped_and_counted() -> None:
    inbox = Inbox()
    for i in range(MAX_WAITING_QOS0 + 5):
        inbox.put(Packet("t", str(i).encode()))
    inbox.put(Packet("t", b"kept", qos=1))
    got = [await inbox.get() for _ in range(MAX_WAITING_QOS0 + 1)]
    assert inbox.dropped == 5
    assert isinstance(got[-1], Packet)
    assert got[-1].payload == b"kept"


async def test_while_nobody_listens_one_disconnected_is_kept() -> None:
    inbox = Inbox()
    for i in range(1000):
        inbox.put(Disconnected(str(i)))
    inbox.fail(RuntimeError("end"))
    assert await inbox.get() == Disconnected("999")
    with pytest.raises(RuntimeError):
        await inbox.get()


async def test_an_error_reaches_everybody_who_waits() -> None:
    inbox = Inbox()
    waiting = [asyncio.create_task(inbox.get()) for _ in range(3)]
    await asyncio.sleep(0)
    inbox.fail(RuntimeError("end"))
    results = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 60)
    assert [type(result) for result in results] == [RuntimeError] * 3


async def test_a_session_above_its_queue_limit_drops_and_counts() -> None:
    hub = MemoryBroker(max_queued=10)
    async with (
        MemoryTransport(hub, "a", receive_maximum=1) as a,
        MemoryTransport(hub, "b") as b,
    ):
        await a.subscribe("t")
        assert isinstance(await a.receive(), Connected)
        assert isinstance(await b.receive(), Connected)
        for i in range(20):
            await b.publish("t", bytes([i]), qos=1)
        assert hub.dropped == 9  # one was sent, ten wait
        for i in range(11):
            packet = await a.receive()
            assert isinstance(packet, Packet)
            assert packet.payload == bytes([i])
            packet.ack()


def test_the_facade_has_what_it_names() -> None:
    assert broker.__all__ == sorted(broker.__all__)
    for name in broker.__all__:
        assert getattr(broker, name).__name__ == name
    with pytest.raises(AttributeError):
        _ = broker.nothing
