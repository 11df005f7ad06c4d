"""What is known of rollouts: tables in the file of the roster, to be backed up with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields
from typing import Literal

from broker.update_messages import Software
from coordinator.identity.roster import Roster

RolloutState = Literal["running", "stopped", "done"]
Progress = Literal["waiting", "working", "done", "failed"]

_SCHEMA = (
    """CREATE TABLE IF NOT EXISTS rollouts (
        id TEXT PRIMARY KEY,
        made REAL NOT NULL,
        version TEXT NOT NULL,
        sha256 TEXT NOT NULL,
        size INTEGER NOT NULL,
        url TEXT,
        stages TEXT NOT NULL,
        error_threshold REAL NOT NULL,
        prove_s REAL NOT NULL,
        patience_s REAL NOT NULL,
        state TEXT NOT NULL,
        stage INTEGER NOT NULL,
        reason TEXT NOT NULL
    ) STRICT""",
    """CREATE TABLE IF NOT EXISTS rollout_devices (
        rollout TEXT NOT NULL,
        device TEXT NOT NULL,
        stage INTEGER NOT NULL,
        progress TEXT NOT NULL,
        detail TEXT NOT NULL,
        since REAL NOT NULL,
        PRIMARY KEY (rollout, device)
    ) STRICT""",
    """CREATE TABLE IF NOT EXISTS software (
        device TEXT PRIMARY KEY,
        version TEXT NOT NULL,
        state TEXT NOT NULL,
        rollout TEXT,
        detail TEXT NOT NULL,
        heard REAL NOT NULL
    ) STRICT""",
    "CREATE TABLE IF NOT EXISTS bundles (signed INTEGER NOT NULL) STRICT",
)


@dataclass(frozen=True, slots=True)
class Rollout:
    """A bundle on its way to devices, in stages.

    A stage is a share of the fleet ("5%", counted from the first stage on), a pattern of names
    ("cam-*"), or a class ("class:raspberry-pi-4"). When more than ``error_threshold`` of those
    that have ended have failed, it stops. A device that says nothing for ``patience_s`` while it is
    at it has failed; ``prove_s`` is how long its new version has to prove itself. ``stage``: the
    one under way. ``reason``: why it stopped. Times are unix seconds.
    """

    id: str
    made: float
    version: str
    sha256: str
    size: int
    url: str | None
    stages: tuple[str, ...]
    error_threshold: float
    prove_s: float
    patience_s: float
    state: RolloutState = "running"
    stage: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Part:
    """A device's part in a rollout, since then."""

    rollout: str
    device: str
    stage: int
    progress: Progress
    detail: str
    since: float


@dataclass(frozen=True, slots=True)
class Reported:
    """What a device said last of its software."""

    device: str
    version: str
    state: str
    rollout: str | None
    detail: str
    heard: float


class RolloutBook:
    """The tables. Methods raise ``IdentityError`` as the roster's do."""

    def __init__(self, roster: Roster, *, clock: Callable[[], float]) -> None:
        self.roster = roster
        self._clock = clock
        with roster.change():
            for table in _SCHEMA:
                roster.execute(table)

    def next_signed(self) -> int:
        """When a bundle is signed that is signed now: unix seconds, later than any before.

        Devices take none that was signed before what has proven itself on them; a clock that was
        set back, or was ahead once, must not keep new ones from them.
        """
        with self.roster.change():
            ((last,),) = self.roster.query("SELECT coalesce(max(signed), 0) FROM bundles")
            signed: int = max(int(self._clock()), last + 1)
            self.roster.execute("DELETE FROM bundles")
            self.roster.execute("INSERT INTO bundles VALUES (?)", signed)
        return signed

    def rollouts(self) -> list[Rollout]:
        """All, newest first."""
        rows = self.roster.query("SELECT * FROM rollouts ORDER BY made DESC, id DESC")
        names = [field.name for field in fields(Rollout)]
        found = (dict(zip(names, row, strict=True)) for row in rows)
        return [
            Rollout(**about | {"stages": tuple(json.loads(about["stages"]))}) for about in found
        ]

    def members(self) -> dict[str, str]:
        """Device → its class, of those who are in the fleet."""
        members = self.roster.devices()
        return {m.name: m.device_class for m in members if m.state == "active"}

    def put(self, rollout: Rollout) -> None:
        """Enter a rollout, or what has changed of it."""
        values = [json.dumps(v) if isinstance(v, tuple) else v for v in astuple(rollout)]
        self.roster.execute(
            "REPLACE INTO rollouts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", *values
        )

    def parts(self, rollout: str) -> list[Part]:
        """The parts of all devices that it has come to, by name."""
        rows = self.roster.query(
            "SELECT * FROM rollout_devices WHERE rollout = ? ORDER BY device", rollout
        )
        return [Part(*row) for row in rows]

    def part(self, rollout: str, device: str) -> Part | None:
        """The part of one device, if it has come to it."""
        rows = self.roster.query(
            "SELECT * FROM rollout_devices WHERE rollout = ? AND device = ?", rollout, device
        )
        return Part(*rows[0]) if rows else None

    def put_part(
        self, rollout: str, device: str, stage: int, progress: Progress, detail: str = ""
    ) -> None:
        """Enter what a device has come to, now."""
        values = rollout, device, stage, progress, detail, self._clock()
        self.roster.execute("REPLACE INTO rollout_devices VALUES (?, ?, ?, ?, ?, ?)", *values)

    def heard(self, device: str, software: Software) -> None:
        """Enter what a device says of its software."""
        said = software.version, software.state, software.rollout, software.detail
        values = device, *said, self._clock()
        self.roster.execute("REPLACE INTO software VALUES (?, ?, ?, ?, ?, ?)", *values)

    def reported(self) -> dict[str, Reported]:
        """What each device said last."""
        return {row[0]: Reported(*row) for row in self.roster.query("SELECT * FROM software")}

    def wanted(self) -> dict[str, Rollout]:
        """Device → the rollout that says what it should run: the newest that it has a part in.

        One that was stopped still says so of those whom it has reached.
        """
        rollouts = {rollout.id: rollout for rollout in self.rollouts()}
        rows = self.roster.query(
            "SELECT p.device, p.rollout FROM rollout_devices p JOIN rollouts r ON r.id = p.rollout "
            "WHERE r.state != 'stopped' OR p.progress != 'waiting' ORDER BY r.made, r.id"
        )
        return {device: rollouts[rollout] for device, rollout in rows}
