"""The service loop of either end: a state machine on one side, the link on the other.

The machine runs in one worker thread, so that its computing never starves the MQTT keep-alive, and
never in two at once. What it returns is sent in order, several messages at a time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from broker.errors import PacketTooLarge, PublishRefused, TransportError
from broker.link import Arrival, Link
from broker.messages import DeferredEnvelope, Envelope
from broker.transport import Connected, Disconnected

log = logging.getLogger("splitfleet.service")

INBOX = 64
"""Messages waiting for the machine; beyond it frames stay unacknowledged at the broker."""
SENDING = 16
"""Messages on their way out at once."""
HOUSEKEEPING_S = 5.0


@dataclass(frozen=True, slots=True)
class Subscribe:
    """An effect: receive these topics from now on, instead of those of the last one."""

    filters: tuple[str, ...]


Effect = Envelope | Subscribe
Event = Arrival | Connected | Disconnected


class Machine(Protocol):
    """A state machine that can be driven."""

    @property
    def finished(self) -> bool:
        """Whether nothing more will happen."""
        ...

    @property
    def has_work(self) -> bool:
        """Whether :meth:`work` would do something now."""
        ...

    @property
    def next_tick(self) -> float | None:
        """When :meth:`tick` has something to do, on the clock."""
        ...

    def connected(self) -> Sequence[Effect]: ...

    def disconnected(self) -> Sequence[Effect]: ...

    def receive(self, envelope: Envelope) -> Sequence[Effect]: ...

    def tick(self) -> Sequence[Effect]: ...

    def work(self) -> Sequence[Effect]:
        """One unit of computing, short enough that a message may wait for it."""
        ...


async def drive(
    machine: Machine,
    link: Link,
    *,
    clock: Callable[[], float],
    stop: asyncio.Event,
    flush_s: float = 30.0,
) -> None:
    """Run ``machine`` until it has finished or ``stop`` is set.

    What is under way then is still sent, for at most ``flush_s`` seconds.

    Raises ``ConnectRefused`` when the broker will not have this client, and whatever the
    machine raises.
    """
    loop = _Loop(machine, link, clock)
    reader = asyncio.create_task(loop.read(), name="reader")
    runner = asyncio.create_task(loop.run(), name="machine")
    stopping = asyncio.create_task(stop.wait(), name="stop")
    try:
        await asyncio.wait({reader, runner, stopping}, return_when=asyncio.FIRST_COMPLETED)
        for task in (runner, reader):
            if task.done():
                await task
        await loop.flush(flush_s)
    finally:
        for task in (reader, runner):
            task.cancel()
        stopping.cancel()
        await asyncio.gather(reader, runner, stopping, return_exceptions=True)
        await loop.close()


class _Loop:
    def __init__(self, machine: Machine, link: Link, clock: Callable[[], float]) -> None:
        self._machine = machine
        self._link = link
        self._clock = clock
        self._inbox: asyncio.Queue[Event] = asyncio.Queue(INBOX)
        self._slots = asyncio.Semaphore(SENDING)
        self._sending: set[asyncio.Task[None]] = set()
        self._filters: tuple[str, ...] = ()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="machine")
        self._maker = ThreadPoolExecutor(1, thread_name_prefix="maker")
        self._next_housekeeping = clock() + HOUSEKEEPING_S

    async def read(self) -> None:
        """Move what arrives into the bounded inbox."""
        while True:
            await self._inbox.put(await self._link.receive())

    async def run(self) -> None:
        """Feed the machine: messages first, then time, then work."""
        loop = asyncio.get_running_loop()
        while not self._machine.finished:
            step = await self._next_step()
            for effect in await loop.run_in_executor(self._worker, step):
                await self._carry_out(effect)

    async def _next_step(self) -> Callable[[], Sequence[Effect]]:
        machine = self._machine
        while True:
            if not self._inbox.empty():
                return self._handler(self._inbox.get_nowait())
            now = self._clock()
            if now >= self._next_housekeeping:
                self._link.expire()
                self._next_housekeeping = now + HOUSEKEEPING_S
            due = machine.next_tick
            if due is not None and now >= due:
                return machine.tick
            if machine.has_work:
                # Messages that lie in the socket go before the next unit of work.
                await asyncio.sleep(0)
                if self._inbox.empty():
                    return machine.work
                continue
            patience = HOUSEKEEPING_S if due is None else min(HOUSEKEEPING_S, due - now)
            try:
                async with asyncio.timeout(patience):
                    event = await self._inbox.get()
                return self._handler(event)
            except TimeoutError:
                self._link.expire()

    def _handler(self, event: Event) -> Callable[[], Sequence[Effect]]:
        match event:
            case Connected():
                log.info("connected to the broker")
                return self._machine.connected
            case Disconnected(reason):
                log.warning("no connection to the broker (%s); trying again", reason)
                return self._machine.disconnected
            case Arrival(envelope):
                return lambda: self._machine.receive(envelope)

    async def _carry_out(self, effect: Effect) -> None:
        if isinstance(effect, Subscribe):
            obsolete = [topic for topic in self._filters if topic not in effect.filters]
            if obsolete:
                await self._link.unsubscribe(*obsolete)
            self._filters = effect.filters
            await self._link.subscribe(*effect.filters)
            return
        await self._slots.acquire()
        task = asyncio.create_task(self._send(effect), name="send")
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _send(self, envelope: Envelope) -> None:
        try:
            if isinstance(envelope, DeferredEnvelope):
                # Made here, so that the machine goes on with the next message meanwhile.
                await asyncio.get_running_loop().run_in_executor(
                    self._maker, lambda: envelope.message
                )
            await self._link.send(envelope)
        except (PublishRefused, PacketTooLarge) as exc:
            log.error("not sent: %s", exc)  # noqa: TRY400 the message says it all
        except TransportError as exc:
            # Whoever waits for an answer says it again; what nobody waits for may be lost.
            log.debug("not sent on %s: %s", envelope.address, exc)
        finally:
            self._slots.release()

    async def flush(self, seconds: float) -> None:
        """Let what is being sent arrive."""
        if self._sending:
            await asyncio.wait(set(self._sending), timeout=seconds)

    async def close(self) -> None:
        """Cancel what is still being sent and let the worker finish its last step."""
        for task in self._sending:
            task.cancel()
        await asyncio.gather(*self._sending, return_exceptions=True)
        for pool in (self._worker, self._maker):
            await asyncio.get_running_loop().run_in_executor(None, pool.shutdown)
