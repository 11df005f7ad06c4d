"""The roster: which devices belong to a fleet, by which certificates, and who may join it.

A SQLite file in write-ahead mode: commands change it while a coordinator runs, which sees so by
:attr:`Roster.generation`. A change is all of a ``with roster.change():`` block or none of it, and
durable when the block has ended; one process changes it at a time, another waits ``BUSY_S``.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Literal

from cryptography import x509

from coordinator.errors import IdentityError
from coordinator.identity.authority import Side, common_name
from coordinator.identity.keys import certificate_from_pem, to_pem

FILE = "registry.sqlite3"
FORMAT = 1
BUSY_S = 10.0
MOST_EVENTS = 10_000

State = Literal["active", "awaited", "revoked", "retired"]
Kind = Literal["device", "return", "claim"]

_SCHEMA = """
CREATE TABLE devices (
    name TEXT PRIMARY KEY,
    state TEXT NOT NULL,
    key TEXT UNIQUE,
    claim TEXT,
    serial TEXT NOT NULL,
    device_class TEXT NOT NULL,
    software TEXT NOT NULL,
    since REAL NOT NULL
) STRICT;
CREATE TABLE claims (
    id TEXT PRIMARY KEY,
    made REAL NOT NULL,
    ends REAL NOT NULL,
    uses INTEGER NOT NULL,
    used INTEGER NOT NULL,
    revoked REAL
) STRICT;
CREATE TABLE certificates (
    serial TEXT PRIMARY KEY,
    side TEXT NOT NULL,
    kind TEXT NOT NULL,
    subject TEXT NOT NULL,
    begins REAL NOT NULL,
    ends REAL NOT NULL,
    revoked REAL,
    pem BLOB NOT NULL
) STRICT;
CREATE INDEX certificates_of ON certificates (subject, ends);
CREATE TABLE events (
    id INTEGER PRIMARY KEY,
    time REAL NOT NULL,
    kind TEXT NOT NULL,
    subject TEXT NOT NULL,
    detail TEXT NOT NULL
) STRICT;
"""


@dataclass(frozen=True, slots=True)
class Member:
    """A device of the fleet. Times are unix seconds.

    *active*: its key gets certificates. *awaited*: it may enrol with a new key. *revoked*: it stays
    out. *retired*: it is no more, and its name is free. ``key`` is its fingerprint, ``claim`` the
    token it came with.
    """

    name: str
    state: State
    key: str | None
    claim: str | None
    serial: str
    device_class: str
    software: str
    since: float


@dataclass(frozen=True, slots=True)
class Claim:
    """A join token: good for ``uses`` devices until ``ends``."""

    id: str
    made: float
    ends: float
    uses: int
    used: int
    revoked: float | None


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to ``subject``."""

    time: float
    kind: str
    subject: str
    detail: str


