"""One connection for several machines, each driven in a thread of its own.

So what has to be quick (answering) does not wait for what takes long (training). Every machine has
a :class:`Branch`, which ``broker.drive`` reads as if it were the link.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence

from broker.drive import Call, Effect, Event
from broker.envelopes import Envelope, channel
from broker.link import Arrival, Link
from broker.messages import LOSSY
from broker.topics import Address
from broker.transport import Connected

WAITING = 1024
"""Events that wait for a machine. A branch that is full holds up all, which the senders' credits
have to keep it from; but what may be lost is dropped then."""


class Branch:
    """A machine's part of a connection. Belongs to the event loop of its link."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._events: asyncio.Queue[Event] = asyncio.Queue(WAITING)

    async def receive(self) -> Event:
        """The next event that is this machine's. May be cancelled."""
        return await self._events.get()

    async def send(self, envelope: Envelope) -> None:
        """See :meth:`Link.send`."""
        await self._link.send(envelope)

    async def subscribe(self, *filters: str) -> None:
        """See :meth:`Link.subscribe`."""
        await self._link.subscribe(*filters)

    async def unsubscribe(self, *filters: str) -> None:
        """See :meth:`Link.unsubscribe`."""
        await self._link.unsubscribe(*filters)

    def expire(self) -> None:
        """See :meth:`Link.expire`."""
        self._link.expire()

    async def put(self, event: Event) -> None:
        """Add an event; waits while the branch is full."""
        await self._events.put(event)

    def offer(self, event: Event) -> bool:
        """Add an event; False if the branch is full."""
        try:
            self._events.put_nowait(event)
        except asyncio.QueueFull:
            return False
        return True

    def call(self, run: Callable[[], Sequence[Effect]]) -> bool:
        """Have ``run`` called in the machine's thread; False, and not done, if too much waits."""
        return self.offer(Call(run))


class Branches:
    """Hands what a link receives to the machines it is for.

    ``route`` names the branches of an address, one or several; a message for none is dropped and
    counted, and so is one of QoS 0 that finds a branch full: a machine with too much to do holds up
    the others only for what must not be lost. ``patient`` names those whose senders ask again until
    they are answered: they hold up nobody at all. Changes of the connection are for all.
    """

    def __init__(
        self,
        link: Link,
        names: Collection[str],
        route: Callable[[Address], Collection[str]],
        *,
        patient: Collection[str] = (),
    ) -> None:
        self._link = link
        self._route = route
        self._patient = frozenset(patient)
        self._branches = {name: Branch(link) for name in names}
        self.connected = False
        """Whether there is a connection to the broker."""

    def __getitem__(self, name: str) -> Branch:
        return self._branches[name]

    async def run(self) -> None:
        """Read the link until cancelled."""
        while True:
            event = await self._link.receive()
            if not isinstance(event, Arrival):
                self.connected = isinstance(event, Connected)
                for branch in self._branches.values():
                    await branch.put(event)
                continue
            address = event.envelope.address
            names = [name for name in self._route(address) if name in self._branches]
            if not names:
                self._link.drop("unexpected_topic", address.device, f"nobody takes {address}")
            for name in names:
                if channel(address) not in LOSSY and name not in self._patient:
                    await self._branches[name].put(event)
                elif not self._branches[name].offer(event):
                    self._link.drop("too_busy", address.device, f"{name} has too much to do")
