"""A bare MQTT client asks another one: what any round trip over a broker costs here.

Two processes with paho-mqtt and its own threads, QoS 0, no splitfleet in between.
"""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

from ops.errors import BrokerUnreachable

ASK, ANSWER = "bench/echo/ask", "bench/echo/answer"
WAIT_S = 20.0
_NUMBER = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Echo:
    """``rate`` questions a second at random times, of so many bytes up and down."""

    url: str
    rate: float
    seconds: float
    bytes_up: int
    bytes_down: int


def echo(wanted: Echo) -> list[float]:
    """Seconds of every round trip. Raises :class:`BrokerUnreachable`."""
    command = [sys.executable, "-m", "ops.bench_echo", json.dumps(asdict(wanted))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        try:
            if not other.stdout.readline():
                raise BrokerUnreachable(f"no echo by {wanted.url}; the error is above")
            return _ask(wanted)
        finally:
            other.terminate()


def _ask(wanted: Echo) -> list[float]:
    sent: dict[int, float] = {}
    taken: list[float] = []

    def came(_client: paho.Client, _userdata: Any, message: paho.MQTTMessage) -> None:
        (number,) = _NUMBER.unpack_from(message.payload)
        taken.append(time.perf_counter() - sent[number])

    client = _connect(wanted.url, ANSWER, came)
    when, due = random.Random(0), time.perf_counter()
    end, number = due + wanted.seconds, 0
    filling = bytes(max(0, wanted.bytes_up - _NUMBER.size))
    while due < end:
        due += when.expovariate(wanted.rate)
        time.sleep(max(0.0, due - time.perf_counter()))
        sent[number] = time.perf_counter()
        client.publish(ASK, _NUMBER.pack(number) + filling)
        number += 1
    last = time.perf_counter() + WAIT_S
    while len(taken) < number and time.perf_counter() < last:
        time.sleep(0.01)
    client.disconnect()
    client.loop_stop()
    return taken


def _answer(wanted: Echo) -> None:
    filling = bytes(max(0, wanted.bytes_down - _NUMBER.size))

    def came(client: paho.Client, _userdata: Any, message: paho.MQTTMessage) -> None:
        client.publish(ANSWER, message.payload[: _NUMBER.size] + filling)

    _connect(wanted.url, ASK, came)
    print("ready", flush=True)
    sys.stdin.read()  # until the other end goes


def _connect(
    url: str, topic: str, came: Callable[[paho.Client, Any, paho.MQTTMessage], None]
) -> paho.Client:
    address = urlsplit(url)
    client = paho.Client(CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
    ready = threading.Event()

    def connected(*_: object) -> None:
        client.subscribe(topic)

    def subscribed(*_: object) -> None:
        ready.set()

    client.on_connect, client.on_subscribe = connected, subscribed
    client.on_message = came
    client.connect(address.hostname or "", address.port or 1883)
    client.loop_start()
    if not ready.wait(WAIT_S):
        raise BrokerUnreachable(f"{url} has not let a client subscribe in {WAIT_S:g} s")
    return client


if __name__ == "__main__":
    _answer(Echo(**json.loads(sys.argv[1])))
