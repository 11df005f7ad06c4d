"""Writing a device's files: what is to change is found first, and shown, and then done."""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ops.errors import DiskTrouble, SettingsWrong
from ops.flash.payload import FOLDER, MARK, File
from ops.flash.targets import Target

_RESERVE = 4 << 20
"""Bytes that stay free: a file system that is full cannot even be repaired."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a target lacks; ``kept`` are the files that are there as they should be."""

    removed: tuple[str, ...]
    written: tuple[File, ...]
    kept: tuple[File, ...]


def make_plan(target: Target, files: Sequence[File], *, replace: bool) -> Plan:
    """What has to be done so that the target has ``files``, and below ``splitfleet/`` no others.

    Raises :class:`SettingsWrong` for lack of space, and for files of somebody else's unless
    ``replace``.
    """
    plan = _compare(target, files, replace=replace)
    needed = sum(file.size for file in plan.written)
    if plan.written and needed + _RESERVE > target.free:
        raise SettingsWrong(
            f"{needed / 1e6:.0f} MB are to be written and there is room for "
            f"{max(0, target.free - _RESERVE) / 1e6:.0f} MB: take a larger boot partition, or let "
            "the device install from a package index (--index)"
        )
    removed = sorted(target.below(FOLDER) - {file.path for file in files})
    return Plan(tuple(removed), plan.written, plan.kept)


def with_seed(plan: Plan, target: Target, seed: Sequence[File], *, replace: bool) -> Plan:
    """The plan and, at its end, what the seed lacks. Raises :class:`SettingsWrong` likewise."""
    more = _compare(target, seed, replace=replace)
    return Plan(plan.removed, plan.written + more.written, plan.kept + more.kept)


def carry_out(target: Target, plan: Plan) -> None:
    """Do it; the seed last, so that half a card installs nothing. Raises :class:`DiskTrouble`."""
    for path in plan.removed:
        target.remove(path)
    for file in plan.written:
        target.write(file.path, file.read())
    os.sync()


def write_bundle(path: Path, files: Sequence[File]) -> None:
    """Write ``files`` as a tar.gz that only its owner can read. Raises :class:`DiskTrouble`."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        with contextlib.ExitStack() as stack:
            stack.callback(temporary.unlink, missing_ok=True)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            out = stack.enter_context(open(descriptor, "wb"))  # noqa: PTH123 of a descriptor
            # Wheels are packed already.
            with tarfile.open(fileobj=out, mode="w:gz", compresslevel=1) as tar:
                for file in files:
                    member = tarfile.TarInfo(file.path)
                    member.size = file.size
                    member.mode = 0o600 if file.secret else 0o644
                    tar.addfile(member, io.BytesIO(file.read()))
            out.flush()
            os.fsync(out.fileno())
            temporary.replace(path)
    except OSError as exc:
        raise DiskTrouble(f"cannot write {path}: {exc.strerror}") from exc


def describe(plan: Plan) -> str:
    """The plan for a person, with the text of everything that is text and no secret."""
    lines = [f"remove {path}" for path in plan.removed]
    lines += [f"keep   {file.path} ({file.size} bytes)" for file in plan.kept]
    for file in plan.written:
        lines.append(f"write  {file.path} ({file.size} bytes{', secret' if file.secret else ''})")
        if isinstance(file.content, bytes) and not file.secret:
            lines += [f"       | {line}" for line in file.content.decode().splitlines()]
    return "\n".join(lines)


def _compare(target: Target, files: Sequence[File], *, replace: bool) -> Plan:
    written, kept = [], []
    for file in files:
        there = target.read(file.path)
        if there is not None and there == file.read():
            kept.append(file)
            continue
        if there is not None and not replace and not _ours(file.path, there):
            raise SettingsWrong(
                f"there is a {file.path} already that somebody else wrote; --replace replaces it"
            )
        written.append(file)
    return Plan((), tuple(written), tuple(kept))


def _ours(path: str, there: bytes) -> bool:
    """Whether a file may be replaced: of ours, the meta-data that is merged, or an example."""
    if path.startswith(f"{FOLDER}/") or path == "meta-data" or MARK.encode() in there:
        return True
    lines = (line.strip() for line in there.decode("utf-8", "replace").splitlines())
    return not any(line and not line.startswith("#") for line in lines)
