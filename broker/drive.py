"""The service loop of either end: a state machine on one side, the link on the other.

The machine runs in one worker thread, so that its computing never starves the MQTT keep-alive, and
never in two at once. What it returns is sent in order, several messages at a time.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from broker.envelopes import DeferredEnvelope, Envelope
from broker.errors import PacketTooLarge, PublishRefused, SubscribeRefused, TransportError
from broker.link import Arrival
from broker.transport import Connected, Disconnected

log = logging.getLogger("splitfleet.service")

INBOX = 64
"""Messages waiting for the machine; beyond it frames stay unacknowledged at the broker."""
SENDING = 16
"""Messages on their way out at once."""
HOUSEKEEPING_S = 5.0
FAREWELL_S = 300.0
"""How long a machine that has finished waits for a connection to say its last words on."""


@dataclass(frozen=True, slots=True)
class Subscribe:
    """An effect: receive these topics from now on, instead of those of the last one."""

    filters: tuple[str, ...]


Effect = Envelope | Subscribe


@dataclass(frozen=True, slots=True)
class Call:
    """An event that did not come over the network: to be run in the machine's thread."""

    run: Callable[[], Sequence[Effect]]


Event = Arrival | Connected | Disconnected | Call


class Mail(Protocol):
    """Where a machine's messages come from and go to: a ``Link``, or one of its ``Branches``."""

    async def receive(self) -> Event: ...

    async def send(self, envelope: Envelope) -> None: ...

    async def subscribe(self, *filters: str) -> None: ...

    async def unsubscribe(self, *filters: str) -> None: ...

    def expire(self) -> None: ...


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
    link: Mail,
    *,
    clock: Callable[[], float],
    stop: asyncio.Event,
    flush_s: float = 30.0,
    farewell_s: float = FAREWELL_S,
    stepped: Callable[[], None] = lambda: None,
    turned: Callable[[], None] = lambda: None,
) -> None:
    """Run ``machine`` until it has finished or ``stop`` is set; ``stepped`` follows each step.

    ``turned`` follows each step, too, and each wait of its thread, for work or for the link, of
    which none is longer than ``HOUSEKEEPING_S``: a thread that does not turn is stuck in a step.

    What is under way then is still sent, for at most ``flush_s`` seconds. If a connection was lost
    with the last words of a machine that has finished, it says them again on the next one, which
    is waited for ``farewell_s`` seconds.

    Raises ``ConnectRefused`` when the broker will not have this client, and whatever the
    machine raises.
    """
    loop = _Loop(machine, link, clock, stepped, turned, flush_s=flush_s, farewell_s=farewell_s)
    machine_job = loop.start()
    jobs: list[asyncio.Future[Any]] = [
        machine_job,
        loop.broken,
        asyncio.create_task(loop.read(), name="reader"),
        asyncio.create_task(loop.carry_out(), name="carrier"),
        asyncio.create_task(loop.keep_house(), name="housekeeping"),
    ]
    stopping = asyncio.create_task(stop.wait(), name="stop")
    try:
        await asyncio.wait([stopping, *jobs], return_when=asyncio.FIRST_COMPLETED)
        for job in jobs:
            if job.done():
                await job
        await loop.flush(machine_job, flush_s)
    finally:
        loop.end()
        for job in (stopping, *jobs[1:]):
            job.cancel()
        await asyncio.gather(stopping, *jobs, return_exceptions=True)
        await loop.close()
    for job in (machine_job, loop.broken):  # what went wrong during the flush
        if not job.cancelled():
            await job


