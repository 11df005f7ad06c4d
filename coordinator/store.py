"""A run on disk: its checkpoints, of which the last few and the best are kept, and its result.

{root}/current                      the run to resume
{root}/{run}/run.json               its settings
{root}/{run}/attempt.json           round and attempt that were last announced
{root}/{run}/checkpoints/000003/    one of them; see ``coordinator.checkpoint``
{root}/{run}/result.json            after the last round
{root}/{run}/serving.json           which version answers devices, if one was chosen by hand

A checkpoint's folder has the number of its version, or the next free one if that is taken.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.atomic_files import (
    clear_leftovers,
    make_folder,
    remove_folders,
    write_file,
    write_folder,
)
from coordinator.checkpoint import (
    Checkpoint,
    files_of,
    read_checkpoint,
    read_json,
    read_manifest,
    read_score,
    to_json,
)
from coordinator.errors import StoreError
from coordinator.serving_choice import read_choice

log = logging.getLogger("splitfleet.store")
_RESTORE = "restore it from a backup, or start over with --fresh"


@dataclass(frozen=True, slots=True)
class Kept:
    """A checkpoint's folder: its verified manifest, or what is wrong with that."""

    folder: Path
    size: int
    """Bytes of all its files."""
    manifest: dict[str, Any]
    problem: str | None = None


