"""A device's key pair, the request it signs with it, and what it reads in certificates."""

from __future__ import annotations

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

PrivateKey = ec.EllipticCurvePrivateKey


def new_key() -> PrivateKey:
    """A new private key on P-256."""
    return ec.generate_private_key(ec.SECP256R1())


def key_to_pem(key: PrivateKey) -> bytes:
    """PKCS #8, PEM, not encrypted: the file's mode protects it."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def key_from_pem(data: bytes) -> PrivateKey:
    """The private key. Raises ValueError for anything but an unencrypted key on P-256."""
    try:
        key = serialization.load_pem_private_key(data, None)
    except (ValueError, TypeError) as exc:
        raise ValueError("it is no unencrypted private key in PEM") from exc
    if not isinstance(key, PrivateKey) or key.curve.name != "secp256r1":
        raise ValueError("the key is not on the curve P-256")
    return key


def signing_request(key: PrivateKey, device: str) -> bytes:
    """A certificate request (PKCS #10, DER) for ``device``, which proves that it has the key."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, device)])
    request = x509.CertificateSigningRequestBuilder().subject_name(name)
    return request.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def certificates_from_pem(data: bytes) -> list[x509.Certificate]:
    """The certificates of a PEM file, at least one. Raises ValueError."""
    try:
        return x509.load_pem_x509_certificates(data)
    except ValueError as exc:
        raise ValueError("it holds no certificate in PEM, or a damaged one") from exc


def certificates_to_pem(certificates: list[x509.Certificate]) -> bytes:
    """The same as one PEM file."""
    return b"".join(one.public_bytes(serialization.Encoding.PEM) for one in certificates)


def common_name(certificate: x509.Certificate) -> str:
    """The subject's common name; "" if it has none, or several."""
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if len(names) == 1 else ""


def belongs(certificate: x509.Certificate, key: PrivateKey) -> bool:
    """Whether ``certificate`` is of ``key``."""
    return certificate.public_key() == key.public_key()


def issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether ``authority`` has signed ``certificate``, by name and signature."""
    try:
        certificate.verify_directly_issued_by(authority)
    except Exception:  # noqa: BLE001 InvalidSignature, ValueError, TypeError: all of them say no
        return False
    return True


def valid_from(certificate: x509.Certificate) -> float:
    """When its validity begins, unix seconds."""
    return certificate.not_valid_before_utc.timestamp()


def valid_until(certificate: x509.Certificate) -> float:
    """When its validity ends, unix seconds."""
    return certificate.not_valid_after_utc.timestamp()
