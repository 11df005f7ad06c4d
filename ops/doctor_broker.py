"""The doctor's checks of a broker: can it be reached, does it speak MQTT 5, does it carry a fleet.

A broker of a fleet ties the client id to the certificate's name (or the user name), and so a doctor
would throw out a running client of the same name: give it the identity of one that does not run.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections.abc import AsyncIterator

from broker.config import BrokerConfig
from broker.errors import (
    ConnectRefused,
    PacketTooLarge,
    PublishRefused,
    SubscribeRefused,
    TransportError,
)
from broker.mqtt import MqttTransport
from broker.topics import ROOT
from broker.transport import Connected, Disconnected, Packet, Transport, packet_size
from ops.doctor_tls import check_certificate, check_tls
from ops.finding import Finding

PACKET_BYTES = 131_072
"""The largest whole packet that a fleet sends."""
WAIT_S = 5.0
UNSUPPORTED_VERSION = 0x84

_CREDENTIALS = (
    "show a certificate of this fleet that has not ended and is not revoked (cert_file and "
    "key_file, or identity_dir of an agent; splitfleet fleet list), or where the broker has "
    "passwords the right one"
)
_REFUSED = (
    "access rules forbid it to this client, as they should to a device's: "
    "check again with the coordinator's settings, while it does not run"
)


async def examine_broker(config: BrokerConfig, *, fleet: str) -> list[Finding]:
    """Check the broker; what a failure makes pointless is left out.

    Messages go to a topic of the fleet's tree that nobody listens to; the retained one is cleared.
    """
    config = config.model_copy(
        update={
            "connect_timeout_s": min(config.connect_timeout_s, WAIT_S),
            "publish_timeout_s": min(config.publish_timeout_s, WAIT_S),
            "max_packet_size": max(config.max_packet_size, PACKET_BYTES),
        }
    )
    reachable = await _check_reachable(config)
    if reachable.state == "failed":
        return [reachable]
    findings = [reachable]
    if config.tls:
        findings.append(await check_tls(config))
        if config.cert_file is not None:
            findings.append(check_certificate(config.cert_file))
        if findings[1].state == "failed":
            return findings
    transport = MqttTransport(config, config.username or f"doctor-{secrets.token_hex(4)}")
    async with transport:
        connection = await _connect(transport, config)
        if isinstance(connection, Finding):
            return [*findings, connection]
        announced = connection.capabilities.max_packet_size
        base = f"{ROOT}/{fleet}/doctor/{secrets.token_hex(8)}"
        return [
            *findings,
            Finding("MQTT 5", "ok", f"spoken by {config.url}"),
            await _check_packet_size(transport, f"{base}/packet", announced),
            await _check_retained(transport, f"{base}/retained"),
        ]


async def _check_reachable(config: BrokerConfig) -> Finding:
    where = f"{config.host}:{config.port}"
    try:
        async with asyncio.timeout(config.connect_timeout_s):
            _, writer = await asyncio.open_connection(config.host, config.port)
    except (OSError, TimeoutError) as exc:
        why = f"no answer within {config.connect_timeout_s:g} s" if _is_silence(exc) else str(exc)
        return Finding(
            "broker",
            "failed",
            f"{where} cannot be reached: {why}",
            "start the broker, and check host, port and firewall "
            "(splitfleet broker runs the embedded one)",
        )
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return Finding("broker", "ok", f"{where} accepts connections")


async def _connect(transport: Transport, config: BrokerConfig) -> Connected | Finding:
    reason = f"{config.url} took the connection but did not answer"
    try:
        async with asyncio.timeout(2 * config.connect_timeout_s):
            while True:
                event = await transport.receive()
                if isinstance(event, Connected):
                    return event
                if isinstance(event, Disconnected):
                    reason = event.reason
                    break
    except TimeoutError:
        pass
    except ConnectRefused as exc:
        if exc.reason_code != UNSUPPORTED_VERSION:
            return Finding("MQTT 5", "failed", str(exc), _CREDENTIALS)
        reason = str(exc)
    if config.tls:
        return Finding("MQTT 5", "failed", reason, _CREDENTIALS)
    return Finding(
        "MQTT 5",
        "failed",
        reason,
        "use a broker with MQTT 5, such as Mosquitto 1.6 or newer; for TLS give mqtts://",
    )


async def _check_packet_size(transport: Transport, topic: str, announced: int | None) -> Finding:
    name = "packet size"
    payload = os.urandom(PACKET_BYTES - packet_size(topic, b"", 1) - 2)
    size = packet_size(topic, payload, 1)
    advice = f"let the broker accept packets of {PACKET_BYTES} bytes (Mosquitto: max_packet_size)"
    try:
        async with _listening(transport, topic):
            await transport.publish(topic, payload, qos=1)
            received = await _next_packet(transport, topic)
    except (PublishRefused, SubscribeRefused) as exc:
        said = "no limit" if announced is None else f"{announced} bytes"
        return Finding(name, "warning", f"{exc}; the broker announces {said}", _REFUSED)
    except PacketTooLarge as exc:
        return Finding(name, "failed", f"at most {exc.limit} bytes are accepted", advice)
    except (TransportError, TimeoutError) as exc:
        return Finding(name, "failed", f"a packet of {size} bytes is lost: {_why(exc)}", advice)
    if received.payload != payload:
        return Finding(name, "failed", f"a packet of {size} bytes came back changed", advice)
    return Finding(name, "ok", f"a packet of {size} bytes went there and back")


async def _check_retained(transport: Transport, topic: str) -> Finding:
    name = "retained message"
    payload = secrets.token_bytes(16)
    advice = "let the broker keep retained messages (Mosquitto: retain_available true)"
    try:
        await transport.publish(topic, payload, qos=1, retain=True)
        try:
            async with _listening(transport, topic):
                received = await _next_packet(transport, topic)
        finally:
            await transport.publish(topic, b"", qos=1, retain=True)
    except (PublishRefused, SubscribeRefused) as exc:
        return Finding(name, "warning", str(exc), _REFUSED)
    except (TransportError, TimeoutError) as exc:
        return Finding(name, "failed", f"it is not delivered: {_why(exc)}", advice)
    if received.payload != payload or not received.retain:
        return Finding(name, "failed", "it came back changed", advice)
    return Finding(name, "ok", "kept for a late subscriber, and cleared again")


@contextlib.asynccontextmanager
async def _listening(transport: Transport, topic: str) -> AsyncIterator[None]:
    await transport.subscribe(topic)
    try:
        yield
    finally:
        with contextlib.suppress(TransportError):
            await transport.unsubscribe(topic)


async def _next_packet(transport: Transport, topic: str) -> Packet:
    async with asyncio.timeout(WAIT_S):
        while True:
            event = await transport.receive()
            if isinstance(event, Disconnected):
                raise TransportError(event.reason)
            if isinstance(event, Packet):
                event.ack()
                if event.topic == topic:
                    return event


def _is_silence(exc: BaseException) -> bool:
    return isinstance(exc, TimeoutError) and not str(exc)


def _why(exc: BaseException) -> str:
    return f"nothing came within {WAIT_S:g} s" if _is_silence(exc) else str(exc)
