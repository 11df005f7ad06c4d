"""Messages by which a device gets its identity and keeps it: certificates of the fleet's CAs."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from broker.fields import Amount, Message, Name, Text, blob
from broker.maps import Buffer

Request = Annotated[Buffer, blob(4096)]
"""A PKCS #10 certificate request, DER, signed with the device's key."""
Pem = Annotated[Buffer, blob(16_384)]
"""Certificates, PEM."""


class Enrol(Message):
    """Somebody with a claim asks to be the device ``wanted``; the answer names ``nonce``.

    From ``claim.ID``, who holds a join token, or ``back.DEVICE``, a device whose certificate ended.
    """

    nonce: Name
    wanted: Name
    csr: Request
    serial: Text = ""
    device_class: Name = "generic"
    software: Text = ""


class Renew(Message):
    """A device asks for its next certificate; the answer names ``nonce``."""

    nonce: Name
    csr: Request


class Certificate(Message):
    """The certificates of ``device``, or the reason why it gets none.

    ``return_certificate`` lets it in as ``back.DEVICE`` when ``certificate`` has ended. ``ca`` are
    those to trust from now on. ``now``: seconds since 1970, for devices whose clock stood still.
    """

    nonce: Name
    device: Name
    certificate: Pem | None = None
    return_certificate: Pem | None = None
    ca: Pem | None = None
    now: Annotated[Amount, Field(le=2**53)]
    refused: Text | None = None
