"""What systemd is told of this service (sd_notify(3)), so that it restarts one that is stuck."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Mapping
from typing import Protocol


class Supervisor(Protocol):
    """Whoever started this process and watches it."""

    @property
    def watchdog_s(self) -> float | None:
        """How long it waits for :meth:`alive` before it ends the process; None: for ever."""
        ...

    def ready(self) -> None:
        """The service has started."""
        ...

    def alive(self) -> None:
        """The service is not stuck."""
        ...

    def stopping(self) -> None:
        """The service is about to end; it is not watched any more."""
        ...


class Nobody:
    """Nobody watches."""

    watchdog_s: float | None = None

    def ready(self) -> None:
        """Nobody asks."""

    alive = stopping = ready


class Systemd:
    """The manager that started this process as a service of ``Type=notify``.

    ``address`` is a socket's path, or ``@`` and a name in the abstract namespace. What it does not
    take is lost: systemd then finds that nothing comes, which is what it watches for.
    """

    def __init__(self, address: str, watchdog_s: float | None = None) -> None:
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self.watchdog_s = watchdog_s

    def ready(self) -> None:
        """The service has started."""
        self._tell("READY=1")

    def alive(self) -> None:
        """The service is not stuck."""
        self._tell("WATCHDOG=1")

    def stopping(self) -> None:
        """The service is about to end."""
        self._tell("STOPPING=1")

    def _tell(self, message: str) -> None:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as pipe:
            pipe.settimeout(0)
            pipe.sendto(message.encode(), self._address)


def supervisor(environ: Mapping[str, str] | None = None) -> Supervisor:
    """Who watches this process, by its environment variables."""
    environ = os.environ if environ is None else environ
    address = environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return Nobody()
    watched = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    microseconds = environ.get("WATCHDOG_USEC", "")
    if not watched or not microseconds.isdecimal() or int(microseconds) == 0:
        return Systemd(address)
    return Systemd(address, int(microseconds) / 1e6)


class KeepAlive:
    """Says that the service lives as long as all its threads turn, and its event loop with them.

    It hears of the threads what :meth:`of` is called for; the event loop passes it on, and only if
    every one of them has turned since it did so last.
    """

    def __init__(self, supervisor: Supervisor) -> None:
        self._turned: dict[str, bool] = {}
        self._supervisor = supervisor

    def of(self, machine: str) -> Callable[[], None]:
        """What the thread of ``machine``, watched from now on, has to call whenever it turns."""
        self._turned[machine] = True

        def turned() -> None:
            self._turned[machine] = True

        return turned

    def pass_on(self) -> None:
        """Tell the supervisor, if all of them did."""
        if all(self._turned.values()):
            for machine in self._turned:
                self._turned[machine] = False
            self._supervisor.alive()

    async def run(self) -> None:
        """Pass it on until cancelled, several times in the time that the supervisor waits."""
        if self._supervisor.watchdog_s is None:
            return
        while True:
            self.pass_on()
            await asyncio.sleep(self._supervisor.watchdog_s / 8)
