"""How a process comes to a connection: it tries, and after a failure waits ever longer."""

from __future__ import annotations

import random
from collections.abc import Callable

from broker.config import BrokerConfig
from broker.transport import Backoff
from ops.simulator.broker import Broker
from ops.simulator.link import LinkProfile
from ops.simulator.world import Event as Due
from ops.simulator.world import World

CONFIG = BrokerConfig()
HANDSHAKE_TRIPS = 2
"""Round trips until a connection is up: TCP, then MQTT."""


class Dialer:
    """Dials the broker in one life of a process, which is told how that went.

    After ``refused``, as after the loss of a connection, it dials again when :meth:`back_off` is
    called. ``cut_off`` says whether the network has failed. A frozen process is given what is to be
    done then by ``is_frozen``, to do it later.
    """

    def __init__(
        self,
        world: World,
        broker: Broker,
        profile: LinkProfile,
        rng: random.Random,
        *,
        cut_off: Callable[[], bool],
        is_frozen: Callable[[Callable[[], None]], bool],
        connected: Callable[[], None],
        refused: Callable[[], None],
    ) -> None:
        self._world = world
        self._broker = broker
        self._profile = profile
        self._backoff = Backoff(CONFIG.backoff_initial_s, CONFIG.backoff_max_s, rng)
        self._cut_off = cut_off
        self._is_frozen = is_frozen
        self._connected = connected
        self._refused = refused
        self._due: Due | None = None

    def start(self) -> None:
        """Dial for the first time."""
        self._due = self._world.after(0.0, self._dial)

    def back_off(self) -> None:
        """Dial again, a while after a failure."""
        self._due = self._world.after(self._backoff.next(), self._dial)

    def stop(self) -> None:
        """Dial no more."""
        if self._due is not None:
            self._due.cancel()
        self._due = None

    def _dial(self) -> None:
        if self._is_frozen(self._dial):
            return
        trip = 2 * self._profile.latency_s
        if self._cut_off() or self._broker.frozen:
            self._due = self._world.after(CONFIG.connect_timeout_s, self._fail)
        elif not self._broker.alive:
            self._due = self._world.after(trip, self._fail)
        else:
            self._due = self._world.after(HANDSHAKE_TRIPS * trip, self._succeed)

    def _fail(self) -> None:
        if self._is_frozen(self._fail):
            return
        self._refused()

    def _succeed(self) -> None:
        if self._is_frozen(self._succeed):
            return
        if self._cut_off() or self._broker.frozen or not self._broker.alive:
            self._dial()
            return
        self._due = None
        self._backoff.reset()
        self._connected()
