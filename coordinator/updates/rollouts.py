"""Brings a bundle to a fleet, stage by stage: a state machine of its own in the coordinator.

A rollout is entered into the book by ``splitfleet rollout`` and followed from there. A device's
part: waiting → working → done or failed. A stage is over when nobody works on it or is there and
has not begun, and somebody of it is done; those who are away get their turn when they come back.
There is who has said what it runs: devices that take no updates never do.
"""

from __future__ import annotations

import fnmatch
import hashlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from broker.drive import Effect
from broker.envelopes import Envelope, down
from broker.fields import Message
from broker.messages import Command, Status
from broker.update_messages import PIECE_BYTES, Fetch, Piece, Software, Update
from coordinator.errors import IdentityError
from coordinator.identity.fleet import state_dir
from coordinator.identity.roster import FILE, Roster
from coordinator.settings import CoordinatorSettings
from coordinator.updates.book import Part, Progress, Rollout, RolloutBook

log = logging.getLogger("splitfleet.updates")

UPDATES = "updates"
"""The machine that brings bundles to devices."""
LOOK_S = 2.0
TELL_AGAIN_S = 60.0
SETTLE_S = 60.0
"""So long after a connection it is not known yet who is there."""


BUNDLES = "bundles"


def bundle_file(folder: Path, sha256: str) -> Path:
    """Where the bundle with this digest is kept."""
    return folder / f"{sha256}.bundle"


class Rollouts:
    """Follows the book. ``folder`` has the bundles, ``clock`` is monotonic, in seconds."""

    finished = False
    has_work = False

    def __init__(self, book: RolloutBook, folder: Path, *, clock: Callable[[], float]) -> None:
        self._book = book
        self._folder = folder
        self._clock = clock
        self._online: set[str] = set()
        self._told: dict[tuple[str, str], float] = {}
        self._heard: dict[str, float] = {}
        self._settled = math.inf
        self._complaint = ""
        self.next_tick = clock()

    def connected(self) -> list[Effect]:
        """Who is there will say so; until then nobody is judged."""
        self._settled = self._clock() + SETTLE_S
        self._heard.clear()  # what devices said meanwhile was not heard
        return []

    def disconnected(self) -> list[Effect]:
        """Who waits for a piece asks again; nobody is judged meanwhile."""
        self._settled = math.inf
        return []

    def work(self) -> list[Effect]:
        """Nothing."""
        return []

    def receive(self, envelope: Envelope) -> list[Effect]:
        """A device comes or goes, says what it runs, or asks for a piece."""
        device = envelope.address.device
        assert device is not None
        self._heard[device] = self._clock()
        match envelope.message:
            case Status(state="offline"):
                self._online.discard(device)
            case Software() as software:
                self._online.add(device)
                return self._guarded(lambda: self._said(device, software))
            case Fetch() as fetch:
                return [self._to(device, self._piece(fetch))]
        return []

    def tick(self) -> list[Effect]:
        """Follow the rollout under way, and tell those who have not begun."""
        self.next_tick = self._clock() + LOOK_S
        return self._guarded(self._look)

    def close(self) -> None:
        """Let go of the roster."""
        self._book.roster.close()

    def _look(self) -> list[Effect]:
        running = [rollout for rollout in self._book.rollouts() if rollout.state == "running"]
        if running:
            with self._book.roster.change():
                for rollout in running:
                    self._follow(rollout)
        return self._tell()

    def _guarded(self, step: Callable[[], list[Effect]]) -> list[Effect]:
        """Run a step; without the roster's file updates wait, and training goes on."""
        try:
            effects = step()
        except IdentityError as exc:
            if str(exc) != self._complaint:
                log.error("updates wait: %s", exc)  # noqa: TRY400 the message says it all
            self._complaint = str(exc)
            return []
        self._complaint = ""
        return effects

    # -- devices ----------------------------------------------------------------------------------

    def _said(self, device: str, software: Software) -> list[Effect]:
        with self._book.roster.change():
            self._book.heard(device, software)
            rollout = self._book.wanted().get(device)
            return [] if rollout is None else self._follow_device(device, software, rollout)

    def _follow_device(self, device: str, software: Software, rollout: Rollout) -> list[Effect]:
        part = self._book.part(rollout.id, device)
        assert part is not None
        about_this = software.rollout == rollout.id
        if software.version == rollout.version and software.state == "proving" and about_this:
            self._enter(part, "working")
            return [self._to(device, Command(command="proven"))]
        if software.version == rollout.version and software.state == "running":
            self._enter(part, "done")
        elif about_this and software.state == "failed":
            self._enter(part, "failed", software.detail)
        elif about_this:
            self._enter(part, "working")
        elif rollout.state != "stopped" and part.progress in ("waiting", "working"):
            return self._announce(device, rollout)
        return []

    def _enter(self, part: Part, progress: Progress, detail: str = "") -> None:
        if (part.progress, part.detail) == (progress, detail):
            return
        if part.progress != progress:
            log.info("%s: %s of %s", part.device, progress, part.rollout)
        self._book.put_part(part.rollout, part.device, part.stage, progress, detail)

    def _announce(self, device: str, rollout: Rollout) -> list[Effect]:
        self._told[device, rollout.id] = self._clock()
        update = Update(
            rollout=rollout.id,
            version=rollout.version,
            sha256=rollout.sha256,
            size=rollout.size,
            url=rollout.url,
            prove_s=rollout.prove_s,
        )
        return [self._to(device, Command(command="update", update=update))]

    def _piece(self, fetch: Fetch) -> Piece:
        data = b""
        if any(rollout.sha256 == fetch.sha256 for rollout in self._book.rollouts()):
            try:
                with bundle_file(self._folder, fetch.sha256).open("rb") as file:
                    file.seek(fetch.offset)
                    data = file.read(PIECE_BYTES)
            except OSError as exc:
                log.error("a bundle cannot be read: %s", exc)  # noqa: TRY400 the line says it all
        return Piece(sha256=fetch.sha256, offset=fetch.offset, data=data)

    def _to(self, device: str, message: Message) -> Effect:
        return down(device, message)

    # -- stages -----------------------------------------------------------------------------------

    def _follow(self, rollout: Rollout) -> None:
        self._take_in(rollout)
        if self._clock() < self._settled:
            return
        parts = self._book.parts(rollout.id)
        for part in parts:
            if part.progress == "working" and self._is_lost(part, rollout):
                self._enter(part, "failed", "it began, and has said nothing since")
        parts = self._book.parts(rollout.id)
        if reason := why_to_stop(rollout, parts):
            log.warning("rollout %s of version %s stops: %s", rollout.id, rollout.version, reason)
            self._book.put(replace(rollout, state="stopped", reason=reason))
        elif self._is_over(parts):
            last = rollout.stage + 1 == len(rollout.stages)
            log.info("rollout %s: stage %d is over", rollout.id, rollout.stage + 1)
            if last:
                self._book.put(replace(rollout, state="done"))
            else:
                self._book.put(replace(rollout, stage=rollout.stage + 1))

    def _take_in(self, rollout: Rollout) -> None:
        """Give the devices of the stage that are not in it yet their part."""
        known = {part.device for part in self._book.parts(rollout.id)}
        for device in chosen(rollout, self._book.members()):
            if device not in known:
                self._book.put_part(rollout.id, device, rollout.stage, "waiting")

    def _is_lost(self, part: Part, rollout: Rollout) -> bool:
        now = self._clock()
        # What an earlier life of the coordinator heard counts from this one's start.
        return now - self._heard.setdefault(part.device, now) > rollout.patience_s

    def _is_over(self, parts: list[Part]) -> bool:
        at_it = any(
            part.progress == "working"
            or (part.progress == "waiting" and part.device in self._online)
            for part in parts
        )
        return not at_it and any(part.progress == "done" for part in parts)

    def _tell(self) -> list[Effect]:
        effects: list[Effect] = []
        now = self._clock()
        for device, rollout in self._book.wanted().items():
            if rollout.state == "stopped" or device not in self._online:
                continue
            part = self._book.part(rollout.id, device)
            waits = part is not None and part.progress == "waiting"
            if waits and now - self._told.get((device, rollout.id), -math.inf) >= TELL_AGAIN_S:
                effects += self._announce(device, rollout)
        return effects


