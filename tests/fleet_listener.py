"""Somebody who hears everything that is said in a fleet, so that tests can wait for it."""

from __future__ import annotations

import threading
import time
from collections import Counter
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

from broker.envelopes import decode_message
from broker.errors import MessageError
from broker.fields import Message
from broker.frames import Limits, Reassembler
from broker.messages import Coordinator, Status
from broker.topics import Topics
from broker.training_messages import Activations, Report, Round

CONNECT_TIMEOUT_S = 60.0


class Listener:
    """Connects again by itself. What is said while the broker is gone it does not hear."""

    def __init__(self, url: str, fleet: str) -> None:
        address = urlsplit(url)
        assert address.hostname is not None
        assert address.port is not None
        self._host, self._port = address.hostname, address.port
        self._topics = Topics(fleet)
        self._frames = Reassembler(Limits())
        self._subscribed = threading.Event()
        self._client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id="monitor", protocol=paho.MQTTv5
        )
        self._client.reconnect_delay_set(1, 1)
        self._client.on_connect = self._on_connect
        self._client.on_subscribe = lambda *_: self._subscribed.set()
        self._client.on_message = self._on_message
        self.batches: Counter[tuple[str, int]] = Counter()
        """(device, round) → activations heard."""
        self.last_batch: dict[str, Activations] = {}
        self.reports: list[tuple[str, Report]] = []
        self.status: dict[str, Status] = {}
        self.round: Round | None = None
        self.coordinator: Coordinator | None = None

    def publish(self, topic: str, payload: bytes) -> None:
        """Say something oneself."""
        self._client.publish(topic, payload, qos=1)

    def state_of(self, device: str) -> str | None:
        """``online`` or ``offline``, as the broker has it."""
        status = self.status.get(device)
        return None if status is None else status.state

    def _on_connect(self, *_: object) -> None:
        self._client.subscribe(f"splitfleet/{self._topics.fleet}/#", qos=1)

    def _on_message(self, _client: paho.Client, _data: Any, packet: paho.MQTTMessage) -> None:
        address = self._topics.parse(packet.topic)
        try:
            whole = self._frames.add("", packet.topic, packet.payload, time.monotonic())
            if whole is not None:
                self._note(address.device or "", decode_message(address, whole))
        except MessageError:
            pass  # tests publish rubbish

    def _note(self, device: str, message: Message) -> None:
        match message:
            case Activations():
                self.last_batch[device] = message
                self.batches[device, message.round] += 1
            case Report():
                self.reports.append((device, message))
            case Status():
                self.status[device] = message
            case Round():
                self.round = message
            case Coordinator():
                self.coordinator = message

    def __enter__(self) -> Self:
        self._client.connect(self._host, self._port)
        self._client.loop_start()
        assert self._subscribed.wait(CONNECT_TIMEOUT_S), "the listener could not subscribe"
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._client.disconnect()
        self._client.loop_stop()
