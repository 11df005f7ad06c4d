"""Disks that fail at a chosen operation, and what a power cut can leave of what was done to one.

`Disk` passes what a program does to a folder on to the real one: it notes every operation and can
end the program, or fill up, at any of them. `power_cuts` plays the notes back on a model of a file
system that keeps only what was synced for certain, and of the rest any part.
"""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

Kind = Literal["mkdir", "create", "write", "fsync", "rename", "remove", "done"]
Failure = Callable[[int, Kind], BaseException | None]
"""Number and kind of an operation → what it raises instead of being done."""


class Killed(BaseException):
    """The process has ended here; nothing it would still have done takes place."""


def killed_at(number: int) -> Failure:
    return lambda at, kind: Killed() if at >= number else None


def full_at(number: int, *, for_good: bool) -> Failure:
    """No space for one operation, or from it on; there is always space to remove something."""

    def failure(at: int, kind: Kind) -> BaseException | None:
        hit = at >= number if for_good else at == number
        if not hit or kind == "remove":
            return None
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return failure


@dataclass(frozen=True, slots=True)
class Operation:
    kind: Kind
    path: Path
    data: bytes = b""
    target: Path = Path()


class Disk:
    """Everything done in and below the folder ``base`` while :meth:`watched`, in order."""

    def __init__(self, base: Path, failure: Failure | None = None) -> None:
        """A write that fails has written half."""
        self.operations: list[Operation] = []
        self._base = base
        self._failure = failure
        self._open: dict[int, Path] = {}

    @property
    def count(self) -> int:
        """Operations so far."""
        return len(self.operations) - sum(noted.kind == "done" for noted in self.operations)

    def done(self, step: int) -> None:
        """Note that a step of the program has returned to its caller."""
        self.operations.append(Operation("done", Path(str(step))))

    @contextlib.contextmanager
    def watched(self) -> Iterator[Disk]:
        real_open, real_fsync, real_path_open = os.open, os.fsync, Path.open

        def path_open(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if mode != "wb" or not self._watches(path):
                return real_path_open(path, mode, *args, **kwargs)
            self._note("create", path)
            file = _WatchedFile(path, self)
            self._open[file.fileno()] = path
            return file

        def open_(path: Any, flags: int, *args: Any, dir_fd: int | None = None, **kw: Any) -> int:
            descriptor = real_open(path, flags, *args, dir_fd=dir_fd, **kw)
            self._open[descriptor] = self._resolve(path, dir_fd)
            return descriptor

        def fsync(descriptor: int) -> None:
            path = self._open.get(descriptor)
            if path is None or not self._watches(path):
                return real_fsync(descriptor)
            return self._note("fsync", path)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "open", path_open)
            patch.setattr(os, "open", open_)
            patch.setattr(os, "fsync", fsync)
            patch.setattr(os, "mkdir", self._watched_change("mkdir", os.mkdir))
            for name in ("rename", "replace"):
                patch.setattr(os, name, self._watched_change("rename", getattr(os, name)))
            for name in ("unlink", "remove", "rmdir"):
                patch.setattr(os, name, self._watched_change("remove", getattr(os, name)))
            yield self

    def write(self, path: Path, data: bytes) -> None:
        """The whole content of a file is about to be written."""
        try:
            self._note("write", path, data)
        except BaseException:
            with io.FileIO(path, "w") as file:
                file.write(data[: len(data) // 2])
            raise

    def _watched_change(self, kind: Kind, real: Callable[..., None]) -> Callable[..., None]:
        def change(path: Any, *args: Any, dir_fd: int | None = None, **kwargs: Any) -> None:
            where = self._resolve(path, dir_fd)
            if self._watches(where):
                self._note(kind, where, target=Path(args[0]) if kind == "rename" else Path())
            if dir_fd is not None:
                kwargs["dir_fd"] = dir_fd
            real(path, *args, **kwargs)

        return change

    def _watches(self, path: Path) -> bool:
        return path.is_relative_to(self._base)

    def _resolve(self, path: Any, dir_fd: int | None) -> Path:
        return Path(path) if dir_fd is None else self._open[dir_fd] / os.fspath(path)

    def _note(self, kind: Kind, path: Path, data: bytes = b"", *, target: Path = Path()) -> None:
        number = self.count
        self.operations.append(Operation(kind, path, data, target))
        if self._failure is not None and (failure := self._failure(number, kind)) is not None:
            raise failure


class _WatchedFile(io.FileIO):
    def __init__(self, path: Path, disk: Disk) -> None:
        super().__init__(path, "w")
        self._path, self._disk = path, disk

    def write(self, data: Any, /) -> int:
        self._disk.write(self._path, bytes(data))
        return super().write(data)


Tree = bytes | tuple[tuple[str, "Tree"], ...]
"""A file's content, or a folder's entries by name."""


@dataclass(eq=False, slots=True)
class _File:
    synced: bytes = b""
    content: bytes = b""

    def sync(self) -> None:
        self.synced = self.content

    def possible(self) -> set[Tree]:
        if self.content == self.synced:
            return {self.content}
        return {self.synced, self.content[: len(self.content) // 2], self.content}


@dataclass(eq=False, slots=True)
class _Folder:
    """Its entries on the disk, and the changes that are not synced, which come there in order."""

    entries: dict[str, _File | _Folder] = field(default_factory=dict)
    changes: list[tuple[str, str, _File | _Folder | None]] = field(default_factory=list)

    def after(self, changes: int) -> dict[str, _File | _Folder]:
        entries = dict(self.entries)
        for gone, come, what in self.changes[:changes]:
            entries.pop(gone, None)
            if what is not None:
                entries[come] = what
        return entries

    @property
    def now(self) -> dict[str, _File | _Folder]:
        return self.after(len(self.changes))

    def sync(self) -> None:
        self.entries, self.changes = self.now, []

    def possible(self) -> set[Tree]:
        found: set[Tree] = set()
        for count in range(len(self.changes) + 1):
            entries = sorted(self.after(count).items(), key=lambda entry: entry[0])
            contents = [what.possible() for _, what in entries]
            for choice in itertools.product(*contents):
                names = (name for name, _ in entries)
                found.add(tuple(zip(names, choice, strict=True)))
        return found


def power_cuts(base: Path, operations: Sequence[Operation]) -> Iterator[tuple[int, Tree]]:
    """Every state a power cut can leave ``base`` in, after any of the operations; it began empty.

    Each comes with the number of steps done by then. Entries of one folder come to the disk in
    order, different folders and files independently; a file may be there by half.
    """
    top = _Folder()
    steps = 0
    seen: set[tuple[int, Tree]] = set()
    for operation in [None, *operations]:
        if operation is not None and operation.kind == "done":
            steps += 1
        elif operation is not None:
            _play(top, base, operation)
        for tree in top.possible():
            if (steps, tree) not in seen:
                seen.add((steps, tree))
                yield steps, tree


def _play(top: _Folder, base: Path, operation: Operation) -> None:
    def find(path: Path) -> _File | _Folder:
        found: _File | _Folder = top
        for part in path.relative_to(base).parts:
            assert isinstance(found, _Folder)
            found = found.now[part]
        return found

    if operation.kind == "fsync":
        find(operation.path).sync()
        return
    folder, name = find(operation.path.parent), operation.path.name
    assert isinstance(folder, _Folder)
    there = folder.now.get(name)
    match operation.kind:
        case "mkdir":
            folder.changes.append((name, name, _Folder()))
        case "create" if isinstance(there, _File):
            there.content = b""
        case "create":
            folder.changes.append((name, name, _File()))
        case "write":
            assert isinstance(there, _File)
            there.content += operation.data
        case "rename":
            assert operation.target.parent == operation.path.parent
            folder.changes.append((name, operation.target.name, there))
        case "remove":
            folder.changes.append((name, name, None))


def write_tree(folder: Path, tree: Tree) -> None:
    """Make a state of :func:`power_cuts` real."""
    assert not isinstance(tree, bytes)
    folder.mkdir()
    for name, content in tree:
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            write_tree(folder / name, content)