def open_rollouts(settings: CoordinatorSettings) -> Rollouts | None:
    """The machine of the fleet that the settings name; None without one. Raises IdentityError."""
    if settings.fleet_dir is None:
        return None
    state = state_dir(settings.fleet_dir)
    book = RolloutBook(Roster(state / FILE), clock=time.time)
    return Rollouts(book, state / BUNDLES, clock=time.monotonic)


def why_to_stop(rollout: Rollout, parts: Sequence[Part]) -> str:
    """Which failures are too many for a rollout to go on; empty if it may."""
    failed = sum(part.progress == "failed" for part in parts)
    ended = failed + sum(part.progress == "done" for part in parts)
    too_many = failed > rollout.error_threshold * ended or failed == len(parts)
    return f"{failed} of {ended} devices failed" if failed and too_many else ""


def chosen(rollout: Rollout, members: dict[str, str]) -> list[str]:
    """The devices that a rollout has come to by its current stage; ``members``: name → class.

    Shares are taken in an order that is the rollout's own, so that it is not always the same
    devices that are the first.
    """
    order = sorted(
        members, key=lambda name: hashlib.sha256(f"{rollout.id} {name}".encode()).digest()
    )
    found: set[str] = set()
    for stage in rollout.stages[: rollout.stage + 1]:
        if stage.endswith("%"):
            found.update(order[: math.ceil(len(order) * float(stage[:-1]) / 100)])
        elif stage.startswith("class:"):
            found.update(name for name in order if members[name] == stage.removeprefix("class:"))
        else:
            found.update(fnmatch.filter(order, stage))
    return [name for name in order if name in found]
