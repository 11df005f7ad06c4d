"""A client's connection to the simulated broker, and how either end finds out that it is over."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ops.simulator.link import LinkProfile, Packet, Pipe
from ops.simulator.world import Event, World

SILENCE = 1.5
"""A connection is given up after so many keep-alives without a sign of life."""
ACK_BYTES = 4


@dataclass(frozen=True, slots=True)
class Subscription:
    """Sent by a client: filters to add and to drop."""

    add: tuple[str, ...]
    drop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Goodbye:
    """Sent by a client that leaves on purpose: its session ends, without its will."""


Item = Packet | Subscription | Goodbye


class Server(Protocol):
    """The broker's end of a connection."""

    world: World
    keepalive_s: float
    frozen: bool

    def next_connection(self) -> int: ...

    def arrived(self, connection: Connection, item: Item) -> None: ...

    def detached(self, connection: Connection, *, clean: bool) -> None: ...

    def pump(self, client: str) -> None: ...


class Connection:
    """One client's connection: a pipe each way, and who still believes in it.

    ``lost`` is called, once, when the client learns that it is over.
    """

    def __init__(
        self,
        broker: Server,
        client: str,
        profile: LinkProfile,
        receive: Callable[[Packet], None],
        lost: Callable[[str], None],
    ) -> None:
        world = broker.world
        rng = world.rng(f"link/{client}/{broker.next_connection()}")
        self.client = client
        self.latency_s = profile.latency_s
        self.up: Pipe[Item] = Pipe(
            world, profile, profile.up_bytes_per_s, rng, lambda item: broker.arrived(self, item)
        )
        self.down: Pipe[Packet] = Pipe(world, profile, profile.down_bytes_per_s, rng, receive)
        self.acks: deque[float] = deque()
        """When the acknowledgements of what the client sent arrive there."""
        self.on_ack: Callable[[], None] | None = None
        """Called when one gets under way, if the client waits for it."""
        self._broker = broker
        self._lost: Callable[[str], None] | None = lost
        self._at_broker = True
        self._silent: dict[str, None] = {}
        self._silent_since = math.inf
        self._timeout: Event | None = None

    @property
    def cut_off(self) -> float:
        """Signs of life sent after this time do not arrive; infinite while all is well."""
        return self._silent_since

    def partition(self) -> None:
        """Nothing gets through any more, either way; both ends will notice in time."""
        self.up.hold()
        self.down.hold()
        self.silence("partition")

    def heal(self) -> None:
        """Everything gets through again; what TCP held back comes at once."""
        self.sign_of_life("partition")
        self.up.release()
        self.down.release()

    def silence(self, cause: str) -> None:
        """One end is not heard any more: after a while the other gives the connection up."""
        self._silent[cause] = None
        if self._timeout is None:
            world = self._broker.world
            self._silent_since = world.now
            self._timeout = world.after(SILENCE * self._broker.keepalive_s, self._give_up)

    def sign_of_life(self, cause: str) -> None:
        """What was the cause of silence is over."""
        self._silent.pop(cause, None)
        if self._silent or self._timeout is None:
            return
        self._silent_since = math.inf
        self._timeout.cancel()
        self._timeout = None
        self._broker.pump(self.client)

    def end(self, reason: str) -> None:
        """The connection breaks: the client learns of it, and the broker if it can."""
        lost, self._lost = self._lost, None
        self.down.close()
        if lost is not None:
            lost(reason)
        self.end_at_broker()

    def end_at_broker(self, *, clean: bool = False) -> None:
        """The broker learns that the connection is over, unless nothing reaches it."""
        if self._at_broker and "partition" not in self._silent and not self._broker.frozen:
            self._at_broker = False
            self.up.close()
            if self._timeout is not None:
                self._timeout.cancel()
            self._broker.detached(self, clean=clean)

    def leave(self) -> None:
        """The client says goodbye and hears nothing more."""
        self._lost = None
        self.down.close()
        self.up.send(ACK_BYTES, Goodbye())

    def abandon(self, *, seen: bool) -> None:
        """The client is gone; the broker sees that at once, or has to find out."""
        self._lost = None
        self.down.close()
        if seen:
            self.end_at_broker()
        if self._at_broker:
            self.silence("gone")

    @property
    def over(self) -> bool:
        """Whether the client knows that it is."""
        return self._lost is None

    def _give_up(self) -> None:
        self._silent.pop("partition", None)
        self.end("no answer for too long")
