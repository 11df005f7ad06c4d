"""The folder that holds a device's identity, and what may be in it at each time.

    claim.pem claim-key.pem fleet-ca.pem             it has a join token
    + key.pem                                        it has asked to be enrolled
    key.pem device.pem return.pem fleet-ca.pem       it is enrolled; the claim is wiped

``device.pem`` is written last, so a device with one has the rest. ``clock`` is its clock's floor.
"""

from __future__ import annotations

import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cryptography import x509

from edge_agent.disk import make_folder, sync_folder, write_file
from edge_agent.errors import IdentityError, StateError
from edge_agent.identity.keys import (
    PrivateKey,
    belongs,
    certificates_from_pem,
    certificates_to_pem,
    common_name,
    key_from_pem,
    key_to_pem,
    new_key,
)

RETURN_PREFIX = "back."
"""Of the common name with which a device comes back after its certificate has ended."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a TLS client shows: its name in the certificate, and the PEM files."""

    name: str
    cert_file: Path
    key_file: Path


@dataclass(frozen=True, slots=True)
class Issued:
    """An identity as the coordinator issued it, checked: see ``edge_agent.identity.issued``."""

    device: x509.Certificate
    comeback: x509.Certificate | None
    authorities: list[x509.Certificate]


class IdentityFolder:
    """Reads and replaces the files of one device's identity; each file is replaced atomically.

    Every method raises :class:`IdentityError` for a file that is not what it should be and
    :class:`StateError` when the disk will not have one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.key_file = folder / "key.pem"
        self.device_file = folder / "device.pem"
        self.return_file = folder / "return.pem"
        self.ca_file = folder / "fleet-ca.pem"
        self.claim_file = folder / "claim.pem"
        self.claim_key_file = folder / "claim-key.pem"
        self.clock_file = folder / "clock"

    @property
    def enrolled(self) -> bool:
        """Whether the device has ever been given a certificate."""
        return self.device_file.exists()

    def key(self) -> PrivateKey:
        """The device's key, made and kept when it is asked for the first time."""
        if not self.key_file.exists():
            if self.enrolled:
                raise IdentityError(
                    f"{self.key_file} is missing, without which {self.device_file} is of no use: "
                    "restore it, or have the device reset (splitfleet fleet reset) and give it a "
                    "new token"
                )
            make_folder(self.folder)
            write_file(self.key_file, key_to_pem(new_key()), private=True)
        self._check_private(self.key_file)
        return self._parse(self.key_file, key_from_pem)

    def certificate(self) -> x509.Certificate | None:
        """The device's certificate, if it is enrolled; it belongs to the device's key."""
        if not self.enrolled:
            return None
        certificate = self._certificate(self.device_file)
        if not belongs(certificate, self.key()):
            raise IdentityError(
                f"{self.device_file} is of another key than {self.key_file}: put files of one "
                "device together"
            )
        return certificate

    def authorities(self) -> list[x509.Certificate]:
        """The certificates of the fleet's authority that this device trusts."""
        return self._parse(self.ca_file, certificates_from_pem)

    def for_fleet(self) -> Credentials:
        """What the device shows to take part in the fleet."""
        certificate = self.certificate()
        if certificate is None:
            raise IdentityError(f"{self.device_file} is missing: the device is not enrolled yet")
        return Credentials(common_name(certificate), self.device_file, self.key_file)

    def for_enrolment(self) -> Credentials:
        """What the device shows where one enrols: its claim, or its return certificate."""
        if self.enrolled:
            if not self.return_file.exists():
                raise IdentityError(
                    f"{self.return_file} is missing, without which the device does not come back "
                    "once its certificate has ended: have the device reset (splitfleet fleet "
                    f"reset), remove {self.device_file.name}, and give it a new token"
                )
            return self._credentials(self.return_file, self.key_file)
        if not self.claim_file.exists():
            raise IdentityError(
                f"{self.folder} holds no identity: put one there that splitfleet fleet add has "
                "made, or a token of splitfleet fleet token"
            )
        self._check_private(self.claim_key_file)
        return self._credentials(self.claim_file, self.claim_key_file)

    def put_token(self, token: bytes) -> None:
        """Take a join token apart: PEM with the fleet's authority, the claim and its key.

        Raises :class:`IdentityError` if this is no token.
        """
        try:
            key = key_from_pem(token)
            certificates = certificates_from_pem(token)
            (claim,) = (one for one in certificates if belongs(one, key))
            first, *others = (one for one in certificates if one is not claim)
        except ValueError as exc:
            raise IdentityError(
                f"this is no join token ({exc}): take the file that splitfleet fleet token wrote"
            ) from exc
        make_folder(self.folder)
        write_file(self.ca_file, certificates_to_pem([first, *others]))
        write_file(self.claim_key_file, key_to_pem(key), private=True)
        write_file(self.claim_file, certificates_to_pem([claim]))

    def put(self, issued: Issued) -> None:
        """Keep what was issued, and wipe the claim: the device is enrolled now."""
        write_file(self.ca_file, certificates_to_pem(issued.authorities))
        if issued.comeback is not None:
            write_file(self.return_file, certificates_to_pem([issued.comeback]))
        write_file(self.device_file, certificates_to_pem([issued.device]))
        self.wipe_claim()

    def wipe_claim(self) -> None:
        """Remove the claim: who reads the card later cannot join with it."""
        for path in (self.claim_key_file, self.claim_file):
            try:
                path.unlink()
            except FileNotFoundError:
                continue
            except OSError as exc:
                raise StateError(
                    f"cannot remove {path}, which is not needed any more: {exc.strerror}"
                ) from exc
            sync_folder(self.folder)

    def _credentials(self, cert_file: Path, key_file: Path) -> Credentials:
        certificate = self._certificate(cert_file)
        if not belongs(certificate, self._parse(key_file, key_from_pem)):
            raise IdentityError(f"{cert_file} is of another key than {key_file}")
        return Credentials(common_name(certificate), cert_file, key_file)

    def _certificate(self, path: Path) -> x509.Certificate:
        return self._parse(path, certificates_from_pem)[0]

    def _parse(self, path: Path, parse: Callable[[bytes], T]) -> T:
        try:
            return parse(path.read_bytes())
        except OSError as exc:
            raise IdentityError(f"cannot read {path}: {exc.strerror}") from exc
        except ValueError as exc:
            raise IdentityError(f"{path} is unusable: {exc}; restore it") from exc

    def _check_private(self, path: Path) -> None:
        try:
            mode = path.stat().st_mode
        except OSError as exc:
            raise IdentityError(f"cannot read {path}: {exc.strerror}") from exc
        if mode & stat.S_IRWXO:
            raise IdentityError(f"others may read {path}: chmod 600 {path}")
