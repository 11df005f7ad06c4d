"""Messages by which a device gets a new version of its software, and says which one it runs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from broker.fields import Count, Duration, Message, Name, Text, blob
from broker.maps import Buffer

PIECE_BYTES = 1 << 18

Version = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9.+_-]{0,63}$")]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""SHA-256, hexadecimal."""
SoftwareState = Literal["running", "fetching", "installing", "proving", "failed"]


class Update(Message):
    """A bundle to run: where it is, and how long it may take until it has proven itself.

    What a device failed at it tries again when another ``rollout`` asks for it.
    ``size`` and ``sha256`` are those of the whole bundle. Without ``url`` (http or https) it is
    fetched in pieces from the coordinator.
    """

    rollout: Name
    version: Version
    sha256: Digest
    size: Annotated[int, Field(ge=1, le=2**33)]
    url: Annotated[str, StringConstraints(pattern=r"^https?://[!-~]{1,2000}$")] | None = None
    prove_s: Duration


class Fetch(Message):
    """A device asks for a piece of a bundle, from this byte on."""

    sha256: Digest
    offset: Count


class Piece(Message):
    """Bytes of a bundle from ``offset`` on; none if it is not to be had any more."""

    sha256: Digest
    offset: Count
    data: Annotated[Buffer, blob(PIECE_BYTES)]


class Software(Message):
    """Which version a device runs, and what it does about the one it was told to run.

    ``proving``: it runs ``version`` on trial, until the coordinator has answered this. ``failed``:
    what ``rollout`` wanted is not to be had here, ``detail`` says why.
    """

    version: Version
    state: SoftwareState
    rollout: Name | None = None
    detail: Text = ""
