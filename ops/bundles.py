"""Making bundles: a version of the software for the devices of one fleet, signed."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import ValidationError

from coordinator.identity.authority import Authority
from coordinator.identity.keys import new_key, to_pem
from edge_agent.updates.bundle import (
    FORMAT,
    MANIFEST,
    SIGNATURE,
    SIGNER,
    BundleManifest,
    WheelFile,
)
from ops.errors import DiskTrouble, SettingsWrong
from ops.files import check_output
from ops.flash.classes import EXTRAS

SIGNER_DAYS = 3 * 365
DEVICE_EXTRAS = (*EXTRAS.values(), "http")
"""Extras of the package that are of use on a device."""


def make_bundle(
    wheels: Path,
    out: Path,
    authority: Authority,
    *,
    signed: int,
    extras: Sequence[str] = (),
) -> BundleManifest:
    """Write the wheels of a folder, among them one of splitfleet, as a bundle to ``out``.

    It is signed with a key that is forgotten afterwards, certified by the fleet CA. By ``signed``
    (:meth:`RolloutBook.next_signed`) devices tell it from older ones. Raises
    SettingsWrong for a folder that no device can install from or an extra none has, DiskTrouble.
    """
    check_output(out)
    for extra in extras:
        if extra not in DEVICE_EXTRAS:
            raise SettingsWrong(f"--extra {extra!r}: devices have {', '.join(DEVICE_EXTRAS)}")
    files = sorted(wheels.glob("*.whl"))
    if other := [file.name for file in files if not file.is_file()]:
        raise SettingsWrong(f"{other[0]} in {wheels} is no file; take it away")
    ours = [file for file in files if file.name.startswith("splitfleet-")]
    if len(ours) != 1:
        raise SettingsWrong(
            f"{wheels} has {len(ours)} wheels of splitfleet, a bundle has one: make a folder with "
            "pip wheel --wheel-dir FOLDER splitfleet, on a machine like the devices"
        )
    try:
        manifest = BundleManifest(
            format=FORMAT,
            fleet=authority.fleet,
            version=ours[0].name.split("-")[1],
            signed=signed,
            requirement=f"splitfleet[{','.join(extras)}]" if extras else "splitfleet",
            files=[_describe(file) for file in files],
        )
        _write(out, manifest, files, authority)
    except ValidationError as exc:
        first = exc.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise SettingsWrong(f"{wheels} makes no bundle: {where}: {first['msg']}") from None
    except OSError as exc:
        raise DiskTrouble(f"cannot make {out}: {exc}") from exc
    return manifest


def _describe(file: Path) -> WheelFile:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return WheelFile(name=file.name, sha256=digest, size=file.stat().st_size)


def _write(
    out: Path, manifest: BundleManifest, files: Sequence[Path], authority: Authority
) -> None:
    key = new_key()
    content = manifest.model_dump_json(indent=1).encode()
    aside = {
        MANIFEST: content,
        SIGNER: to_pem(authority.issue_signer(key.public_key(), SIGNER_DAYS)),
        SIGNATURE: key.sign(content, ec.ECDSA(hashes.SHA256())),
    }
    temporary = out.with_name(f".{out.name}.new")
    try:
        with tarfile.open(temporary, "w:", format=tarfile.GNU_FORMAT) as tar:
            for name, data in aside.items():
                member = tarfile.TarInfo(name)
                member.size, member.mtime = len(data), manifest.signed
                tar.addfile(member, io.BytesIO(data))
            for described, file in zip(manifest.files, files, strict=True):
                member = tarfile.TarInfo(described.name)
                member.size, member.mtime = described.size, manifest.signed
                with file.open("rb") as stream:
                    tar.addfile(member, stream)
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
