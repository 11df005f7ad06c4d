"""The embedded broker: MQTT 5 from a wheel, so that a demo needs nothing but Python.

It is iotcore 0.4 (rumqttd 0.20). Chosen on 2026-11-21 over amqtt 0.12, the other broker that pip
installs. One publisher to one subscriber, 96 KiB at QoS 1, on a machine with 2 cores, the broker on
them too:

    broker               client            MB/s
    iotcore 0.4          our adapter       370 to 510
    iotcore 0.4          bare paho loop    450 to 650
    Mosquitto 2.0.11     our adapter       700 to 800
    Mosquitto 2.0.11     bare paho loop    960 to 1210
    amqtt 0.12           bare paho loop    65 to 77 (MQTT 3.1.1: it has no MQTT 5)

Without MQTT 5 there is no session expiry, no reason code and no Receive Maximum, so amqtt cannot
carry the protocol at all. iotcore passes the core of the transport contract. What it lacks, and how
that is met (all seen here):

- It ignores the client's Receive Maximum and its own max_inflight_count: 100 packets go out. When
  these are all unacknowledged it also stops acknowledging that client's publishes, a deadlock for
  whoever publishes before acknowledging. So our client acknowledges the oldest beyond its limit.
- It cuts a client that acknowledges out of order, and forgets the packets before. Ours does not.
- It ends the session of a connection that started clean. Ours cleans in a connection of its own.
- What waits for a subscription filter is bounded by bytes (64 MiB by default, and as much memory
  once that much has passed); beyond it the oldest is lost silently. Credits must stay below.
- QoS 0 arrives as QoS 1. No limit is announced, no reason is given for a disconnection, and there
  is no access control: it listens on the loopback interface only.

With less than these bounds outstanding nothing was lost or reordered between four devices and a
coordinator on wildcards; retained messages, wills and their delays are as they should be.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from broker.errors import EmbeddedBrokerError, PortTaken
from broker.transport import Features

FEATURES = Features(
    receive_maximum=False, max_packet_size=False, access_control=False, will_delay=True
)

HOST = "127.0.0.1"
START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 5.0
SEGMENT_BYTES = 8 * 1024 * 1024

_CONFIGURATION = """
id = 0
[router]
id = 0
max_connections = 1000
max_outgoing_packet_count = 200
max_segment_size = {segment_bytes}
max_segment_count = {segments}
[v5.fleet]
name = "fleet"
listen = "{host}:{port}"
next_connection_delay_ms = 1
[v5.fleet.connections]
connection_timeout_ms = 60000
max_payload_size = {payload_bytes}
max_inflight_count = 100
dynamic_filters = true
"""


class EmbeddedBroker:
    """Runs the embedded broker on the loopback interface as a child process.

    Usable with `with` and `async with`. Port 0 takes a free one. The child ends with this process,
    whatever ends it. `queue_bytes` bounds what the broker keeps for each subscription filter.
    """

    def __init__(
        self,
        port: int = 0,
        *,
        queue_bytes: int = 64 * 1024 * 1024,
        max_payload_bytes: int = 262_144,
        log_file: Path | None = None,
    ) -> None:
        self.port = port
        self._queue_bytes = queue_bytes
        self._max_payload_bytes = max_payload_bytes
        self._log_file = log_file
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"mqtt://{HOST}:{self.port}"

    @property
    def pid(self) -> int | None:
        """The broker's process id while it runs."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the broker and wait until it listens. Raises PortTaken or EmbeddedBrokerError."""
        assert self._process is None, "the embedded broker runs already"
        self.port = _claim_port(self.port)
        configuration = _CONFIGURATION.format(
            host=HOST,
            port=self.port,
            segment_bytes=SEGMENT_BYTES,
            segments=max(2, self._queue_bytes // SEGMENT_BYTES),
            payload_bytes=self._max_payload_bytes,
        )
        child = Path(__file__).with_name("embedded_child.py")
        with contextlib.ExitStack() as stack:
            log = subprocess.DEVNULL
            if self._log_file is not None:
                log = stack.enter_context(self._log_file.open("ab")).fileno()
            self._process = subprocess.Popen(
                # -P: the folder of the child's file must not become a place to import from.
                [sys.executable, "-P", str(child), str(os.getpid()), configuration],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the fleet, which still needs the broker
            )
        try:
            self._wait_until_listening(self._process)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the broker; does nothing when it does not run."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_TIMEOUT_S)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self.start)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await asyncio.to_thread(self.stop)

    def _wait_until_listening(self, process: subprocess.Popen[bytes]) -> None:
        log = self._log_file or "nowhere; give a log_file to see why"
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            code = process.poll()
            if code is not None:
                raise EmbeddedBrokerError(
                    f"the embedded broker ended at once with exit code {code}; its log is {log}"
                )
            with contextlib.suppress(OSError):
                socket.create_connection((HOST, self.port), timeout=1).close()
                return
            time.sleep(0.02)
        raise EmbeddedBrokerError(
            f"the embedded broker did not listen on port {self.port} within "
            f"{START_TIMEOUT_S:g} s; its log is {log}"
        )


def _claim_port(port: int) -> int:
    with socket.socket() as probe:
        # As the broker does, so that connections of a broker just stopped are no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as exc:
            raise PortTaken(
                f"port {port} of {HOST} cannot be used ({exc}); stop the program that listens "
                "there, or choose another port (0 takes a free one)"
            ) from exc
        claimed: int = probe.getsockname()[1]
        return claimed
