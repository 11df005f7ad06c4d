from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import Any

import pytest

from ops import network_link
from ops.errors import OpsError
from ops.network_link import End, NetworkLink, OneWay, require_links


def missing() -> str:
    """Why there can be no link here; empty if there can."""
    try:
        require_links()
    except OpsError as exc:
        return str(exc)
    return ""


needs_links = pytest.mark.skipif(bool(missing()), reason=missing())

SERVER = """
import socket, sys
server = socket.create_server((sys.argv[1], 0))
print(server.getsockname()[1], flush=True)
peer, _ = server.accept()
received = b""
while len(received) < 200_000:
    received += peer.recv(65536)
peer.sendall(received[::-1])
peer.close()
"""
CLIENT = """
import os, socket, sys
sent, received = os.urandom(200_000), b""
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as peer:
    peer.sendall(sent)
    while part := peer.recv(65536):
        received += part
assert received == sent[::-1], len(received)
"""


# -- one direction --------------------------------------------------------------------------------


def test_a_packet_takes_its_time_at_the_rate_and_then_the_delay() -> None:
    way = OneWay(delay_s=0.5, bits_per_s=8000)
    assert way.due is None
    way.enter(b"x" * 1000, 10.0)
    assert way.due == 11.5
    assert way.arrived(11.49) == []
    assert way.arrived(11.5) == [b"x" * 1000]
    assert way.due is None


def test_packets_wait_for_those_before_them_and_arrive_in_order() -> None:
    way = OneWay(delay_s=0.5, bits_per_s=8000)
    way.enter(b"a" * 1000, 10.0)
    way.enter(b"b" * 500, 10.1)
    way.enter(b"c" * 500, 20.0)
    assert way.arrived(11.5) == [b"a" * 1000]
    assert way.due == 12.0
    assert way.arrived(19.0) == [b"b" * 500]
    assert way.due == 21.0, "the link was idle: nothing to wait for"
    assert way.bytes == 2000


def test_a_packet_that_finds_the_queue_full_is_lost_and_counted() -> None:
    way = OneWay(delay_s=1.0, bits_per_s=8000, queue_packets=2)
    for part in (b"a", b"b", b"c"):
        way.enter(part, 0.0)
    assert way.dropped == 1
    assert way.bytes == 2
    assert way.arrived(100.0) == [b"a", b"b"]
    way.enter(b"d", 100.0)
    assert way.arrived(200.0) == [b"d"]


# -- both ends ------------------------------------------------------------------------------------


def start(end: End, program: str, *arguments: str, **more: Any) -> subprocess.Popen[str]:
    command = [*end.command, sys.executable, "-c", program, *arguments]
    return subprocess.Popen(command, text=True, **more)


@needs_links
def test_what_one_end_sends_the_other_receives_and_nobody_else_is_there() -> None:
    with NetworkLink(delay_s=0.001, bits_per_s=100e6) as link:
        with start(link.near, SERVER, link.near.address, stdout=subprocess.PIPE) as server:
            assert server.stdout is not None
            port = server.stdout.readline().strip()
            with start(link.far, CLIENT, link.near.address, port) as client:
                assert client.wait(100) == 0
            assert server.wait(100) == 0
        assert link.dropped == 0
        shown = subprocess.run(
            [*link.far.command, "cat", "/proc/net/dev"], capture_output=True, text=True, check=True
        )
        names = {line.split(":")[0].strip() for line in shown.stdout.splitlines() if ":" in line}
        assert names == {"lo", link.far.interface}
    with NetworkLink(delay_s=0.001, bits_per_s=100e6):
        pass  # nothing of the last one is left


@needs_links
def test_two_links_do_not_get_in_each_others_way() -> None:
    with (
        NetworkLink(delay_s=0.001, bits_per_s=100e6) as one,
        NetworkLink(delay_s=0.001, bits_per_s=100e6) as other,
    ):
        assert one.near.command != other.near.command


# -- where there can be none ----------------------------------------------------------------------


def test_without_root_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(OpsError, match="as root"), NetworkLink(delay_s=0.1, bits_per_s=1e6):
        pass


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda program: None if program == "ip" else program)
    with pytest.raises(OpsError, match="ip is not installed"):
        require_links()


def test_elsewhere_than_on_linux_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(OpsError, match="Linux"):
        require_links()


@needs_links
def test_a_namespace_that_cannot_be_made_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_link, "_HOLD", "echo no such luck >&2; exit 1")
    with pytest.raises(OpsError, match="no such luck"), NetworkLink(delay_s=0.1, bits_per_s=1e6):
        pass
