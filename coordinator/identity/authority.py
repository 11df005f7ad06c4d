"""The two certificate authorities of a fleet.

The *fleet CA* signs broker, coordinator and devices. The *claims CA* signs what gets a device no
further than the question for a certificate: join tokens (claims), and every device's return
certificate, which outlives its certificates by years. The broker has a listener for each, so that
who holds the one kind cannot pass for the other. RFC 5280 profile; keys EC P-256, ECDSA SHA-256.
"""

from __future__ import annotations

import ipaddress
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from broker.errors import TopicError
from broker.topics import COORDINATOR, check_device, check_name
from coordinator.atomic_files import PRIVATE, make_folder, write_file
from coordinator.errors import IdentityError
from coordinator.identity.keys import (
    Key,
    PublicKey,
    certificate_from_pem,
    key_from_pem,
    key_to_pem,
    new_key,
    to_pem,
)

Side = Literal["fleet", "claims"]
SIDES: tuple[Side, ...] = ("fleet", "claims")

CLAIM = "claim."
RETURN = "back."
"""Common names of claims and returning devices begin so; a device's name has no dot."""

CA_DAYS = 20 * 365
RETURN_DAYS = 10 * 365
LIST_DAYS = 90
MAX_DEVICE_NAME = 64 - len(RETURN)
"""X.509 bounds a common name at 64 characters, and ``back.DEVICE`` has to be one."""

_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")

_SKEW = timedelta(hours=1)
"""What is signed begins up to so much earlier, for clocks that are a little slow."""


@dataclass(frozen=True, slots=True)
class _Ca:
    certificate: x509.Certificate
    key: Key