class Roster:
    """The file, opened. For one thread at a time; ``clock`` gives unix seconds.

    Every method raises :class:`IdentityError` when the file cannot be read or written.
    """

    def __init__(
        self, path: Path, *, create: bool = False, clock: Callable[[], float] = time.time
    ) -> None:
        if not create and not path.exists():
            raise IdentityError(
                f"there is no roster {path}; make a fleet with splitfleet fleet init"
            )
        self.path = path
        self._clock = clock
        with self._told():
            if create:
                path.touch(0o600, exist_ok=False)
            self._connection = sqlite3.connect(
                path, timeout=BUSY_S, isolation_level=None, check_same_thread=False
            )
        try:
            self._begin(create=create)
        except BaseException:
            self.close()
            raise

    def _begin(self, *, create: bool) -> None:
        with self._told():
            self._run("PRAGMA journal_mode = WAL")
            self._run("PRAGMA synchronous = FULL")
            if create:
                self._connection.executescript(
                    f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {FORMAT}; COMMIT;"
                )
            (found,) = self._one("PRAGMA user_version")
        if found != FORMAT:
            raise IdentityError(
                f"{self.path} has format {found}, this version of splitfleet reads {FORMAT}; "
                "use the version that wrote it, or restore a backup"
            )

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()

    @property
    def generation(self) -> int:
        """Changes whenever somebody else has changed the roster."""
        with self._told():
            return int(self._one("PRAGMA data_version")[0])

    @contextlib.contextmanager
    def change(self) -> Iterator[None]:
        """Everything in the block, or nothing if it raises; alone."""
        with self._told():
            self._run("BEGIN IMMEDIATE")
        try:
            yield
            with self._told():
                self._run("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._run("ROLLBACK")
            raise

    def copy_to(self, path: Path) -> None:
        """A copy that is whole, whatever happens meanwhile."""
        with self._told(), contextlib.closing(sqlite3.connect(path)) as copy:
            self._connection.backup(copy)

    # -- devices ----------------------------------------------------------------------------------

    def device(self, name: str) -> Member | None:
        """The device of a name, retired ones too."""
        rows = self._all("SELECT * FROM devices WHERE name = ?", name)
        return Member(*rows[0]) if rows else None

    def device_with(self, key: str) -> Member | None:
        """The device that a key belongs to."""
        rows = self._all("SELECT * FROM devices WHERE key = ?", key)
        return Member(*rows[0]) if rows else None

    def devices(self) -> list[Member]:
        """All that are not retired, by name."""
        rows = self._all("SELECT * FROM devices WHERE state != 'retired' ORDER BY name")
        return [Member(*row) for row in rows]

    def retired(self) -> frozenset[str]:
        """The names of those that are no more."""
        return frozenset(
            n for (n,) in self._all("SELECT name FROM devices WHERE state = 'retired'")
        )

    def put_device(self, member: Member) -> None:
        """Enter a device, or what has changed of it."""
        with self._told():
            self._run("REPLACE INTO devices VALUES (?, ?, ?, ?, ?, ?, ?, ?)", *astuple(member))

    # -- certificates -----------------------------------------------------------------------------

    def add_certificate(self, side: Side, kind: Kind, certificate: x509.Certificate) -> None:
        """Note what was issued; forget what ended more than a day ago and is on no list."""
        now = self._clock()
        begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        with self._told():
            self._run(
                "INSERT INTO certificates VALUES (?, ?, ?, ?, ?, ?, NULL, ?)",
                f"{certificate.serial_number:x}",
                side,
                kind,
                common_name(certificate),
                begins.timestamp(),
                ends.timestamp(),
                to_pem(certificate),
            )
            self._run("DELETE FROM certificates WHERE ends < ? AND revoked IS NULL", now - 86_400.0)

    def certificate(self, subject: str) -> x509.Certificate | None:
        """The newest of a common name that is not revoked; it may have ended."""
        rows = self._all(
            "SELECT pem FROM certificates WHERE subject = ? AND revoked IS NULL "
            "ORDER BY ends DESC LIMIT 1",
            subject,
        )
        return certificate_from_pem(rows[0][0], str(self.path)) if rows else None

    def spans(self, kind: Kind) -> dict[str, tuple[float, float]]:
        """Common name → begin and end of its newest certificate of a kind that is not revoked."""
        rows = self._all(
            "SELECT subject, begins, MAX(ends) FROM certificates "
            "WHERE kind = ? AND revoked IS NULL GROUP BY subject",
            kind,
        )
        return {subject: (begins, ends) for subject, begins, ends in rows}

    def revoke_certificates(self, *subjects: str) -> None:
        """Put all of these common names on the lists."""
        with self._told():
            for subject in subjects:
                self._run(
                    "UPDATE certificates SET revoked = ? WHERE subject = ? AND revoked IS NULL",
                    self._clock(),
                    subject,
                )

    def revoked(self, side: Side) -> dict[int, float]:
        """Serial number → when it was revoked, of what would be valid otherwise."""
        rows = self._all(
            "SELECT serial, revoked FROM certificates "
            "WHERE side = ? AND revoked IS NOT NULL AND ends > ?",
            side,
            self._clock(),
        )
        return {int(serial, 16): when for serial, when in rows}

    def knows(self, serial: int) -> bool:
        """Whether a certificate with this serial number is in the books."""
        return bool(self._all("SELECT 1 FROM certificates WHERE serial = ?", f"{serial:x}"))

    # -- claims -----------------------------------------------------------------------------------

    def claim(self, claim_id: str) -> Claim | None:
        """The join token of this id."""
        rows = self._all("SELECT * FROM claims WHERE id = ?", claim_id)
        return Claim(*rows[0]) if rows else None

    def claims(self) -> list[Claim]:
        """All join tokens, newest first."""
        return [Claim(*row) for row in self._all("SELECT * FROM claims ORDER BY made DESC, id")]

    def put_claim(self, claim: Claim) -> None:
        """Enter a token, or what has changed of it."""
        with self._told():
            self._run("REPLACE INTO claims VALUES (?, ?, ?, ?, ?, ?)", *astuple(claim))

    # -- events -----------------------------------------------------------------------------------

    def record(self, kind: str, subject: str, detail: str = "") -> None:
        """Note what happened; of the oldest beyond ``MOST_EVENTS`` nothing is kept."""
        with self._told():
            self._run(
                "INSERT INTO events (time, kind, subject, detail) VALUES (?, ?, ?, ?)",
                *(self._clock(), kind, subject, detail),
            )
            self._run(
                "DELETE FROM events WHERE id <= (SELECT MAX(id) FROM events) - ?", MOST_EVENTS
            )

    def events(self, most: int) -> list[Event]:
        """The last ones, newest first."""
        rows = self._all(
            "SELECT time, kind, subject, detail FROM events ORDER BY id DESC LIMIT ?", most
        )
        return [Event(*row) for row in rows]

    # -- tables of others -------------------------------------------------------------------------

    def execute(self, statement: str, *values: Any) -> None:
        """Change a table that somebody else keeps in this file."""
        with self._told():
            self._run(statement, *values)

    def query(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        """Rows of a table that somebody else keeps in this file."""
        return self._all(statement, *values)

    # -- SQLite -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as exc:
            raise IdentityError(
                f"the roster {self.path} cannot be used: {exc}; free space, correct its rights, or "
                "restore a backup"
            ) from exc

    def _run(self, statement: str, *values: Any) -> None:
        self._connection.execute(statement, values)

    def _one(self, statement: str) -> tuple[Any, ...]:
        row: tuple[Any, ...] = self._connection.execute(statement).fetchone()
        return row

    def _all(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._told():
            return self._connection.execute(statement, values).fetchall()
