"""Mosquitto's configuration, written from the topic tree: hardened, one password for each client.

The files are accepted by Mosquitto 2.0 and 2.1.
"""

from __future__ import annotations

import base64
import hashlib
import os
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from broker.errors import ConfigError
from broker.topics import COORDINATOR, Topics, check_device
from broker.transport import Features

FEATURES = Features(
    receive_maximum=True, max_packet_size=True, access_control=True, will_delay=True
)

# What mosquitto_passwd 2.0 writes. More rounds would only slow the broker down, which hashes in its
# one thread: the passwords here are random and too long to guess.
_ROUNDS = 101
_SALT_BYTES = 12
_PASSWORD_BYTES = 24

_CONFIGURATION = """\
# Written by splitfleet for fleet {fleet}. Mosquitto 2.0 and 2.1.
per_listener_settings false
allow_anonymous false
password_file {folder}/passwords
acl_file {folder}/acl
set_tcp_nodelay true
# The protocol's own bound; both are announced to the clients.
max_packet_size 131072
max_inflight_messages 64
# Beyond these messages for a client that is away are dropped silently:
# watch $SYS/broker/publish/messages/dropped.
max_queued_messages 10000
max_queued_bytes 268435456
persistent_client_expiration 1d
{persistence}
log_dest stderr
log_type error
log_type warning
log_type notice
log_timestamp_format %Y-%m-%dT%H:%M:%S

listener {port} {host}
# A client can neither pretend to be another nor throw another out. (An option of the listener.)
use_username_as_clientid true
{tls}"""


@dataclass(frozen=True, slots=True)
class ServerCertificate:
    """PEM files of a TLS listener, as the broker sees them."""

    cert_file: Path
    key_file: Path


@dataclass(frozen=True, slots=True)
class MosquittoFiles:
    """What was written, and the passwords that were generated: they are kept nowhere else."""

    configuration: Path
    acl: Path
    passwords: Path
    credentials: dict[str, str]
    """Client name -> password, of the clients that had none before and were given none."""


def write_mosquitto_config(
    folder: Path,
    fleet: str,
    *,
    devices: Iterable[str],
    passwords: Mapping[str, str] | None = None,
    host: str = "0.0.0.0",  # noqa: S104 a broker is there to be reached
    port: int = 1883,
    certificate: ServerCertificate | None = None,
    persistence: Path | None = None,
    seen_as: Path | None = None,
) -> MosquittoFiles:
    """Write mosquitto.conf, acl and passwords into `folder`.

    A client has the password that is given, else the one it already has there, else a new one;
    passwords of clients no longer named are removed. `persistence` is a folder in which the broker
    keeps its state over a restart; `seen_as` is where the broker finds `folder`, when that is
    another path, as in a container. Raises TopicError for a bad name and ConfigError when the files
    cannot be written.
    """
    topics = Topics(fleet)
    names = [COORDINATOR, *(check_device(device) for device in devices)]
    if len(set(names)) != len(names):
        raise ConfigError("a device is named twice; give every device its own name")
    if not host.isprintable() or " " in host:
        raise ConfigError(f"{host!r} is no address to listen on: give one, like 127.0.0.1")
    files = MosquittoFiles(folder / "mosquitto.conf", folder / "acl", folder / "passwords", {})
    place = (seen_as or folder).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        hashes = _read_hashes(files.passwords)
        for name in names:
            if passwords is not None and name in passwords:
                hashes[name] = hash_password(passwords[name])
            elif name not in hashes:
                files.credentials[name] = new_password()
                hashes[name] = hash_password(files.credentials[name])
        _write_private(files.passwords, "".join(f"{name}:{hashes[name]}\n" for name in names))
        _write_private(files.acl, format_acl(topics))
        files.configuration.write_text(
            _CONFIGURATION.format(
                fleet=fleet,
                folder=place,
                host=host,
                port=port,
                persistence=_persistence_lines(persistence),
                tls=_tls_lines(certificate),
            ),
            encoding="utf-8",
        )
    except OSError as exc:
        raise ConfigError(f"cannot write Mosquitto's files into {folder}: {exc.strerror}") from exc
    return files


def format_acl(topics: Topics) -> str:
    """The access rules of a fleet as Mosquitto's ACL file; %u is a client's login name."""
    lines = [f"# Written by splitfleet for fleet {topics.fleet}."]
    lines += [
        f"pattern {grant.access} {grant.topic_filter}" for grant in topics.device_grants("%u")
    ]
    lines += ["", f"user {COORDINATOR}"]
    lines += [f"topic {grant.access} {grant.topic_filter}" for grant in topics.coordinator_grants()]
    return "\n".join(lines) + "\n"


def new_password() -> str:
    """A password that nobody guesses."""
    return secrets.token_urlsafe(_PASSWORD_BYTES)


def hash_password(password: str, salt: bytes | None = None) -> str:
    """Hash as mosquitto_passwd does: $7$ROUNDS$SALT$HASH, PBKDF2 with SHA-512, base64."""
    salt = secrets.token_bytes(_SALT_BYTES) if salt is None else salt
    digest = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, _ROUNDS)
    encoded = [base64.b64encode(part).decode() for part in (salt, digest)]
    return f"$7${_ROUNDS}${encoded[0]}${encoded[1]}"


def _read_hashes(file: Path) -> dict[str, str]:
    if not file.exists():
        return {}
    lines = file.read_text(encoding="utf-8").splitlines()
    return {name: rest for name, _, rest in (line.partition(":") for line in lines) if rest}


def _write_private(file: Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}.new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        stream.write(text)
    if os.geteuid() == 0:
        _hand_over(temporary)
    temporary.replace(file)


def _hand_over(file: Path) -> None:
    # Mosquitto started by root gives up its rights before it reads the ACL.
    import pwd

    try:
        user = pwd.getpwnam("mosquitto")
    except KeyError:
        return  # not installed here: the files are for another machine
    os.chown(file, user.pw_uid, user.pw_gid)


def _persistence_lines(folder: Path | None) -> str:
    if folder is None:
        return "persistence false"
    return f"persistence true\npersistence_location {folder}/\nautosave_interval 60"


def _tls_lines(certificate: ServerCertificate | None) -> str:
    if certificate is None:
        return ""
    return f"certfile {certificate.cert_file}\nkeyfile {certificate.key_file}\n"
