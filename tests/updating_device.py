"""A device that takes updates, and whoever sends them, without processes or network."""

from __future__ import annotations

import hashlib
import io
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from broker.drive import Effect
from broker.envelopes import Envelope, down
from broker.messages import Command
from broker.update_messages import Fetch, Piece, Software, Update
from coordinator.identity.authority import Authority
from edge_agent.errors import BundleError
from edge_agent.updates.bundle import BundleManifest
from edge_agent.updates.fetching import HttpDownload, Response
from edge_agent.updates.slots import Slots
from edge_agent.updates.updater import Updater
from tests import bundles
from tests.tiny import Clock

PIECE = 40_000

M = TypeVar("M")


class Installed:
    """An installation that is done at the third look, or fails."""

    def __init__(self, place: Path, problem: str | None) -> None:
        self.place, self.problem = place, problem
        self.looks = 0
        self.cancelled = False

    def poll(self) -> bool:
        self.looks += 1
        if self.looks < 3:
            return False
        if self.problem is not None:
            raise BundleError(self.problem)
        return True

    def cancel(self) -> None:
        self.cancelled = True


class Lab:
    """A device, the bundle that is announced to it, and what it has said."""

    def __init__(self, folder: Path, authority: Authority, bundle: bytes | None = None) -> None:
        self.bundle = bundle or bundles.make(folder, authority).read_bytes()
        self.authority = authority
        self.slots = Slots(folder / "updates")
        self.slots.folder.mkdir()
        self.clock = Clock()
        self.problem: str | None = None
        self.installations: list[Installed] = []
        self.wheels: list[str] = []
        self.responses: list[Any] = []
        self.requested: list[str | None] = []
        self.updater = self.boot("1.0.0")

    def boot(self, version: str) -> Updater:
        """The agent starts, with this version of its software."""
        self.updater = Updater(
            "cam-1",
            version,
            self.slots,
            fleet=bundles.FLEET,
            authorities=lambda: [self.authority.ca("fleet")],
            clock=self.clock,
            install=self._install,
            download=lambda update, partial: HttpDownload(update, partial, urlopen=self._urlopen),
        )
        return self.updater

    def update(self, **changes: Any) -> Update:
        about: dict[str, Any] = {
            "rollout": "r1",
            "version": "1.1.0",
            "sha256": hashlib.sha256(self.bundle).hexdigest(),
            "size": len(self.bundle),
            "prove_s": 600.0,
        }
        return Update(**about | changes)

    def announce(self, **changes: Any) -> list[Effect]:
        return self.hear(Command(command="update", update=self.update(**changes)))

    def hear(self, message: Command | Piece) -> list[Effect]:
        return self.updater.receive(down("cam-1", message))

    def answer(self, fetch: Fetch) -> list[Effect]:
        data = self.bundle[fetch.offset : fetch.offset + PIECE]
        return self.hear(Piece(sha256=fetch.sha256, offset=fetch.offset, data=data))

    def fetch_all(self, effects: Sequence[Effect]) -> list[Effect]:
        while fetches := said(effects, Fetch):
            (fetch,) = fetches
            effects = self.answer(fetch)
        return list(effects)

    def run(self) -> list[Effect]:
        """Work and time, until nothing more happens by itself or the process ends."""
        effects: list[Effect] = []
        for _ in range(1000):
            if self.updater.finished:
                break
            if self.updater.has_work:
                effects += self.updater.work()
            elif self.updater.next_tick is not None and not self.slots.on_trial:
                self.clock.now = self.updater.next_tick
                effects += self.updater.tick()
            else:
                break
        return effects

    def _install(
        self, manifest: BundleManifest, wheels: Path, place: Path, *, clock: Callable[[], float]
    ) -> Installed:
        self.wheels = sorted(file.name for file in wheels.iterdir())
        self.installations.append(Installed(place, self.problem))
        return self.installations[-1]

    def _urlopen(self, request: Any, *, timeout: float) -> Response:
        self.requested.append(request.get_header("Range"))
        if not self.responses:
            opened: Response = urllib.request.urlopen(request, timeout=timeout)  # noqa: S310 as the agent does
            return opened
        response = self.responses.pop(0)
        if isinstance(response, Exception):
            raise response
        assert isinstance(response, io.BytesIO | Trickle)
        return response


def said(effects: Sequence[Effect], kind: type[M]) -> list[M]:
    found = [effect.message for effect in effects if isinstance(effect, Envelope)]
    return [message for message in found if isinstance(message, kind)]


def states(effects: Sequence[Effect]) -> list[str]:
    return [message.state for message in said(effects, Software)]


def take_announced(lab: Lab) -> None:
    """Until the version is proven, if it is not yet."""
    lab.updater.connected()
    lab.fetch_all(lab.announce())
    lab.run()
    if lab.updater.finished:
        lab.boot("1.1.0")
    lab.hear(Command(command="proven"))


def take(lab: Lab, signed: int, version: str, rollout: str) -> Software:
    """A bundle is announced, fetched, installed and proven; what is said last."""
    folder = lab.slots.folder.parent / rollout
    folder.mkdir()
    lab.bundle = bundles.make(folder, lab.authority, version, signed=signed).read_bytes()
    effects = lab.fetch_all(lab.announce(version=version, rollout=rollout)) + lab.run()
    if lab.updater.finished:
        lab.boot(version)
        effects += lab.hear(Command(command="proven"))
    return said(effects, Software)[-1]


class Trickle:
    """A server that sends a byte now and then."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def read1(self, size: int, /) -> bytes:
        self._clock.now += 300.0
        return b"x"

    def close(self) -> None:
        pass
