"""What every image of a device has been released with, on disk: it only ever grows."""

from __future__ import annotations

import logging
import math
import os
import sqlite3
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_agent.disk import make_folder, sync_folder
from edge_agent.errors import StateError

log = logging.getLogger("splitfleet.agent")

FILE = "privacy.sqlite3"
_LAYOUT = "1"
_BUSY_S = 10.0
_TABLES = """
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE images (
    key BLOB PRIMARY KEY, rho REAL NOT NULL, releases INTEGER NOT NULL
) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class Summary:
    """An account at a glance; ρ in zCDP, of images that were released at least once."""

    since: float
    """When it was begun, in seconds of Unix time; what was released before is not in it."""
    images: int
    releases: int
    rho_max: float
    """Of the image released most; infinite if it was released without noise."""
    rho_median: float
    exhausted: int
    """Images that would go beyond the budget with another release."""
    without_noise: int
    """Images released without noise since the account was begun."""


class PrivacyAccount:
    """Adds up ρ for each image and refuses what goes beyond the budget.

    ``folder`` is where it is kept, None in memory. An entry is durable before :meth:`charge`
    returns, so that a device that dies then has booked too much rather than too little. It never
    forgets: with ``most_images`` in it no further image is released. Several machines, and several
    processes, may keep one account. It is begun where there is no file, and only there.

    Raises :class:`StateError` if the file is damaged or cannot be made.
    """

    def __init__(
        self, folder: Path | None, *, budget: float | None = None, most_images: int = 1_000_000
    ) -> None:
        self.budget = math.inf if budget is None else budget
        self._most_images = most_images
        self._path = None if folder is None else folder / FILE
        self._lock = threading.Lock()
        if folder is not None:
            make_folder(folder)
        try:
            if self._path is not None and not self._path.exists():
                _begin(self._path)
            self._file = sqlite3.connect(
                self._path or ":memory:",
                timeout=_BUSY_S,
                isolation_level=None,
                check_same_thread=False,
            )
            self._file.execute("PRAGMA journal_mode = WAL")
            self._file.execute("PRAGMA synchronous = FULL")
            if self._path is None:
                _fill(self._file)
            found = dict(self._file.execute("SELECT name, value FROM about"))
            self._since = float(found.get("since", ""))
            self._file.execute("SELECT key, rho, releases FROM images LIMIT 1")
        except (sqlite3.Error, OSError, ValueError) as exc:
            raise StateError(
                f"{self._path} is unusable ({exc}): nothing may be released without the account of "
                "what was. Restore it, or free some space; begin anew only with new images"
            ) from exc
        if found.get("layout") != _LAYOUT:
            raise StateError(f"{self._path} is of a later version of splitfleet: update this one")

    def charge(self, keys: Sequence[bytes], rho: float) -> NDArray[np.bool_]:
        """Book a release of ρ for each image that may have it; which ones those are (N,).

        A key that comes twice is released twice. If the disk will not have it, none may.
        """
        with self._lock:
            try:
                self._file.execute("BEGIN IMMEDIATE")
                allowed = self._book(keys, rho)
                self._file.execute("COMMIT")
            except sqlite3.Error as exc:
                log.warning("%s: %s; nothing is released that cannot be booked", self._path, exc)
                if self._file.in_transaction:
                    self._file.execute("ROLLBACK")
                return np.zeros(len(keys), bool)
        return allowed

    def spent(self, key: bytes) -> float:
        """ρ of all releases of an image so far."""
        with self._lock:
            row = self._look_up("SELECT rho FROM images WHERE key = ?", key)
        return 0.0 if row is None else float(row[0])

    def summary(self, next_rho: float = 0.0) -> Summary:
        """The account at a glance; ``next_rho`` is what another release would cost."""
        with self._lock:
            one = self._look_up(
                "SELECT COUNT(*), TOTAL(releases), IFNULL(MAX(rho), 0), "
                "IFNULL(SUM(rho <= 1e308 AND rho + ? > ?), 0), IFNULL(SUM(rho > 1e308), 0) "
                "FROM images",
                next_rho,
                self.budget,
            )
            images, releases, rho_max, exhausted, without_noise = one
            median = self._look_up(
                "SELECT rho FROM images ORDER BY rho LIMIT 1 OFFSET ?", images // 2
            )
        return Summary(
            since=self._since,
            images=images,
            releases=int(releases),
            rho_max=float(rho_max),
            rho_median=0.0 if median is None else float(median[0]),
            exhausted=exhausted,
            without_noise=without_noise,
        )

    def close(self) -> None:
        """Give the file back."""
        self._file.close()

    def _look_up(self, query: str, *values: bytes | float) -> Any:
        """The first row, None if there is none."""
        try:
            return self._file.execute(query, values).fetchone()
        except sqlite3.Error as exc:
            raise StateError(f"{self._path} cannot be read ({exc}): restore it") from exc

    def _book(self, keys: Sequence[bytes], rho: float) -> NDArray[np.bool_]:
        allowed = np.zeros(len(keys), bool)
        # Kept beside them: to count a million takes longer than to book a batch.
        (known,) = self._file.execute("SELECT value FROM about WHERE name = 'images'").fetchone()
        known = int(known)
        for row, key in enumerate(keys):
            found = self._file.execute("SELECT rho FROM images WHERE key = ?", (key,)).fetchone()
            if found is None and known >= self._most_images:
                continue
            if (0.0 if found is None else found[0]) + rho > self.budget:
                continue
            self._file.execute(
                "INSERT INTO images VALUES (?, ?, 1) ON CONFLICT (key) DO UPDATE "
                "SET rho = rho + excluded.rho, releases = releases + 1",
                (key, rho),
            )
            known += found is None
            allowed[row] = True
        self._file.execute("UPDATE about SET value = ? WHERE name = 'images'", (str(known),))
        return allowed


def _begin(path: Path) -> None:
    """Make an empty account: there whole or not at all, and never in place of another."""
    with tempfile.TemporaryDirectory(prefix=f"{FILE}.", dir=path.parent) as place:
        new = Path(place) / FILE
        with closing(sqlite3.connect(new, isolation_level=None)) as file:
            _fill(file)
        with suppress(FileExistsError):  # another process was first
            os.link(new, path)
    sync_folder(path.parent)


def _fill(file: sqlite3.Connection) -> None:
    file.executescript(_TABLES)
    about = {"layout": _LAYOUT, "since": repr(time.time()), "images": "0"}
    file.executemany("INSERT INTO about VALUES (?, ?)", about.items())


def read_summary(folder: Path, *, budget: float | None = None, next_rho: float = 0.0) -> Summary:
    """The account that an agent keeps in its state folder, which may be running.

    Raises :class:`StateError` if there is none.
    """
    if not (folder / FILE).exists():
        raise StateError(
            f"{folder} has no account of releases: an agent begins one when it first adds noise "
            "(noise_std, clip_norm)"
        )
    with closing(PrivacyAccount(folder, budget=budget)) as account:
        return account.summary(next_rho)
