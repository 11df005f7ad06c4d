"""A bundle: one version of the software as wheels, signed for one fleet.

A plain tar, in this order: ``manifest.json``, ``signer.pem``, ``manifest.sig``, and the files that
the manifest names. The manifest has the digest of each of them. The signature (ECDSA P-256,
SHA-256, DER) is over the bytes of the manifest; the signer's certificate is of the fleet CA, which
every device knows, and is for signing code and nothing else.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Annotated

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from broker.update_messages import Digest, Version
from edge_agent.errors import BundleError
from edge_agent.identity.keys import issued_by

MANIFEST, SIGNER, SIGNATURE = "manifest.json", "signer.pem", "manifest.sig"
FORMAT = 1
MAX_FILES = 500
_MOST_BYTES_ASIDE = 1 << 20
_BLOCK = 1 << 20

WheelName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.+-]{1,200}\.whl$")]


class WheelFile(BaseModel):
    """A file of a bundle."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: WheelName
    sha256: Digest
    size: int = Field(ge=1, le=2**32)


class BundleManifest(BaseModel):
    """What is in a bundle. ``requirement`` is what pip is asked for, with its extras.

    ``signed`` tells which of two bundles is the newer: unix seconds of the signer's clock, made to
    rise with every bundle. No other clock is compared with it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = Field(ge=FORMAT, le=FORMAT)
    fleet: str
    version: Version
    signed: int = Field(ge=0, le=2**40)
    requirement: Annotated[str, StringConstraints(pattern=r"^splitfleet(\[[a-z,]{1,64}\])?$")]
    files: list[WheelFile] = Field(min_length=1, max_length=MAX_FILES)

    @property
    def bytes(self) -> int:
        """Of all its files."""
        return sum(file.size for file in self.files)


def verify(bundle: Path, authorities: Sequence[x509.Certificate]) -> BundleManifest:
    """The manifest of a bundle that is whole and one of the fleet's CAs vouches for.

    Raises BundleError.
    """
    return _read(bundle, authorities, None)


def unpack(bundle: Path, authorities: Sequence[x509.Certificate], folder: Path) -> BundleManifest:
    """Write the files of a bundle into an empty folder, each verified. Raises BundleError."""
    return _read(bundle, authorities, folder)


def _read(
    bundle: Path, authorities: Sequence[x509.Certificate], folder: Path | None
) -> BundleManifest:
    if not bundle.is_file():
        raise BundleError(f"{bundle} is no file")
    try:
        with bundle.open("rb") as tar:
            manifest = _read_signed(tar, authorities)
            waiting = {file.name: file for file in manifest.files}
            while (member := _next(tar)) is not None:
                file = waiting.pop(member.name, None)
                if file is None or not member.isreg() or member.size != file.size:
                    raise BundleError(
                        f"{bundle} has {member.name!r}, which its manifest has not so"
                    )
                path = Path(os.devnull) if folder is None else folder / file.name
                with path.open("wb") as out:
                    _copy(tar, out, file)
    except (OSError, tarfile.TarError) as exc:
        raise BundleError(f"{bundle} cannot be read: {exc}") from exc
    if waiting:
        raise BundleError(f"{bundle} lacks {min(waiting)}")
    return manifest


def _next(tar: IO[bytes]) -> tarfile.TarInfo | None:
    """The header of the next member, None at the end.

    Read here a block at a time, for what ``tarfile`` does of itself about headers of other kinds
    (whole ones in memory, of any size) would come before the signature is checked.
    """
    start = tar.tell()
    tar.seek(-start % tarfile.BLOCKSIZE, os.SEEK_CUR)
    block = tar.read(tarfile.BLOCKSIZE)
    if not block.strip(b"\0"):
        return None
    member = tarfile.TarInfo.frombuf(block, "utf-8", "replace")
    if member.type == tarfile.GNUTYPE_LONGNAME and 0 < member.size <= tarfile.BLOCKSIZE:
        name = tar.read(tarfile.BLOCKSIZE)[: member.size].rstrip(b"\0")
        member = tarfile.TarInfo.frombuf(tar.read(tarfile.BLOCKSIZE), "utf-8", "replace")
        member.name = name.decode("utf-8", "replace")
    return member


def _read_signed(tar: IO[bytes], authorities: Sequence[x509.Certificate]) -> BundleManifest:
    content, signer, signature = (_small(tar, name) for name in (MANIFEST, SIGNER, SIGNATURE))
    _check_signer(signer, authorities).verify(signature, content)
    try:
        return BundleManifest.model_validate_json(content)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise BundleError(
            f"the bundle's manifest is of another kind: {where}: {first['msg']}"
        ) from None


def _small(tar: IO[bytes], name: str) -> bytes:
    member = _next(tar)
    if member is None or member.name != name or not member.isreg():
        raise BundleError(f"this is no bundle: {name} is not where it should be")
    if not 0 <= member.size <= _MOST_BYTES_ASIDE:
        raise BundleError(f"this is no bundle: {name} has {member.size} bytes")
    return tar.read(member.size)


class _Verifier:
    def __init__(self, key: ec.EllipticCurvePublicKey) -> None:
        self._key = key

    def verify(self, signature: bytes, content: bytes) -> None:
        try:
            self._key.verify(signature, content, ec.ECDSA(hashes.SHA256()))
        except InvalidSignature:
            raise BundleError("the bundle's signature does not fit its manifest") from None


def _check_signer(pem: bytes, authorities: Sequence[x509.Certificate]) -> _Verifier:
    try:
        signer = x509.load_pem_x509_certificate(pem)
        usage = signer.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except (ValueError, x509.ExtensionNotFound) as exc:
        raise BundleError(f"the bundle is not signed by this fleet: {exc}") from exc
    if not any(issued_by(signer, ca) for ca in authorities):
        raise BundleError("the bundle is not signed by this fleet")
    key = signer.public_key()
    if list(usage) != [ExtendedKeyUsageOID.CODE_SIGNING] or not isinstance(
        key, ec.EllipticCurvePublicKey
    ):
        raise BundleError("the bundle is signed by a certificate that is for something else")
    return _Verifier(key)


def _copy(tar: IO[bytes], out: IO[bytes], file: WheelFile) -> None:
    digest = hashlib.sha256()
    left = file.size
    while block := tar.read(min(left, _BLOCK)):
        digest.update(block)
        out.write(block)
        left -= len(block)
    if digest.hexdigest() != file.sha256:
        raise BundleError(f"{file.name} of the bundle is damaged (checksum)")