class Store:
    """The folder of one coordinator."""

    def __init__(self, root: Path, *, keep: int = 3) -> None:
        self._root = root
        self._keep = keep
        self._run = ""
        self._damaged: set[Path] = set()
        self._scores: dict[Path, float | None] = {}
        with _disk(root):
            make_folder(root)

    @property
    def folder(self) -> Path:
        """The folder of the current run."""
        return self._root / self._run

    def current(self) -> tuple[str, dict[str, Any]] | None:
        """Name and settings of the run to resume, if there is one."""
        pointer = self._root / "current"
        try:
            run = pointer.read_text("utf-8").strip()
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as exc:
            raise StoreError(f"{pointer} cannot be read: {exc}; {_RESTORE}") from exc
        if not run or not (self._root / run).is_dir():
            raise StoreError(
                f"{pointer} names the run {run!r}, but there is no such folder beside it: write "
                "the name of one into it, or start over with --fresh"
            )
        with _needed():
            settings = read_json(self._root / run / "run.json")
        self._run = run
        return run, settings

    def create(self, run: str, settings: dict[str, Any], first: Checkpoint) -> None:
        """Start a run; the next :meth:`current` finds it. Earlier runs stay where they are."""
        folder = self._root / run
        with _disk(folder):
            make_folder(folder / "checkpoints")
            write_file(folder / "run.json", to_json(settings))
            self._save(folder / "checkpoints", first)
            write_file(self._root / "current", run.encode())
        self._run = run

    def announce(self, round_number: int, attempt: int) -> None:
        """Remember an attempt before it is announced, so that none is ever announced twice."""
        path = self.folder / "attempt.json"
        with _disk(path):
            write_file(path, to_json({"round": round_number, "attempt": attempt}))

    def announced(self) -> tuple[int, int]:
        """Round and attempt last announced; (0, 0) before the first."""
        path = self.folder / "attempt.json"
        if not path.exists():
            return 0, 0
        with _needed():
            data = read_json(path)
            try:
                return int(data["round"]), int(data["attempt"])
            except (KeyError, TypeError, ValueError) as exc:
                raise StoreError(f"{path} is damaged: it names no round and attempt") from exc

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint; remove all but the last few, the best, and what serves by choice."""
        parent = self.folder / "checkpoints"
        with _disk(parent):
            self._save(parent, checkpoint)
        try:
            self._prune(parent)
        except OSError as exc:
            log.warning("old checkpoints in %s cannot be removed: %s", parent, exc)

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; damaged ones are logged and passed over.

        None if the run has none at all. Raises :class:`StoreError` if all it has are damaged.
        """
        folders = _numbered(self.folder / "checkpoints")
        for folder in reversed(folders):
            try:
                checkpoint = read_checkpoint(folder)
            except StoreError as exc:
                log.warning("%s; going back to the checkpoint before", exc)
                self._damaged.add(folder)
                continue
            if folder != folders[-1]:
                # A device may hold the damaged version: its number must not mean other weights.
                checkpoint.version = int(folders[-1].name) + 1
            return checkpoint
        if folders:
            raise StoreError(
                f"no checkpoint in {self.folder} can be read: restore one from a backup, or start "
                "over with --fresh"
            )
        return None

    def best(self) -> Checkpoint | None:
        """The whole checkpoint with the highest score, the newest of equals; None if none has one.

        It may be older than the last few.
        """
        for folder in self._by_score(_numbered(self.folder / "checkpoints")):
            try:
                return read_checkpoint(folder)
            except StoreError as exc:
                log.warning("%s; taking the next best checkpoint", exc)
        return None

    def at(self, version: int) -> Checkpoint | None:
        """The checkpoint of this version; None if it is not kept. Raises :class:`StoreError`."""
        folder = self._by_version().get(version)
        return None if folder is None else read_checkpoint(folder)

    def versions(self) -> list[int]:
        """Which versions :meth:`at` finds, ascending; damaged ones are left out."""
        return sorted(self._by_version())

    def go_back(self, version: int) -> None:
        """Forget the rounds after this version, which is one of :meth:`versions`.

        For who owns all devices and takes them back too: stamps that were announced may come again.
        """
        parent = self.folder / "checkpoints"
        newer = [path.name for kept, path in self._by_version().items() if kept > version]
        with _disk(parent):
            remove_folders(parent, newer)
            (self.folder / "attempt.json").unlink(missing_ok=True)

    def kept(self) -> list[Kept]:
        """All checkpoints, oldest first; parameters are not verified, :meth:`at` does that."""
        found = []
        for folder in _numbered(self.folder / "checkpoints"):
            manifest: dict[str, Any] = {}
            problem = None
            try:
                manifest = read_manifest(folder)
            except StoreError as exc:
                problem = str(exc)
            with contextlib.suppress(FileNotFoundError):  # its coordinator removes it just now
                size = sum(path.stat().st_size for path in folder.iterdir())
                found.append(Kept(folder, size, manifest, problem))
        return found

    def newest(self) -> tuple[int, float] | None:
        """Bytes of the newest checkpoint, and when it was written, in seconds since 1970."""
        folders = _numbered(self.folder / "checkpoints")
        if not folders:
            return None
        try:
            found = [path.stat() for path in folders[-1].iterdir()]
        except OSError:
            return None
        return sum(file.st_size for file in found), max(file.st_mtime for file in found)

    def save_result(self, result: dict[str, Any]) -> None:
        """Write the run's result."""
        path = self.folder / "result.json"
        with _disk(path):
            write_file(path, to_json(result))

    def result_version(self) -> int | None:
        """Of which version the run's result is; None if there is none that can be read."""
        try:
            found = json.loads((self.folder / "result.json").read_bytes())
            return int(found["version"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _save(self, parent: Path, checkpoint: Checkpoint) -> None:
        clear_leftovers(parent)
        newest = max((int(folder.name) for folder in _numbered(parent)), default=-1)
        folder = parent / f"{max(checkpoint.version, newest + 1):06d}"
        write_folder(folder, files_of(checkpoint))

    def _prune(self, parent: Path) -> None:
        folders = _numbered(parent)
        whole = [folder for folder in folders if folder not in self._damaged]
        try:
            chosen = read_choice(self.folder).needed
        except StoreError as exc:
            log.warning("%s; no old checkpoint is removed before", exc)
            return
        kept = {*whole[-self._keep :], *self._by_score(whole)[:1]}
        if chosen:
            kept |= {folder for version, folder in self._by_version().items() if version in chosen}
        old = [folder for folder in folders if folder not in kept]
        remove_folders(parent, [folder.name for folder in old])
        for folder in old:
            self._scores.pop(folder, None)
            self._damaged.discard(folder)

    def _by_version(self) -> dict[int, Path]:
        found = {}
        for folder in _numbered(self.folder / "checkpoints"):
            with contextlib.suppress(StoreError, KeyError):
                found[read_manifest(folder)["version"]] = folder
        return found

    def _by_score(self, folders: list[Path]) -> list[Path]:
        """Those with a score, best first, newest first among equals."""
        scored: list[tuple[float, int, Path]] = []
        for folder in folders:
            if folder not in self._scores:
                self._scores[folder] = read_score(folder)
            score = self._scores[folder]
            if score is not None:
                scored.append((score, int(folder.name), folder))
        return [folder for _, _, folder in sorted(scored, reverse=True)]


def _numbered(parent: Path) -> list[Path]:
    """The folders of checkpoints, oldest first."""
    found = (path for path in parent.glob("[0-9]*") if path.name.isdecimal())
    return sorted(found, key=lambda path: int(path.name))


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise StoreError(
            f"cannot write {path}: {exc.strerror or exc}; free space or choose another folder, "
            "then start again: the run resumes from its last closed round"
        ) from exc


@contextlib.contextmanager
def _needed() -> Iterator[None]:
    """What is read here has nothing to fall back to."""
    try:
        yield
    except StoreError as exc:
        raise StoreError(f"{exc}; {_RESTORE}") from exc
