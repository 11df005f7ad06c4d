"""What a device does about updates: a state machine of its own, beside training and answering.

running ─Update→ fetching → installing ─(ends; start.sh starts the new one)→ proving → running
└───────────┴──→ failed          start.sh ──(not proven)──→ failed
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

from cryptography import x509

from broker.drive import Effect
from broker.envelopes import Envelope, up
from broker.messages import Command, Coordinator
from broker.update_messages import PIECE_BYTES, Fetch, Piece, Software, SoftwareState, Update
from edge_agent.disk import make_folder
from edge_agent.errors import AgentError, BundleError
from edge_agent.identity.folder import IdentityFolder
from edge_agent.settings import AgentSettings
from edge_agent.updates.bundle import BundleManifest, unpack
from edge_agent.updates.fetching import HttpDownload, PartialBundle
from edge_agent.updates.installing import Installation, VenvInstallation
from edge_agent.updates.slots import Slots

log = logging.getLogger("splitfleet.updates")

ASK_AGAIN_S = 15.0
RETRY_HTTP_S = 30.0
GIVE_UP_S = 24 * 3600.0
"""A fetch to which not even another ``PIECE_BYTES`` came in so long has failed."""
_LOOK_S = 0.5


class Install(Protocol):
    """Begins an installation; :class:`VenvInstallation`."""

    def __call__(
        self, manifest: BundleManifest, wheels: Path, place: Path, *, clock: Callable[[], float]
    ) -> Installation: ...


class Updater:
    """Fetches, checks and installs what the coordinator announces, and proves itself afterwards.

    ``running`` is the version that runs, ``authorities`` reads the fleet's CAs, one of which must
    vouch for a bundle.
    When :attr:`finished` the process is to end: another version is to be started.
    """

    def __init__(
        self,
        device: str,
        running: str,
        slots: Slots,
        *,
        fleet: str,
        authorities: Callable[[], Sequence[x509.Certificate]],
        clock: Callable[[], float],
        install: Install = VenvInstallation,
        download: Callable[[Update, PartialBundle], HttpDownload] = HttpDownload,
    ) -> None:
        self._device = device
        self._fleet = fleet
        self._version = running
        self._slots = slots
        self._authorities = authorities
        self._clock = clock
        self._install = install
        self._download = download
        self._update: Update | None = None
        self._partial: PartialBundle | None = None
        self._http: HttpDownload | None = None
        self._installation: Installation | None = None
        self._signed = 0
        self._due: float | None = None
        self._coordinator_boot: str | None = None
        self._progress = clock()
        self._enough = 0
        self.finished = False

    # -- events -----------------------------------------------------------------------------------

    def connected(self) -> list[Effect]:
        """Say what runs; what is being fetched goes on."""
        if self._on_trial:
            self._due = self._clock() + ASK_AGAIN_S
        return [self._software(), *self._ask()]

    def disconnected(self) -> list[Effect]:
        """Nothing: what is under way waits."""
        return []

    def receive(self, envelope: Envelope) -> list[Effect]:
        """Another coordinator, an announcement, a piece of a bundle, or the answer to a trial."""
        match envelope.message:
            case Coordinator(state="online", boot=boot):
                before, self._coordinator_boot = self._coordinator_boot, boot
                return [] if before == boot else [self._software(), *self._ask()]
            case Command(command="update", update=Update() as update):
                return self._announced(update)
            case Command(command="proven") if self._on_trial:
                return self._guarded(self._prove)
            case Piece() as piece:
                return self._guarded(lambda: self._piece(piece))
        return []

    @property
    def next_tick(self) -> float | None:
        """When :meth:`tick` has something to do."""
        return self._due

    def tick(self) -> list[Effect]:
        """Ask again for what has not come; look after the installation."""
        self._due = None
        if self._on_trial:
            self._due = self._clock() + ASK_AGAIN_S
            return [self._software()]
        if self._installation is not None:
            return self._guarded(self._look)
        if self._partial is None:
            return []
        return self._guarded(self._go_on)

    @property
    def has_work(self) -> bool:
        """Whether a block is to be read over HTTP, or what has come is to be installed."""
        if self._partial is None or self._installation is not None:
            return False
        return self._partial.complete or (self._http is not None and self._due is None)

    def work(self) -> list[Effect]:
        """Read a block, or begin to install."""
        assert self._partial is not None
        if self._partial.complete:
            return self._guarded(self._begin)
        return self._guarded(self._read)

    @property
    def busy(self) -> bool:
        """Whether an update is under way."""
        return self._update is not None

    def close(self) -> None:
        """End what is under way; what has been fetched stays for the next time."""
        if self._installation is not None:
            self._installation.cancel()
        if self._http is not None:
            self._http.close()

    @property
    def _on_trial(self) -> bool:
        # start.sh starts the version before without saying so when the disk is full.
        return self._slots.on_trial and self._slots.current == self._version

    # -- steps ------------------------------------------------------------------------------------

    def _announced(self, update: Update) -> list[Effect]:
        failure = self._slots.failure
        tried = failure is not None and failure.rollout == update.rollout
        if self._on_trial or update == self._update:
            return []
        if update.version == self._version or tried:
            return [self._software()]
        self.close()
        self._installation = self._http = None
        self._update, self._progress = update, self._clock()
        log.info("version %s is announced, %d bytes", update.version, update.size)
        return self._guarded(self._fetch)

    def _fetch(self) -> list[Effect]:
        assert self._update is not None
        self._partial = PartialBundle(self._slots.folder, self._update)
        self._enough = self._partial.size + PIECE_BYTES
        if self._update.url is not None:
            self._http = self._download(self._update, self._partial)
        return [self._software(), *self._ask()]

    def _go_on(self) -> list[Effect]:
        self._check_progress()
        return self._ask()

    def _check_progress(self) -> None:
        assert self._partial is not None
        size, now = self._partial.size, self._clock()
        if size >= self._enough:
            self._progress, self._enough = now, size + PIECE_BYTES
        elif now - self._progress > GIVE_UP_S and not self._partial.complete:
            raise BundleError(f"hardly anything came for {GIVE_UP_S / 3600:g} h")

    def _ask(self) -> list[Effect]:
        partial, update = self._partial, self._update
        if partial is None or partial.complete or self._http is not None:
            return []
        assert update is not None
        self._due = self._clock() + ASK_AGAIN_S
        return [up(self._device, Fetch(sha256=update.sha256, offset=partial.size))]

    def _piece(self, piece: Piece) -> list[Effect]:
        partial, update = self._partial, self._update
        if partial is None or update is None or piece.sha256 != update.sha256:
            return []
        if not piece.data:
            raise BundleError("the coordinator does not have the bundle any more")
        if partial.complete or not partial.add(piece.offset, piece.data):
            return []
        self._due = None
        return self._go_on()

    def _read(self) -> list[Effect]:
        assert self._http is not None
        try:
            self._http.step()
        except OSError as exc:
            log.info("the bundle is fetched again in %g s: %s", RETRY_HTTP_S, exc)
            self._due = self._clock() + RETRY_HTTP_S
        self._check_progress()
        return []

    def _begin(self) -> list[Effect]:
        assert self._partial is not None
        assert self._update is not None
        try:
            self._partial.check()
        except BundleError:
            if not self._partial.resumed:
                raise
            log.info("what was fetched before the last start is damaged; it is fetched anew")
            self.close()
            return self._fetch()
        wheels = self._slots.folder / "wheels"
        shutil.rmtree(wheels, ignore_errors=True)
        wheels.mkdir()
        manifest = unpack(self._partial.path, self._authorities(), wheels)
        if (manifest.fleet, manifest.version) != (self._fleet, self._update.version):
            raise BundleError(
                f"the bundle is version {manifest.version} for fleet {manifest.fleet}, announced "
                f"was {self._update.version} for {self._fleet}"
            )
        if manifest.signed < self._slots.signed:
            raise BundleError(
                f"downgrade: version {manifest.version} was signed {_utc(manifest.signed)}, what "
                f"has proven itself here {_utc(self._slots.signed)}; if it is wanted back, sign it "
                "again: splitfleet bundle"
            )
        self._signed = manifest.signed
        self._partial.remove()
        place = self._slots.prepare(manifest.version)
        self._installation = self._install(manifest, wheels, place, clock=self._clock)
        self._due = self._clock() + _LOOK_S
        return [self._software()]

    def _look(self) -> list[Effect]:
        assert self._installation is not None
        assert self._update is not None
        if not self._installation.poll():
            self._due = self._clock() + _LOOK_S
            return []
        shutil.rmtree(self._slots.folder / "wheels", ignore_errors=True)
        update = self._update
        self._slots.try_out(
            update.version, update.rollout, signed=self._signed, prove_s=update.prove_s
        )
        log.info("version %s is installed and will be tried", update.version)
        self.finished = True
        return []

    def _prove(self) -> list[Effect]:
        self._slots.prove()
        self._due = None
        log.info("version %s has proven itself", self._version)
        return [self._software()]

    def _guarded(self, step: Callable[[], Sequence[Effect]]) -> list[Effect]:
        """Run a step; what goes wrong with an update must not end the agent."""
        try:
            return list(step())
        except AgentError as exc:
            return self._failed(str(exc))
        except OSError as exc:
            return self._failed(f"the disk of this device says: {exc.strerror or exc}")

    def _failed(self, reason: str) -> list[Effect]:
        update = self._update
        if update is None:
            log.error("what proves version %s is not written down: %s", self._version, reason)
            return []
        log.warning("version %s failed: %s", update.version, reason)
        self.close()
        if self._partial is not None:
            self._partial.remove()
        self._update = self._partial = self._http = self._installation = self._due = None
        self._slots.fail(update.rollout, reason)
        return [self._software()]

    # -- what it says -----------------------------------------------------------------------------

    def _software(self) -> Envelope:
        state, rollout, detail = self._state()
        return up(
            self._device,
            Software(version=self._version, state=state, rollout=rollout, detail=detail[:256]),
        )

    def _state(self) -> tuple[SoftwareState, str | None, str]:
        if self._on_trial:
            return "proving", self._slots.rollout, ""
        if self._update is not None:
            fetching = self._installation is None
            return "fetching" if fetching else "installing", self._update.rollout, ""
        failure = self._slots.failure
        if failure is not None:
            return "failed", failure.rollout, failure.reason
        return "running", None, ""


def _utc(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(seconds))


def updater_of(settings: AgentSettings) -> Updater:
    """The updater of a device that has an identity and a folder for versions.

    Raises StateError when there can be no such folder.
    """
    assert settings.identity_dir is not None
    assert settings.updates_dir is not None
    make_folder(settings.updates_dir)
    identity = IdentityFolder(settings.identity_dir)
    return Updater(
        settings.device,
        version("splitfleet"),
        Slots(settings.updates_dir),
        fleet=settings.fleet,
        authorities=identity.authorities,
        clock=time.monotonic,
    )
