"""An MQTT 5 client that sends what ours would not: more and larger than the broker wants."""

from __future__ import annotations

import queue
import time
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from broker.config import BrokerConfig
from broker.mosquitto import BrokerLimits

LIMIT_S = 60.0
QUIET_S = 2.0


class RawClient:
    """paho's client over mutual TLS, connected; its session outlives the connection."""

    def __init__(self, config: BrokerConfig, *, keepalive_s: int = 60) -> None:
        self.received: list[bytes] = []
        self.granted_keepalive_s: int | None = None
        self._arrived: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._ended: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._published: list[paho.MQTTMessageInfo] = []
        self._client = paho.Client(
            CallbackAPIVersion.VERSION2, "raw", protocol=paho.MQTTv5, reconnect_on_failure=False
        )
        self._client.max_inflight_messages_set(BrokerLimits().inflight_messages)
        self._client.tls_set(str(config.ca_file), str(config.cert_file), str(config.key_file))
        self._client.on_connect = self._on_connect
        self._client.on_subscribe = lambda *_: self._answers.put(None)
        self._client.on_message = lambda *given: self._arrived.put(bytes(given[2].payload))
        self._client.on_disconnect = lambda *given: self._ended.put(str(given[3]))
        lasting = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        lasting.SessionExpiryInterval = 3600
        self._client.connect(
            config.host, config.port, keepalive_s, clean_start=False, properties=lasting
        )
        self._client.loop_start()
        self._answers.get(timeout=LIMIT_S)

    def subscribe(self, topic_filter: str) -> None:
        self._client.subscribe(topic_filter, 1)
        self._answers.get(timeout=LIMIT_S)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, **beside: Any) -> None:
        """Without waiting for the answer; ``beside`` are MQTT 5 properties."""
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        for name, value in beside.items():
            setattr(properties, name, value)
        self._published.append(self._client.publish(topic, payload, 1, retain, properties))

    def wait_published(self) -> None:
        """Until the broker has acknowledged everything, or has had enough."""
        deadline = time.monotonic() + LIMIT_S
        while self._ended.empty() and not all(info.is_published() for info in self._published):
            assert time.monotonic() < deadline, "neither acknowledged nor cut off"
            time.sleep(0.01)

    def wait_ended(self) -> str:
        """Until the connection has ended; why."""
        return self._ended.get(timeout=LIMIT_S)

    def wait_quiet(self) -> None:
        """Until nothing has arrived for a while."""
        try:
            while True:
                self.received.append(self._arrived.get(timeout=QUIET_S))
        except queue.Empty:
            return

    def wait_for(self, payload: bytes) -> None:
        deadline = time.monotonic() + LIMIT_S
        while payload not in self.received:
            left = max(0.0, deadline - time.monotonic())
            self.received.append(self._arrived.get(timeout=left))

    def lose_connection(self) -> None:
        """Go without a word, as the network does it."""
        sock = self._client.socket()
        assert sock is not None
        self._client.loop_stop()
        sock.close()

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _on_connect(self, _client: Any, _data: Any, _flags: Any, _code: Any, said: Any) -> None:
        self.granted_keepalive_s = getattr(said, "ServerKeepAlive", None)
        self._answers.put(None)
