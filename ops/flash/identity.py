"""Who a flashed device is: an identity that was made here, or a join token.

Both are looked at first, with what the fleet's folder has at hand: a card that is refused a week
later, in the field, is found out here.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cryptography import x509

from broker.topics import COORDINATOR
from coordinator.identity.authority import CLAIM, Side
from coordinator.identity.fleet import CAS, authority_dir, read_settings, state_dir
from coordinator.identity.keys import certificate_from_pem, fingerprint
from coordinator.identity.roster import FILE, Roster
from edge_agent.errors import AgentError
from edge_agent.identity.folder import IdentityFolder
from edge_agent.identity.keys import certificates_from_pem, common_name, issued_by
from ops.errors import SettingsWrong
from ops.flash.payload import FOLDER, File, read


def identity_files(
    fleet_folder: Path,
    device: str | None,
    token: Path | None,
    *,
    clock: Callable[[], float] = time.time,
) -> list[File]:
    """The identity of ``device``, or with ``token`` what makes the device enrol by itself.

    ``clock`` gives unix seconds. Raises :class:`SettingsWrong` if there is neither, and for what
    does not get a device into this fleet; ConfigError and IdentityError for damaged files.
    """
    fleet = _Fleet(fleet_folder)
    if token is not None:
        return _claim(fleet, token, clock())
    if device is None:
        raise SettingsWrong(
            "name the device, or give --token FILE of `splitfleet fleet token` for a card that "
            "any device may start from"
        )
    identity = IdentityFolder(fleet_folder / "devices" / device)
    files = (identity.ca_file, identity.return_file, identity.device_file, identity.key_file)
    if not all(file.exists() for file in files):
        raise SettingsWrong(
            f"{identity.folder} holds no identity: make one with `splitfleet fleet add {device}`, "
            "or give --token FILE"
        )
    _check_identity(fleet, identity, device)
    return _files(*files, secret=identity.key_file)


class _Fleet:
    """What the fleet's folder tells: on a machine that only flashes, not all of it is there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = read_settings(folder)

    def check_authority(self, what: Path, trusted: Sequence[x509.Certificate]) -> None:
        """Refuse ``what`` if no device that has it would trust this fleet's broker."""
        authority = self.authority("fleet")
        if authority is not None and authority not in trusted:
            raise self.foreign(what)

    def foreign(self, what: Path) -> SettingsWrong:
        """That ``what`` is of another fleet."""
        return SettingsWrong(
            f"{what} is of another fleet than {self.folder}, of another authority: name its own "
            "with --folder, or take what this fleet has made"
        )

    def authority(self, side: Side) -> x509.Certificate | None:
        """The certificate of an authority, from the first place that has it."""
        own, broker = self.folder / COORDINATOR, self.folder / self.settings.broker_dir
        for place in (authority_dir(self.folder), own, broker):
            file = place / CAS[side]
            with contextlib.suppress(OSError):
                return certificate_from_pem(file.read_bytes(), str(file))
        return None

    def roster(self) -> Roster | None:
        """Its books, to be closed; None if they are not here, or not this user's."""
        file = state_dir(self.folder) / FILE
        return Roster(file) if os.access(file, os.R_OK | os.W_OK) else None


def _check_identity(fleet: _Fleet, identity: IdentityFolder, device: str) -> None:
    certificate = identity.certificate()
    assert certificate is not None
    if common_name(certificate) != device:
        raise SettingsWrong(
            f"{identity.folder} holds the identity of {common_name(certificate)!r}: put files of "
            "one device together"
        )
    fleet.check_authority(identity.ca_file, identity.authorities())
    roster = fleet.roster()
    if roster is None:
        return
    with contextlib.closing(roster):
        member = roster.device(device)
    if member is None or member.key != fingerprint(identity.key().public_key()):
        state = "another one" if member is not None and member.key else "none"
    elif member.state != "active":
        state = f"one that is {member.state}"
    else:
        return
    again = member is not None and member.state in ("active", "revoked")
    first = f"`splitfleet fleet reset {device}`, then " if again else ""
    raise SettingsWrong(
        f"{identity.folder} does not get {device} into the fleet, whose roster has {state} for it: "
        f"{first}`splitfleet fleet add {device}` makes it a new identity"
    )


def _claim(fleet: _Fleet, token: Path, now: float) -> list[File]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = IdentityFolder(Path(temporary) / "identity")
        try:
            folder.put_token(read(token))
        except AgentError as exc:
            raise SettingsWrong(f"{token}: {exc}") from exc
        files = (folder.ca_file, folder.claim_file, folder.claim_key_file)
        made = _files(*files, secret=folder.claim_key_file)
        authorities = folder.authorities()
        (claim,) = certificates_from_pem(folder.claim_file.read_bytes())
    fleet.check_authority(token, authorities)
    issuer = fleet.authority("claims")
    if issuer is not None and not issued_by(claim, issuer):
        raise fleet.foreign(token)
    if (trouble := _trouble(fleet, claim, now)) is not None:
        raise SettingsWrong(f"{token} {trouble}: make another with `splitfleet fleet token`")
    return made


def _trouble(fleet: _Fleet, claim: x509.Certificate, now: float) -> str | None:
    """Why no device gets in with this claim; None if one should."""
    if claim.not_valid_after_utc.timestamp() <= now:
        return f"has ended, on {claim.not_valid_after_utc:%Y-%m-%d %H:%MZ}"
    roster = fleet.roster()
    if roster is None:
        return None
    with contextlib.closing(roster):
        known = roster.claim(common_name(claim).removeprefix(CLAIM))
    if known is None:
        return f"is not on the roster of {fleet.folder}"
    if known.revoked is not None:
        return "has been revoked"
    if known.used >= known.uses:
        return f"was for {known.uses} devices, and they have come" if known.uses > 1 else "is used"
    return None


def _files(*files: Path, secret: Path) -> list[File]:
    return [
        File(f"{FOLDER}/identity/{file.name}", read(file), secret=file == secret) for file in files
    ]
