from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from broker.config import BrokerConfig
from broker.embedded import EmbeddedBroker
from broker.errors import EmbeddedBrokerError, PortTaken
from broker.mqtt import MqttTransport
from broker.transport import Connected, Packet

PARENT = """
import os, signal, sys, time
from broker.embedded import EmbeddedBroker
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
broker = EmbeddedBroker()
broker.start()
print(broker.pid, broker.port, flush=True)
time.sleep(600)
"""


def listens(port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
        return True
    return False


def wait_until_gone(port: int) -> bool:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if not listens(port):
            return True
        time.sleep(0.05)
    return False


def test_it_listens_until_it_is_stopped() -> None:
    with EmbeddedBroker() as broker:
        assert broker.url == f"mqtt://127.0.0.1:{broker.port}"
        assert listens(broker.port)
    assert not listens(broker.port)
    broker.stop()  # a second time is no error


def test_it_can_be_started_again_on_its_port() -> None:
    broker = EmbeddedBroker()
    for _ in range(2):
        with broker:
            assert listens(broker.port)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_it_ends_with_its_parent_however_that_ends(how: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL
    ) as parent:
        assert parent.stdout is not None
        _, port = map(int, parent.stdout.readline().split())
        assert listens(port)
        parent.send_signal(how)
        parent.wait(60)
    assert wait_until_gone(port)


def test_ctrl_c_in_the_terminal_does_not_reach_it() -> None:
    with EmbeddedBroker() as broker:
        assert broker.pid is not None
        assert os.getpgid(broker.pid) != os.getpgid(0)


def test_a_taken_port_is_named() -> None:
    with EmbeddedBroker() as first, pytest.raises(PortTaken, match=str(first.port)):
        EmbeddedBroker(first.port).start()


def test_a_port_out_of_range_is_named() -> None:
    with pytest.raises(PortTaken, match="70000"):
        EmbeddedBroker(70_000).start()


def test_a_broker_that_cannot_start_says_where_its_log_is(tmp_path: Path) -> None:
    log = tmp_path / "broker.log"
    broker = EmbeddedBroker(max_payload_bytes=-1, log_file=log)
    with pytest.raises(EmbeddedBrokerError, match=r"broker\.log"):
        broker.start()
    assert log.stat().st_size > 0
    assert broker.pid is None


async def test_it_keeps_order_and_loses_nothing_within_its_bound() -> None:
    count = 400  # of 96 KiB: 39 MB of the 64 MiB
    async with EmbeddedBroker() as broker:
        config = BrokerConfig(url=broker.url)
        async with MqttTransport(config, "a") as a, MqttTransport(config, "b") as b:
            await a.subscribe("t/#")
            assert isinstance(await a.receive(), Connected)
            assert isinstance(await b.receive(), Connected)
            for i in range(count):
                await b.publish("t/x", i.to_bytes(2, "big") + bytes(98_000), qos=1)
            for i in range(count):
                packet = await asyncio.wait_for(a.receive(), 60)
                assert isinstance(packet, Packet)
                assert int.from_bytes(packet.payload[:2], "big") == i
                packet.ack()