class Authority:
    """Issues certificates and revocation lists. Keeps no books: that is the roster's.

    ``clock`` gives unix seconds. Nothing outlives the authority that signed it.
    """

    def __init__(
        self, fleet_ca: _Ca, claims_ca: _Ca, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._cas: dict[Side, _Ca] = {"fleet": fleet_ca, "claims": claims_ca}
        self._clock = clock

    @classmethod
    def create(
        cls,
        folder: Path,
        fleet: str,
        passphrase: str | None = None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> Authority:
        """Make both authorities and write them into ``folder``, keys readable by the owner only.

        With a ``passphrase`` the keys are encrypted as well. Raises :class:`IdentityError` when the
        folder has authorities already or cannot be written, TopicError for a bad fleet name.
        """
        check_name(fleet, "fleet name")
        if any(_ca_file(folder, side).exists() for side in SIDES):
            raise IdentityError(
                f"{folder} has the authorities of a fleet; take another folder, or "
                "remove this one if making it was interrupted"
            )
        now = datetime.fromtimestamp(clock(), UTC)
        fleet_ca, claims_ca = (_new_ca(fleet, side, now) for side in SIDES)
        try:
            make_folder(folder)
            folder.chmod(0o700)
            for side, ca in zip(SIDES, (fleet_ca, claims_ca), strict=True):
                write_file(_key_file(folder, side), key_to_pem(ca.key, passphrase), mode=PRIVATE)
                write_file(_ca_file(folder, side), to_pem(ca.certificate))
        except OSError as exc:
            raise IdentityError(f"cannot write {folder}: {exc.strerror}") from exc
        return cls(fleet_ca, claims_ca, clock=clock)

    @classmethod
    def open(
        cls,
        folder: Path,
        passphrase: str | None = None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> Authority:
        """The authorities that :meth:`create` made. Raises :class:`IdentityError`."""
        fleet_ca, claims_ca = (_read_ca(folder, side, passphrase) for side in SIDES)
        return cls(fleet_ca, claims_ca, clock=clock)

    @property
    def fleet(self) -> str:
        """The name of the fleet."""
        subject = self.ca("fleet").subject
        return str(subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)[0].value)

    def ca(self, side: Side) -> x509.Certificate:
        """The certificate that what this side signs is verified with."""
        return self._cas[side].certificate

    def issue_device(self, name: str, public_key: PublicKey, days: float) -> x509.Certificate:
        """For a device, as a client of the fleet. Raises TopicError."""
        return self._issue("fleet", check_identity(name), public_key, days)

    def issue_return(
        self, name: str, public_key: PublicKey, days: float = RETURN_DAYS
    ) -> x509.Certificate:
        """For a device that has slept past the end of its certificate: ``back.NAME``."""
        return self._issue("claims", RETURN + check_identity(name), public_key, days)

    def issue_coordinator(self, public_key: PublicKey, days: float) -> x509.Certificate:
        """For the coordinator, as a client of the fleet."""
        return self._issue("fleet", COORDINATOR, public_key, days)

    def issue_claim(self, claim_id: str, public_key: PublicKey, days: float) -> x509.Certificate:
        """For whoever has the token: ``claim.ID``."""
        if len(check_name(claim_id, "claim")) > 64 - len(CLAIM):
            raise IdentityError(f"claim {claim_id!r} has more than {64 - len(CLAIM)} characters")
        return self._issue("claims", CLAIM + claim_id, public_key, days)

    def issue_broker(
        self, names: Iterable[str], public_key: PublicKey, days: float
    ) -> x509.Certificate:
        """For the broker, as a server, under all the ``names`` and addresses that clients use.

        It begins when the authority does, so that it holds for a device whose clock stands still.

        Raises :class:`IdentityError` when there are none, or one cannot be a host's.
        """
        alternatives = [_host(name) for name in names]
        if not alternatives:
            raise IdentityError("give at least one name or address of the broker")
        return self._issue(
            "fleet",
            "broker",
            public_key,
            days,
            usage=ExtendedKeyUsageOID.SERVER_AUTH,
            hosts=alternatives,
        )

    def issue_signer(self, public_key: PublicKey, days: float) -> x509.Certificate:
        """For whoever signs updates: it is for code, and nobody at the broker."""
        usage = ExtendedKeyUsageOID.CODE_SIGNING
        return self._issue("fleet", "updates", public_key, days, usage=usage)

    def revocation_list(
        self, side: Side, revoked: Mapping[int, float], days: float = LIST_DAYS
    ) -> x509.CertificateRevocationList:
        """The list of one side: serial number → when it was revoked, unix seconds.

        A broker that finds its list older than ``days`` lets nobody in.
        """
        ca, now = self._cas[side], self._now()
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(ca.certificate.subject)
            .last_update(now - _SKEW)
            .next_update(now + timedelta(days=days))
            .add_extension(_issuer_key(ca.certificate), critical=False)
            # Rises with every list (RFC 5280, 5.2.3) as long as the clock does.
            .add_extension(x509.CRLNumber(int(self._clock() * 1000)), critical=False)
        )
        for serial, when in sorted(revoked.items()):
            entry = x509.RevokedCertificateBuilder().serial_number(serial)
            entry = entry.revocation_date(datetime.fromtimestamp(when, UTC))
            builder = builder.add_revoked_certificate(entry.build())
        return builder.sign(ca.key, hashes.SHA256())

    def _issue(
        self,
        side: Side,
        common_name: str,
        public_key: PublicKey,
        days: float,
        *,
        usage: x509.ObjectIdentifier = ExtendedKeyUsageOID.CLIENT_AUTH,
        hosts: Iterable[x509.GeneralName] = (),
    ) -> x509.Certificate:
        ca, now, life = self._cas[side], self._now(), timedelta(days=days)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]))
            .issuer_name(ca.certificate.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(
                ca.certificate.not_valid_before_utc if hosts else now - min(_SKEW, life / 10)
            )
            .not_valid_after(min(now + life, ca.certificate.not_valid_after_utc))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(ca=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(_issuer_key(ca.certificate), critical=False)
        )
        if hosts:
            builder = builder.add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        return builder.sign(ca.key, hashes.SHA256())

    def _now(self) -> datetime:
        now = datetime.fromtimestamp(self._clock(), UTC)
        made = self.ca("fleet").not_valid_before_utc
        if now < made:
            raise IdentityError(
                f"nothing is signed: this machine's clock says {now:%Y-%m-%d %H:%M}, the authority "
                f"was made at {made:%Y-%m-%d %H:%M}; set the clock"
            )
        return now


def check_identity(device: str) -> str:
    """Return ``device``, or raise TopicError if no device of that name can have an identity."""
    if len(check_device(device)) > MAX_DEVICE_NAME:
        raise TopicError(
            f"device name {device!r} has more than {MAX_DEVICE_NAME} characters, which a "
            "certificate has no room for; choose a shorter one"
        )
    return device


def check_host(name: str) -> str:
    """Return ``name``, or raise :class:`IdentityError` if it is no host name and no address."""
    _host(name)
    return name


def common_name(certificate: x509.Certificate) -> str:
    """Whose certificate it is: the broker's user name of the client that shows it."""
    return str(certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


def _ca_file(folder: Path, side: Side) -> Path:
    return folder / f"{side}-ca.pem"


def _key_file(folder: Path, side: Side) -> Path:
    return folder / f"{side}-ca-key.pem"


def _new_ca(fleet: str, side: Side, now: datetime) -> _Ca:
    key = new_key()
    attributes = {
        NameOID.ORGANIZATION_NAME: fleet,
        NameOID.COMMON_NAME: f"splitfleet {side} CA",
    }
    name = x509.Name([x509.NameAttribute(oid, value) for oid, value in attributes.items()])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(ca=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return _Ca(certificate, key)


def _read_ca(folder: Path, side: Side, passphrase: str | None) -> _Ca:
    ca_file, key_file = _ca_file(folder, side), _key_file(folder, side)
    try:
        mode = key_file.stat().st_mode
        ca_pem, key_pem = ca_file.read_bytes(), key_file.read_bytes()
    except OSError as exc:
        raise IdentityError(f"cannot read {exc.filename}: {exc.strerror}") from exc
    if os.name == "posix" and mode & 0o077:
        raise IdentityError(f"others can read {key_file}; chmod 600 it")
    certificate = certificate_from_pem(ca_pem, str(ca_file))
    key = key_from_pem(key_pem, passphrase, str(key_file))
    if key.public_key() != certificate.public_key():
        raise IdentityError(f"{key_file} is not the key of {ca_file}; restore both together")
    return _Ca(certificate, key)


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


def _issuer_key(ca: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    identifier = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)


def _host(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in name.split(".")):
        raise IdentityError(
            f"{name!r} is neither a host name nor an address; give the broker's, without port"
        )
    return x509.DNSName(name)
