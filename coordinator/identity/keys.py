"""Keys and PEM files. Every key of a fleet is EC P-256."""

from __future__ import annotations

import hashlib

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from coordinator.errors import IdentityError

Key = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey
LONGEST_PASSPHRASE = 1023
"""Bytes; OpenSSL takes no more."""


def new_key() -> Key:
    """A key that nobody has had before."""
    return ec.generate_private_key(ec.SECP256R1())


def key_to_pem(key: Key, passphrase: str | None = None) -> bytes:
    """PKCS #8 as PEM, encrypted if there is a passphrase. Raises :class:`IdentityError`."""
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase is not None:
        if len(passphrase.encode()) > LONGEST_PASSPHRASE:
            raise IdentityError(f"a passphrase has at most {LONGEST_PASSPHRASE} bytes")
        encryption = serialization.BestAvailableEncryption(passphrase.encode())
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
    )


def key_from_pem(pem: bytes, passphrase: str | None, where: str) -> Key:
    """The key in ``where``, as messages call it. Raises :class:`IdentityError`."""
    try:
        key = serialization.load_pem_private_key(pem, passphrase.encode() if passphrase else None)
    except TypeError:
        if passphrase is None:
            raise IdentityError(
                f"{where} is encrypted; give its passphrase in SPLITFLEET_CA_PASSPHRASE"
            ) from None
        raise IdentityError(
            f"{where} is not encrypted; start without SPLITFLEET_CA_PASSPHRASE"
        ) from None
    except ValueError:
        raise IdentityError(
            f"{where} cannot be read: the passphrase is wrong, or the file is damaged"
        ) from None
    if not isinstance(key, Key):
        raise IdentityError(f"{where} has a key of another kind; a fleet's keys are EC P-256")
    return key


def to_pem(signed: x509.Certificate | x509.CertificateRevocationList) -> bytes:
    """A certificate or revocation list as PEM."""
    return signed.public_bytes(serialization.Encoding.PEM)


def certificate_from_pem(pem: bytes, where: str) -> x509.Certificate:
    """The first certificate in ``where``. Raises :class:`IdentityError`."""
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError as exc:
        raise IdentityError(f"{where} has no certificate that can be read: {exc}") from None


def certified_key(certificate: x509.Certificate) -> PublicKey:
    """The key that a certificate of ours is about."""
    key = certificate.public_key()
    assert isinstance(key, PublicKey)
    return key


def fingerprint(key: PublicKey) -> str:
    """SHA-256 of the key (SubjectPublicKeyInfo, DER), hexadecimal: the same key, the same text."""
    der = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(der).hexdigest()
