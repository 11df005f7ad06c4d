"""Mosquitto's configuration, written from the topic tree: mutual TLS, identities as names, limits.

Mosquitto 2.0 and 2.1 accept the files. Paths in them are relative: `run.sh` starts the broker in
its folder, which may be moved or mounted anywhere.

    FOLDER/mosquitto.conf, acl, run.sh, data/                 written here
    FOLDER/fleet-ca.pem, fleet-crl.pem, broker.pem, …         written by the fleet's authority
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from broker.errors import ConfigError
from broker.topics import COORDINATOR, Topics
from broker.transport import Features

FEATURES = Features(
    receive_maximum=True, max_packet_size=True, access_control=True, will_delay=True
)

PORT = 8883
CLAIMS_PORT = 8884

FLEET_CA = "fleet-ca.pem"
FLEET_CRL = "fleet-crl.pem"
CLAIMS_CA = "claims-ca.pem"
CLAIMS_CRL = "claims-crl.pem"
CERTIFICATE = "broker.pem"
KEY = "broker-key.pem"
START = "run.sh"

_CONFIGURATION = """\
# Written by splitfleet for fleet {fleet}. Mosquitto 2.0 and 2.1; start it with run.sh.
allow_anonymous {anonymous}
acl_file acl
set_tcp_nodelay true
# Announced to the clients; who sends more is disconnected.
max_packet_size {limits.packet_bytes}
max_inflight_messages {limits.inflight_messages}
# Beyond these messages for a client that is away are dropped silently:
# watch $SYS/broker/publish/messages/dropped.
max_queued_messages {limits.queue_messages}
max_queued_bytes {limits.queue_bytes}
memory_limit {limits.memory_bytes}
max_keepalive {limits.keepalive_s}
persistent_client_expiration 1d
persistence true
persistence_location data/
autosave_interval 60
log_dest stderr
log_type error
log_type warning
log_type notice
log_timestamp_format %Y-%m-%dT%H:%M:%S
"""

_LISTENER = """
listener {where}
max_connections {connections}
tls_version tlsv1.2
cafile {ca}
crlfile {crl}
certfile {certificate}
keyfile {key}
require_certificate true
# A client is who its certificate says: it can neither pretend to be another nor throw one out.
use_identity_as_username true
use_username_as_clientid true
"""

_MOUNTED = """\
# Whoever comes with a claim sees nothing of the fleet but its own topics below this.
mount_point {mount}
"""

_LOOPBACK = """
# Without TLS, for whoever is on this machine.
listener {port} 127.0.0.1
max_connections {connections}
"""


@dataclass(frozen=True, slots=True)
class BrokerLimits:
    """What one client, and all of them together, can take from the broker."""

    packet_bytes: int = 131_072
    """The largest whole packet: the protocol's own bound."""
    inflight_messages: int = 64
    """QoS 1 messages that a client may have unacknowledged, each way."""
    queue_messages: int = 10_000
    queue_bytes: int = 256 << 20
    """What is kept for a client that is slow or away; what comes beyond it is dropped."""
    memory_bytes: int = 512 << 20
    """Of the whole broker; whose packet would go beyond it is disconnected."""
    connections: int = 10_000
    """Of devices and coordinator."""
    claims: int = 1000
    """Connections of those who come for a certificate."""
    keepalive_s: int = 120
    """The longest silence of a client before it counts as gone is one and a half times this."""


@dataclass(frozen=True, slots=True)
class MosquittoFiles:
    """What was written."""

    configuration: Path
    acl: Path
    start: Path
    """POSIX sh: runs the broker, and starts it again when a file of the folder has changed."""


def write_mosquitto_config(
    folder: Path,
    fleet: str,
    *,
    host: str | None = None,
    port: int = PORT,
    claims_port: int = CLAIMS_PORT,
    loopback_port: int | None = None,
    limits: BrokerLimits = BrokerLimits(),
) -> MosquittoFiles:
    """Write mosquitto.conf, acl and run.sh into `folder`; certificates are the authority's.

    It listens on `host`, or on all addresses of its machine: on `port` for whom the fleet CA has
    signed, on `claims_port` for whom the claims CA has. With `loopback_port`, whoever is on the
    broker's machine has the coordinator's rights there, without TLS: for fleets on one machine.

    Raises TopicError for a bad fleet name and ConfigError when the files cannot be written.
    """
    topics = Topics(fleet)
    if host is not None and (not host.isprintable() or " " in host):
        raise ConfigError(f"{host!r} is no address to listen on: give one, like 127.0.0.1")
    files = MosquittoFiles(folder / "mosquitto.conf", folder / "acl", folder / START)
    text = _CONFIGURATION.format(
        fleet=fleet, limits=limits, anonymous="true" if loopback_port else "false"
    )
    text += _listener(host, port, limits.connections, FLEET_CA, FLEET_CRL)
    text += _listener(host, claims_port, limits.claims, CLAIMS_CA, CLAIMS_CRL)
    text += _MOUNTED.format(mount=topics.claims)
    if loopback_port:
        text += _LOOPBACK.format(port=loopback_port, connections=limits.connections)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "data").exists():
            (folder / "data").mkdir()
            _hand_over(folder / "data")
        _replace(files.configuration, text, 0o644)
        # Mosquitto wants it to be nobody else's to read.
        _replace(files.acl, format_acl(topics, loopback=loopback_port is not None), 0o600)
        _replace(files.start, _start_script(), 0o755)
    except OSError as exc:
        raise ConfigError(f"cannot write Mosquitto's files into {folder}: {exc.strerror}") from exc
    return files


def format_acl(topics: Topics, *, loopback: bool = False) -> str:
    """The access rules of a fleet as Mosquitto's ACL file; %u is a client's login name."""
    lines = [f"# Written by splitfleet for fleet {topics.fleet}."]
    grants = topics.coordinator_grants()
    if loopback:
        lines += [f"topic {grant.access} {grant.topic_filter}" for grant in grants]
    lines += [
        f"pattern {grant.access} {grant.topic_filter}"
        for grant in (*topics.device_grants("%u"), *topics.claim_grants("%u"))
    ]
    lines += ["", f"user {COORDINATOR}"]
    lines += [f"topic {grant.access} {grant.topic_filter}" for grant in grants]
    return "\n".join(lines) + "\n"


def _listener(host: str | None, port: int, connections: int, ca: str, crl: str) -> str:
    return _LISTENER.format(
        where=port if host is None else f"{port} {host}",
        connections=connections,
        ca=ca,
        crl=crl,
        certificate=CERTIFICATE,
        key=KEY,
    )


def _start_script() -> str:
    return resources.files("broker").joinpath("mosquitto_run.sh").read_text("utf-8")


def _replace(file: Path, text: str, mode: int) -> None:
    temporary = file.with_name(f".{file.name}.new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        os.fchmod(descriptor, mode)
        stream.write(text)
    _hand_over(temporary)
    temporary.replace(file)


def _hand_over(path: Path) -> None:
    if os.geteuid() == 0:
        owner = path.parent.stat()
        os.chown(path, owner.st_uid, owner.st_gid)
