from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest

from edge_agent.systemd import KeepAlive, Nobody, Systemd, supervisor


class Manager:
    """Systemd's end of the socket."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        self.socket.setblocking(False)

    def heard(self) -> list[str]:
        heard = []
        while True:
            try:
                heard.append(self.socket.recv(4096).decode())
            except BlockingIOError:
                return heard


class Told:
    """A supervisor that remembers."""

    def __init__(self, watchdog_s: float | None = 0.08) -> None:
        self.watchdog_s = watchdog_s
        self.told: list[str] = []
        self.ready = lambda: self.told.append("ready")
        self.alive = lambda: self.told.append("alive")
        self.stopping = lambda: self.told.append("stopping")


def test_systemd_is_told_on_its_socket(tmp_path: Path) -> None:
    manager = Manager(str(tmp_path / "notify"))
    with manager.socket:
        found = supervisor({"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "90000000"})
        assert found.watchdog_s == 90.0
        found.ready()
        found.alive()
        found.stopping()
        assert manager.heard() == ["READY=1", "WATCHDOG=1", "STOPPING=1"]


@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="abstract names are Linux's")  # noqa: PTH110
def test_a_socket_may_have_an_abstract_name() -> None:
    name = f"splitfleet-test-{os.getpid()}"
    manager = Manager(f"\0{name}")
    with manager.socket:
        Systemd(f"@{name}").ready()
        assert manager.heard() == ["READY=1"]


def test_a_manager_that_is_gone_is_no_error(tmp_path: Path) -> None:
    Systemd(str(tmp_path / "nothing")).alive()


@pytest.mark.parametrize(
    ("environ", "watchdog_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": str(os.getpid())}, 1.0),
    ],
)
def test_whom_the_watchdog_watches(environ: dict[str, str], watchdog_s: float | None) -> None:
    assert supervisor({"NOTIFY_SOCKET": "/run/notify", **environ}).watchdog_s == watchdog_s


def test_without_systemd_nobody_watches() -> None:
    assert isinstance(supervisor({"NOTIFY_SOCKET": "vsock:2:1"}), Nobody)
    assert isinstance(supervisor({}), Nobody)


def test_it_lives_while_all_its_threads_turn() -> None:
    told = Told()
    keep_alive = KeepAlive(told)
    training, answering = keep_alive.of("training"), keep_alive.of("answering")
    keep_alive.pass_on()
    assert told.told == ["alive"], "they have just begun"
    training()
    keep_alive.pass_on()
    assert told.told == ["alive"], "one of them is stuck"
    answering()
    keep_alive.pass_on()
    assert told.told == ["alive", "alive"]
    answering()
    keep_alive.pass_on()
    assert told.told == ["alive", "alive"], "every time each must have turned anew"


async def test_it_is_passed_on_again_and_again() -> None:
    told = Told(0.008)
    keep_alive = KeepAlive(told)
    turned = keep_alive.of("training")
    running = asyncio.create_task(keep_alive.run())
    for count in range(1, 4):
        while len(told.told) < count:  # noqa: ASYNC110 it is told by no event
            await asyncio.sleep(0.001)
        turned()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_nobody_is_told_who_does_not_watch() -> None:
    told = Told(None)
    await KeepAlive(told).run()
    assert told.told == []
