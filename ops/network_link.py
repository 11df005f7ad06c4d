"""Two network namespaces with a slow link between them, for measurements on one machine.

The link is what ``tc qdisc add … netem delay D rate R limit N`` on both ends makes of one. It is
done here, packet by packet, because many kernels are built without netem, those of small virtual
machines among them. Each end is a TUN device: what one sends waits for its turn at the rate and
arrives the delay later at the other, so that TCP between them finds a real network. It takes Linux
and root.

::

    with NetworkLink(delay_s=0.02, bits_per_s=10e6) as link:
        subprocess.Popen([*link.near.command, "some-server", "--listen", link.near.address])
        subprocess.Popen([*link.far.command, "some-client", "--connect", link.near.address])
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import select
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from ops.errors import OpsError

PREFIX = "192.0.2."
"""Addresses for documentation (RFC 5737): nobody has them, and nobody else sees them."""
QUEUE_PACKETS = 1000
"""Netem's own limit of packets that wait or are under way in one direction."""
START_S = 10.0
_TUN = Path("/dev/net/tun")
_PROGRAMS = ("ip", "nsenter", "unshare")
_MOST_BYTES = 65_536
_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_HOLD = (
    "echo 1 2>/dev/null >/proc/sys/net/ipv6/conf/default/disable_ipv6; "
    "ip link set lo up && echo ready && exec cat"
)
"""Keeps a namespace until its standard input ends; without IPv6 nobody speaks unasked."""


class OneWay:
    """One direction of a link: when each packet arrives, by netem's rules. Times in seconds."""

    def __init__(
        self, *, delay_s: float, bits_per_s: float, queue_packets: int = QUEUE_PACKETS
    ) -> None:
        self._delay_s = delay_s
        self._bits_per_s = bits_per_s
        self._queue_packets = queue_packets
        self._under_way: deque[tuple[float, bytes]] = deque()
        self._sent = -math.inf
        self.bytes = 0
        """Of all packets that were let in."""
        self.dropped = 0
        """Packets that found the queue full."""

    def enter(self, packet: bytes, now: float) -> None:
        """A packet is to be sent."""
        if len(self._under_way) >= self._queue_packets:
            self.dropped += 1
            return
        self._sent = max(now, self._sent) + 8 * len(packet) / self._bits_per_s
        self._under_way.append((self._sent + self._delay_s, packet))
        self.bytes += len(packet)

    @property
    def due(self) -> float | None:
        """When the next packet arrives."""
        return self._under_way[0][0] if self._under_way else None

    def arrived(self, now: float) -> list[bytes]:
        """The packets that have arrived by now, in order."""
        packets = []
        while self._under_way and self._under_way[0][0] <= now:
            packets.append(self._under_way.popleft()[1])
        return packets


@dataclass(frozen=True, slots=True)
class End:
    """``command`` before another runs that one at this end, where ``interface`` has ``address``."""

    command: tuple[str, ...]
    interface: str
    address: str


class NetworkLink:
    """Both ends and the link between them, as long as the context lasts.

    ``delay_s`` is one way, so that a round trip takes twice as long; ``bits_per_s`` holds for each
    direction, of IP packets. Processes at an end have to be ended before the context is left.
    """

    def __init__(
        self, *, delay_s: float, bits_per_s: float, queue_packets: int = QUEUE_PACKETS
    ) -> None:
        self._ways = [
            OneWay(delay_s=delay_s, bits_per_s=bits_per_s, queue_packets=queue_packets)
            for _ in range(2)
        ]
        self._stack = contextlib.ExitStack()
        self.near: End
        self.far: End

    @property
    def dropped(self) -> int:
        """Packets that found a queue full, in both directions."""
        return sum(way.dropped for way in self._ways)

    def __enter__(self) -> Self:
        """Raises :class:`OpsError` where such a link cannot be made, saying what is missing."""
        require_links()
        with contextlib.ExitStack() as stack:
            ends, devices = [], []
            for number in (1, 2):
                device, interface = _open_tun()
                stack.callback(os.close, device)
                keeper = stack.enter_context(_namespace())
                _run("ip", "link", "set", interface, "netns", str(keeper.pid))
                end = End(
                    ("nsenter", f"--net=/proc/{keeper.pid}/ns/net", "--"),
                    interface,
                    f"{PREFIX}{number}",
                )
                address = ("ip", "address", "add", f"{end.address}/30", "dev", interface)
                _run(*end.command, *address)
                _run(*end.command, "ip", "link", "set", interface, "up")
                ends.append(end)
                devices.append(device)
            self.near, self.far = ends
            reader, writer = os.pipe()
            thread = threading.Thread(target=self._carry, args=(devices, reader), name="link")
            stack.callback(os.close, reader)
            stack.callback(thread.join)
            stack.callback(os.close, writer)  # which ends the thread
            thread.start()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _carry(self, devices: Sequence[int], end: int) -> None:
        """From each device to the other, until the other side of ``end`` is closed."""
        ways = {devices[0]: (self._ways[0], devices[1]), devices[1]: (self._ways[1], devices[0])}
        while True:
            now = time.monotonic()
            for way, to in ways.values():
                for packet in way.arrived(now):
                    with contextlib.suppress(OSError):  # it takes no more: a packet is lost
                        os.write(to, packet)
            times = [way.due for way, _ in ways.values() if way.due is not None]
            wait = max(0.0, min(times) - time.monotonic()) if times else None
            ready, _, _ = select.select([*devices, end], [], [], wait)
            if end in ready:
                return
            now = time.monotonic()
            for device in ready:
                with contextlib.suppress(BlockingIOError):
                    while True:
                        ways[device][0].enter(os.read(device, _MOST_BYTES), now)


def require_links() -> None:
    """Raises :class:`OpsError` where no link can be made, saying what is missing."""
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    if not sys.platform.startswith("linux"):
        reason = f"it is made of Linux' network namespaces, and this is {sys.platform}"
    elif os.geteuid() != 0:
        reason = "only root may make network namespaces: run this as root"
    elif missing:
        reason = f"{missing[0]} is not installed: install iproute2 and util-linux"
    elif not os.access(_TUN, os.R_OK | os.W_OK):
        reason = f"{_TUN} is not there or may not be used: load the module tun"
    else:
        return
    raise OpsError(f"no slow link can be made here: {reason}")


def _open_tun() -> tuple[int, str]:
    """A new TUN device in this namespace: its file, not blocking, and its name."""
    device = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        wanted = struct.pack("16sH22x", b"slow%d", _IFF_TUN | _IFF_NO_PI)
        made = fcntl.ioctl(device, _TUNSETIFF, wanted)
    except OSError as exc:
        os.close(device)
        raise OpsError(f"no network device can be made ({exc.strerror}): are you root?") from exc
    return device, made[:16].rstrip(b"\0").decode()


@contextlib.contextmanager
def _namespace() -> Iterator[subprocess.Popen[bytes]]:
    """A process that keeps a network namespace; it ends with this one, however that ends."""
    keeper = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", _HOLD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    with keeper:  # closes its standard input at the end, and waits
        assert keeper.stdout is not None
        ready, _, _ = select.select([keeper.stdout], [], [], START_S)
        if not ready or keeper.stdout.readline() != b"ready\n":
            keeper.kill()
            assert keeper.stderr is not None
            said = keeper.stderr.read().decode("utf-8", "replace").strip()
            raise OpsError(f"no network namespace can be made: {said or 'unshare did not answer'}")
        yield keeper


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=START_S, check=False)
    if done.returncode:
        raise OpsError(f"{' '.join(command)} failed: {done.stderr.strip()}")
