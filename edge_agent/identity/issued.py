"""What the coordinator issues is looked at whole before any of it is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from broker.identity_messages import Certificate
from broker.maps import Buffer
from edge_agent.errors import IdentityError
from edge_agent.identity.folder import RETURN_PREFIX, Issued
from edge_agent.identity.keys import (
    PrivateKey,
    belongs,
    certificates_from_pem,
    common_name,
    issued_by,
    valid_from,
    valid_until,
)

if TYPE_CHECKING:
    from cryptography import x509

LEEWAY_S = 300.0
"""By how much a certificate may begin after the coordinator's own clock."""


def check_issued(
    answer: Certificate,
    *,
    device: str,
    key: PrivateKey,
    authorities: Sequence[x509.Certificate],
    comeback_needed: bool,
) -> Issued:
    """The certificates of an answer that refuses nothing, for ``device`` and its ``key``.

    ``authorities`` are those it trusts so far; new ones must be signed by one of them. An answer
    without ``ca``, or without the return certificate unless that is ``comeback_needed``, leaves
    what the device has.

    Raises :class:`IdentityError` if any part is not what was asked for.
    """
    if answer.device != device or answer.certificate is None:
        raise IdentityError(f"the answer has no certificate of {device}; it is of {answer.device}")
    trusted = list(authorities)
    if answer.ca is not None:
        trusted = _read("ca", answer.ca)
        for one in trusted:
            if one not in authorities and not any(issued_by(one, known) for known in authorities):
                raise IdentityError(
                    f"the answer brings the authority {one.subject.rfc4514_string()}, which none "
                    "of those trusted here has signed"
                )
    certificate = _read("certificate", answer.certificate)[0]
    _check("certificate", certificate, device, key, answer.now)
    if not any(issued_by(certificate, one) for one in trusted):
        raise IdentityError("the certificate in the answer is of a foreign authority")
    if answer.return_certificate is None:
        if comeback_needed:
            raise IdentityError("the answer has no return certificate")
        return Issued(certificate, None, trusted)
    comeback = _read("return certificate", answer.return_certificate)[0]
    _check("return certificate", comeback, RETURN_PREFIX + device, key, answer.now)
    return Issued(certificate, comeback, trusted)


def _read(what: str, data: Buffer) -> list[x509.Certificate]:
    try:
        return certificates_from_pem(bytes(data))
    except ValueError as exc:
        raise IdentityError(f"the {what} in the answer is unusable: {exc}") from exc


def _check(
    what: str, certificate: x509.Certificate, name: str, key: PrivateKey, now: float
) -> None:
    if not belongs(certificate, key):
        raise IdentityError(f"the {what} in the answer is of another key")
    if common_name(certificate) != name:
        raise IdentityError(f"the {what} in the answer is of {common_name(certificate)!r}")
    if not valid_from(certificate) - LEEWAY_S <= now < valid_until(certificate):
        raise IdentityError(f"the {what} in the answer is not valid now, as the coordinator has it")