class _Loop:
    """The event loop reads and sends; the machine's thread never waits for it between two steps."""

    def __init__(
        self,
        machine: Machine,
        link: Mail,
        clock: Callable[[], float],
        stepped: Callable[[], None],
        turned: Callable[[], None],
        *,
        flush_s: float,
        farewell_s: float,
    ) -> None:
        self._machine = machine
        self._link = link
        self._clock = clock
        self._stepped, self._turned = stepped, turned
        self._flush_s, self._farewell_s = flush_s, farewell_s
        self._given = self._done = 0
        """Effects that the machine wanted, and those of them that are over."""
        self._unsaid = False
        """Whether something was not sent for want of a connection since the last one began."""
        self._loop = asyncio.get_running_loop()
        self._inbox: SimpleQueue[Event | None] = SimpleQueue()
        self._room = asyncio.Semaphore(INBOX)
        self._outbox: asyncio.Queue[Effect] = asyncio.Queue()
        self._slots = threading.Semaphore(SENDING)
        self._sending: set[asyncio.Task[None]] = set()
        self.broken: asyncio.Future[None] = self._loop.create_future()
        self._filters: tuple[str, ...] = ()
        self._ending = threading.Event()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="machine")
        self._maker = ThreadPoolExecutor(1, thread_name_prefix="maker")

    # -- in the machine's thread ------------------------------------------------------------------

    def start(self) -> asyncio.Future[None]:
        """Feed the machine in its thread: messages first, then time, then work."""
        return self._loop.run_in_executor(self._worker, self._compute)

    def _compute(self) -> None:
        while not self._machine.finished and not self._ending.is_set():
            step = self._next_step()
            if step is not None:
                self._give(step())
                self._stepped()
            self._turned()
        self._take_leave()

    def _give(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            while not self._slots.acquire(timeout=1.0):
                if self._ending.is_set():
                    return
                self._turned()
            self._given += 1
            self._loop.call_soon_threadsafe(self._outbox.put_nowait, effect)

    def _take_leave(self) -> None:
        """Wait until all is said; what was lost with a connection, again on the next."""
        started = self._clock()
        while not self._ending.is_set() and (self._unsaid or self._done < self._given):
            self._turned()
            patience = self._farewell_s if self._unsaid else self._flush_s
            left = max(0.0, started + patience - self._clock())
            try:
                event = self._inbox.get(timeout=min(left, HOUSEKEEPING_S))
            except Empty:
                if left <= HOUSEKEEPING_S:
                    return
                continue
            handle = self._handler(event)
            if isinstance(event, Connected):
                self._give(handle())

    def _next_step(self) -> Callable[[], Sequence[Effect]] | None:
        """None if nothing has come up while it waited."""
        machine = self._machine
        try:
            return self._handler(self._inbox.get_nowait())
        except Empty:
            pass
        now, due = self._clock(), machine.next_tick
        if due is not None and now >= due:
            return machine.tick
        if machine.has_work:
            return machine.work
        patience = HOUSEKEEPING_S if due is None else min(HOUSEKEEPING_S, due - now)
        try:
            return self._handler(self._inbox.get(timeout=patience))
        except Empty:
            return None

    def _handler(self, event: Event | None) -> Callable[[], Sequence[Effect]]:
        if event is None:
            return lambda: ()
        self._loop.call_soon_threadsafe(self._room.release)
        match event:
            case Connected():
                self._unsaid = False
                return self._machine.connected
            case Disconnected():
                return self._machine.disconnected
            case Arrival(envelope):
                return lambda: self._machine.receive(envelope)
            case Call(run):
                return run

    # -- in the event loop ------------------------------------------------------------------------

    async def read(self) -> None:
        """Move what arrives into the bounded inbox."""
        while True:
            await self._room.acquire()
            self._inbox.put(await self._link.receive())

    async def carry_out(self) -> None:
        """Do in their order what the machine wants; several messages are sent at a time."""
        while True:
            effect = await self._outbox.get()
            if isinstance(effect, Subscribe):
                await self._subscribe(effect.filters)
                self._release()
            else:
                task = asyncio.create_task(self._send(effect), name="send")
                self._sending.add(task)
                task.add_done_callback(self._sending.discard)
            self._outbox.task_done()

    async def keep_house(self) -> None:
        """Drop what has been incomplete for too long."""
        while True:
            await asyncio.sleep(HOUSEKEEPING_S)
            self._link.expire()

    async def _subscribe(self, filters: tuple[str, ...]) -> None:
        obsolete = [topic for topic in self._filters if topic not in filters]
        if obsolete:
            await self._link.unsubscribe(*obsolete)
        self._filters = filters
        try:
            await self._link.subscribe(*filters)
        except SubscribeRefused:
            raise
        except TransportError as exc:  # they are made again on the next connection
            log.debug("not subscribed yet: %s", exc)

    async def _send(self, envelope: Envelope) -> None:
        try:
            if isinstance(envelope, DeferredEnvelope):
                # Made here, so that the machine goes on with the next message meanwhile.
                await self._loop.run_in_executor(self._maker, lambda: envelope.message)
            await self._link.send(envelope)
        except (PublishRefused, PacketTooLarge) as exc:
            log.error("not sent: %s", exc)  # noqa: TRY400 the message says it all
        except TransportError as exc:
            # Whoever waits for an answer says it again; what nobody waits for may be lost.
            self._unsaid = True
            log.debug("not sent on %s: %s", envelope.address, exc)
        except Exception as exc:  # noqa: BLE001 the machine's, from making the message
            if not self.broken.done():
                self.broken.set_exception(exc)
        finally:
            self._release()

    def _release(self) -> None:
        self._done += 1
        self._slots.release()
        if self._machine.finished:
            self._inbox.put(None)  # its thread waits for this

    async def flush(self, machine_job: asyncio.Future[None], seconds: float) -> None:
        """End the machine's thread after its step and let what is being sent arrive."""
        self.end()
        try:
            async with asyncio.timeout(seconds):
                await asyncio.wait([machine_job])
                await self._outbox.join()
                if self._sending:
                    await asyncio.wait(set(self._sending))
        except TimeoutError:
            pass

    async def close(self) -> None:
        """Cancel what is still being sent and let the threads end."""
        for task in self._sending:
            task.cancel()
        await asyncio.gather(*self._sending, return_exceptions=True)
        for pool in (self._worker, self._maker):
            await self._loop.run_in_executor(None, pool.shutdown)

    def end(self) -> None:
        """Let the machine's thread end after its step."""
        self._ending.set()
        self._inbox.put(None)
