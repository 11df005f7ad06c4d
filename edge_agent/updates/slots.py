"""Versions side by side on a device, and which of them runs.

    FOLDER/versions/VERSION/     a virtual environment
    FOLDER/current               the version that is started; without it the one that was flashed
    FOLDER/trial                 "PREVIOUS STARTS SECONDS ROLLOUT SIGNED" while current is on trial
    FOLDER/failed                "ROLLOUT REASON" of the last trial that ended badly
    FOLDER/signed                when the newest bundle was signed that has proven itself here

``start.sh`` starts what is current, and takes back a trial that ends badly: also when the new
version does not start, hangs, or has forgotten how to do it itself. Text files, because a shell
reads them.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from broker.fields import Name
from broker.update_messages import Version
from edge_agent.disk import sync_folder, write_file
from edge_agent.errors import StateError

FLASHED = "-"
"""Stands for the version that was flashed, which is no version of the folder."""
STARTS = 2
"""How often a version on trial is started: once, and again if the power went."""
KEPT = 2
"""Versions that stay: the current one and the one before."""
_TRIAL = 5
"""Words of the file ``trial``."""
_VERSION: TypeAdapter[str] = TypeAdapter(Version)
_NAME: TypeAdapter[str] = TypeAdapter(Name)


@dataclass(frozen=True, slots=True)
class Failure:
    """A rollout that failed here, and why."""

    rollout: str
    reason: str


class Slots:
    """The versions in ``folder``. Raises StateError where the disk does not do as it should."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._versions = folder / "versions"

    @property
    def current(self) -> str:
        """The version that is started, or ``FLASHED``."""
        version = self._line("current")
        return version if _is(_VERSION, version) else FLASHED

    @property
    def on_trial(self) -> bool:
        """Whether the current version has not proven itself yet."""
        # A switch that was broken off leaves the trial of a version that is not current yet.
        before, *_ = self._line("trial").split() or [self.current]
        return before != self.current

    @property
    def rollout(self) -> str | None:
        """The rollout whose version is on trial."""
        trial = self._line("trial").split()
        return trial[3] if len(trial) == _TRIAL and _is(_NAME, trial[3]) else None

    @property
    def signed(self) -> int:
        """When the newest bundle was signed that has proven itself; 0 if none has."""
        return _number(self._line("signed"))

    @property
    def failure(self) -> Failure | None:
        """The last failure; forgotten when another version is tried."""
        rollout, _, reason = self._line("failed").partition(" ")
        return Failure(rollout, reason) if _is(_NAME, rollout) else None

    def fail(self, rollout: str, reason: str) -> None:
        """Remember that a rollout has failed here before its version could be tried."""
        with self._disk():
            self._write("failed", f"{rollout} {' '.join(reason.split())}")

    def place(self, version: str) -> Path:
        """Where a version is, or is to be, installed."""
        return self._versions / version

    def prepare(self, version: str) -> Path:
        """An empty place for a version that does not run; others than the current are removed."""
        with self._disk():
            if version == self.current:  # its place is damaged, and the flashed one runs
                self._write("current", FLASHED)
            self._versions.mkdir(parents=True, exist_ok=True)
            self._remove_but({self.current})
            self.place(version).mkdir()
        return self.place(version)

    def try_out(self, version: str, rollout: str, *, signed: int, prove_s: float) -> None:
        """Have ``version`` started from now on, on trial for ``prove_s`` seconds.

        ``signed``: when its bundle was.
        """
        before = self.current
        with self._disk():
            (self.folder / "failed").unlink(missing_ok=True)
            # In this order: a trial with the version before still current is dropped by start.sh.
            seconds = max(1, round(prove_s))
            self._write("trial", f"{before} {STARTS} {seconds} {rollout} {signed}")
            self._write("current", version)

    def prove(self) -> None:
        """The current version is the one to keep, and none signed before it is taken any more."""
        trial = self._line("trial").split()
        signed = _number(trial[4]) if len(trial) == _TRIAL else 0
        with self._disk():
            if signed > self.signed:
                self._write("signed", str(signed))
            (self.folder / "trial").unlink(missing_ok=True)
            sync_folder(self.folder)

    def _remove_but(self, kept: set[str]) -> None:
        for place in self._versions.iterdir():
            if place.name not in kept:
                shutil.rmtree(place)

    def _line(self, name: str) -> str:
        try:
            return (self.folder / name).read_text("utf-8", "replace").strip()
        except OSError:
            return ""

    def _write(self, name: str, text: str) -> None:
        write_file(self.folder / name, f"{text}\n".encode())

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise StateError(f"cannot keep versions in {self.folder}: {exc.strerror}") from exc


def _is(kind: TypeAdapter[str], text: str) -> bool:
    try:
        kind.validate_python(text)
    except ValidationError:
        return False
    return True


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 14 else 0
