"""A fleet's identity as its running parts see it: settings, books, and what is to be kept fresh.

FOLDER/fleet.toml                           the settings below
FOLDER/broker/                              what the broker reads
FOLDER/coordinator/                         coordinator.toml, coordinator.pem and its key
FOLDER/coordinator/state/                   the coordinator's store, and in it:
FOLDER/coordinator/state/registry.sqlite3   the roster
FOLDER/coordinator/state/authority/         the authorities and their keys
FOLDER/devices/DEVICE/                      what `splitfleet fleet add` made for a device

``ops.identity`` makes it, and does there what an operator asks for.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from cryptography import x509
from pydantic import Field, StringConstraints, model_validator

from broker.config import load_settings
from broker.fields import Name
from broker.mosquitto import (
    CERTIFICATE,
    CLAIMS_CA,
    CLAIMS_CRL,
    CLAIMS_PORT,
    FLEET_CA,
    FLEET_CRL,
    PORT,
)
from broker.topics import COORDINATOR
from coordinator.atomic_files import PUBLIC, write_file
from coordinator.errors import IdentityError
from coordinator.identity.authority import SIDES, Authority, Side
from coordinator.identity.keys import PublicKey, certificate_from_pem, certified_key, to_pem
from coordinator.identity.registration import DAY_S, Lifetimes, Registration
from coordinator.identity.roster import FILE, Member, Roster
from coordinator.identity.standing import CONDITIONS, Condition, Expiry

SETTINGS = "fleet.toml"
PASSPHRASE = "SPLITFLEET_CA_PASSPHRASE"  # noqa: S105 the name of a variable
CAS: Mapping[Side, str] = {"fleet": FLEET_CA, "claims": CLAIMS_CA}
LISTS: Mapping[Side, str] = {"fleet": FLEET_CRL, "claims": CLAIMS_CRL}
Server = Literal["broker", "coordinator"]
SERVERS: tuple[Server, ...] = ("coordinator", "broker")

_FRESH = 2 / 3
"""Certificates of broker and coordinator are signed anew when less of ``server_days`` is left."""


ENDING = 1 / 6
"""A device's certificate is near its end when so little of its life is left: half of the time in
which the device should have renewed it has passed."""


@dataclass(frozen=True, slots=True)
class Listed:
    """A device on the roster, and when its newest certificate ends, if that is not revoked."""

    member: Member
    condition: Condition
    ends: float | None


class FleetSettings(Lifetimes):
    """Section ``[fleet]`` of ``fleet.toml``."""

    name: Name
    """The fleet's name in the topic tree."""
    broker_names: Annotated[
        tuple[Annotated[str, StringConstraints(min_length=1, max_length=253)], ...],
        Field(min_length=1),
    ]
    """Names and addresses of the broker; clients are told the first."""
    port: int = Field(default=PORT, ge=1, le=65_535)
    """Where the broker listens for devices and the coordinator."""
    claims_port: int = Field(default=CLAIMS_PORT, ge=1, le=65_535)
    """Where it listens for those who come for a certificate."""
    loopback_port: int | None = Field(default=None, ge=1, le=65_535)
    """Where it lets in, without TLS and with all rights, whoever is on its machine; nobody if not
    set."""
    broker_dir: Path = Path("broker")
    """Where certificates and lists for the broker are written; below the fleet's folder."""

    @model_validator(mode="after")
    def _check_ports(self) -> Self:
        ports = [self.port, self.claims_port, self.loopback_port]
        if len(set(ports)) != len(ports):
            raise ValueError("port, claims_port and loopback_port must be different")
        return self

    @property
    def broker_url(self) -> str:
        """Where clients with an identity find the broker."""
        host = self.broker_names[0]
        return f"mqtts://[{host}]:{self.port}" if ":" in host else f"mqtts://{host}:{self.port}"


class Fleet:
    """The folder of a fleet. For one thread at a time; ``clock`` gives unix seconds."""

    def __init__(
        self,
        folder: Path,
        settings: FleetSettings,
        registration: Registration,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.folder = folder
        self.settings = settings
        self.registration = registration
        self._clock = clock

    @classmethod
    def open(
        cls,
        folder: Path,
        passphrase: str | None = None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> Fleet:
        """What ``splitfleet fleet init`` made.

        Raises :class:`IdentityError`, and ConfigError for settings that are wrong.
        """
        settings = read_settings(folder)
        authority = Authority.open(authority_dir(folder), passphrase, clock=clock)
        roster = Roster(state_dir(folder) / FILE, clock=clock)
        registration = Registration(authority, roster, settings, clock=clock)
        return cls(folder, settings, registration, clock=clock)

    @property
    def roster(self) -> Roster:
        """Its books."""
        return self.registration.roster

    @property
    def authority(self) -> Authority:
        """What signs for it."""
        return self.registration.authority

    @property
    def broker_dir(self) -> Path:
        """Where what the broker reads is written."""
        return self.folder / self.settings.broker_dir

    def members(self) -> list[Listed]:
        """The devices on the roster, by name."""
        now, spans = self._clock(), self.roster.spans("device")
        return [_listed(member, spans.get(member.name), now) for member in self.roster.devices()]

    def refresh(self) -> Expiry:
        """Write what is due: lists that have changed, and what has to be signed anew.

        In one change of the roster: of several that do this at once none leaves an older list.
        Raises :class:`IdentityError`; the rest is done all the same.
        """
        certificates = {f"{side}-ca": _ends(self.authority.ca(side)) for side in SIDES}
        lists: dict[str, float] = {}
        trouble: list[IdentityError] = []
        with self.roster.change():
            for server in SERVERS:
                with _noted(trouble):
                    certificates[server] = _ends(self._refresh_server(server))
            for side in SIDES:
                with _noted(trouble):
                    lists[side] = self._refresh_list(side)
        if trouble:
            raise trouble[0]
        return Expiry(certificates, lists)

    def sign_server(self, server: Server, key: PublicKey) -> x509.Certificate:
        """A certificate for the broker or the coordinator, written to where it is looked for."""
        days = self.settings.server_days
        if server == "broker":
            certificate = self.authority.issue_broker(self.settings.broker_names, key, days)
        else:
            certificate = self.authority.issue_coordinator(key, days)
        write(self.server_file(server), to_pem(certificate))
        return certificate

    def _refresh_list(self, side: Side) -> float:
        path = self.broker_dir / LISTS[side]
        before = None
        with contextlib.suppress(OSError, ValueError):  # missing or damaged: made anew
            before = x509.load_pem_x509_crl(path.read_bytes())
        new = self.registration.new_list(side, before)
        if new is not None:
            write(path, to_pem(new))
        current = before if new is None else new
        assert current is not None
        assert current.next_update_utc is not None
        return current.next_update_utc.timestamp()

    def _refresh_server(self, server: Server) -> x509.Certificate:
        path = self.server_file(server)
        try:
            pem = path.read_bytes()
        except OSError as exc:
            raise IdentityError(
                f"cannot read {path}: {exc.strerror}; correct broker_dir in {SETTINGS}, or restore "
                "a backup"
            ) from exc
        before = certificate_from_pem(pem, str(path))
        now, last = self._clock(), _ends(self.authority.ca("fleet"))
        # Of what a new one would have: the broker's begins with the authority, not when signed.
        whole = min(self.settings.server_days * DAY_S, last - now)
        if _ends(before) - now >= _FRESH * whole:
            return before
        return self.sign_server(server, certified_key(before))

    def server_file(self, server: Server) -> Path:
        """The certificate of broker or coordinator; its key is beside it."""
        if server == "broker":
            return self.broker_dir / CERTIFICATE
        return self.folder / COORDINATOR / f"{COORDINATOR}.pem"


def read_settings(folder: Path) -> FleetSettings:
    """The settings of the fleet in ``folder``.

    Raises :class:`IdentityError`, and ConfigError for settings that are wrong.
    """
    file = folder / SETTINGS
    try:
        file.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise IdentityError(
            f"{folder} is not the folder of a fleet, it has no {SETTINGS}; name the right one with "
            "--folder, or make it with splitfleet fleet init"
        ) from None
    except OSError as exc:
        raise IdentityError(f"cannot read {file}: {exc.strerror}") from exc
    return load_settings(FleetSettings, section="fleet", file=file)


def _listed(member: Member, span: tuple[float, float] | None, now: float) -> Listed:
    begins, ends = span or (now, now)
    condition: Condition = "valid"
    if member.state in ("awaited", "revoked"):
        condition = member.state
    elif ends <= now:
        condition = "ended"
    elif ends - now < ENDING * (ends - begins):
        condition = "ending"
    return Listed(member, condition, None if span is None else ends)


def count(devices: Iterable[Listed]) -> dict[Condition, int]:
    """How many are in each condition."""
    counts = dict.fromkeys(CONDITIONS, 0)
    for device in devices:
        counts[device.condition] += 1
    return counts


def state_dir(folder: Path) -> Path:
    """The coordinator's store in a fleet's folder."""
    return folder / COORDINATOR / "state"


def authority_dir(folder: Path) -> Path:
    """Where a fleet's authorities are."""
    return state_dir(folder) / "authority"


def find_passphrase(environ: Mapping[str, str]) -> str | None:
    """The authorities' passphrase: a variable, or a file that ``…_FILE`` names; None if neither.

    Raises :class:`IdentityError`.
    """
    if file := environ.get(f"{PASSPHRASE}_FILE"):
        try:
            passphrase = Path(file).read_text("utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as exc:
            raise IdentityError(f"cannot read {PASSPHRASE}_FILE = {file}: {exc}") from exc
        if not passphrase:
            raise IdentityError(f"{PASSPHRASE}_FILE = {file} is empty")
        return passphrase
    return environ.get(PASSPHRASE) or None


def write(path: Path, data: bytes, mode: int = PUBLIC) -> None:
    """Write a file of the fleet's folder; by root, for the user that its own folder belongs to.

    Raises :class:`IdentityError`.
    """
    with told(path):
        write_file(path, data, mode=mode)
        if os.geteuid() == 0:
            owner = path.parent.stat()
            os.chown(path, owner.st_uid, owner.st_gid)


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
    """Turn what the system has against writing ``path`` into :class:`IdentityError`."""
    try:
        yield
    except OSError as exc:
        raise IdentityError(
            f"cannot write {path}: {exc.strerror or exc}; free space or correct its rights"
        ) from exc


@contextlib.contextmanager
def _noted(trouble: list[IdentityError]) -> Iterator[None]:
    try:
        yield
    except IdentityError as exc:
        trouble.append(exc)


def _ends(certificate: x509.Certificate) -> float:
    return certificate.not_valid_after_utc.timestamp()
