"""One attempt at one round on the server side: batches in, gradients and receipts out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from broker.envelopes import Envelope
from broker.training_messages import Activations, DeviceParameters, FeatureGradients
from coordinator import replies
from coordinator.aggregation import Model
from coordinator.cascade import TOGETHER
from coordinator.contribution import Contribution, Folded
from coordinator.defences.rules import Defences
from coordinator.engines import Engine, Entry, Step
from coordinator.errors import BatchRefused
from coordinator.gradients import GradientEncoder
from coordinator.intake import Intake
from coordinator.label_counts import LabelCounts
from coordinator.ledger import Ledger, Stamp
from coordinator.merging import Merging
from coordinator.observer import Observer
from coordinator.rounds import Work
from tensors.errors import AveragingError, FormatError
from tensors.losses import log_prior
from tensors.networks import State

log = logging.getLogger("splitfleet.coordinator")

RECEIPT_WAIT_S = 0.25
RECEIPT_BATCHES = 8


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    message: Activations
    entry: Entry


class RoundInProgress:
    """Trains on what the participants send, each batch at most once.

    ``server_rate`` is the server network's learning rate, ``grant(cut, devices)`` how many batches
    each device may have out; without ``gradients`` none go back. Not opened until :meth:`open`. Its
    :meth:`merge` ends the aggregation; what devices bring afterwards is a late contribution, for a
    later round to :meth:`add`. ``barrier`` says whether the merge also ends the training; ``kept``
    how many halves of unfinished devices are kept for their upload then.
    """

    def __init__(
        self,
        engine: Engine,
        model: Model,
        server_rate: float,
        *,
        intake: Intake,
        gradients: GradientEncoder | None,
        device_copies: bool,
        barrier: bool,
        kept: int,
        grant: Callable[[int, int], int],
        observer: Observer,
        clock: Callable[[], float],
        defences: Defences | None = None,
    ) -> None:
        self._engine = engine
        self._model = model
        self._server_rate = server_rate
        self._intake = intake
        self._gradients = gradients
        self._device_copies = device_copies
        self._barrier = barrier
        self._kept = kept
        self._grant = grant
        self._observer = observer
        self._clock = clock
        self._defences = defences or Defences()
        self._merging = Merging(model, barrier=barrier, defences=self._defences, observer=observer)
        self._ledgers: dict[str, Ledger] = {}
        self._training = False
        self._halves: dict[str, tuple[State, State]] = {}
        self._labels: dict[str, LabelCounts] = {}
        self._frozen: set[str] = set()
        self._waiting: list[_Waiting] = []
        self._losses: dict[int, list[float]] = {}
        self._correct: dict[int, int] = {}
        self._images: dict[int, int] = {}
        self.opened = clock()
        self.participants: dict[str, int] = {}
        """Name → cut layer."""
        self.finished = 0
        """Participants that have uploaded their parameters."""
        self.expelled: set[str] = set()
        """Participants that may not any more."""
        self.durations: dict[str, float] = {}
        """Seconds from the opening to each device's first upload."""
        self.stamp: Stamp = ("", 0, 0)
        self.version = 0
        self.extended = False
        self.receipts_due: float | None = None

    def open(
        self,
        stamp: Stamp,
        version: int,
        participants: Mapping[str, Work],
        *,
        first_server_block: int,
    ) -> None:
        """Begin with these devices; blocks before ``first_server_block`` are held by devices."""
        self.stamp, self.version = stamp, version
        for name, work in participants.items():
            self.admit(name, work, devices=len(participants))
        self._merging.begin(
            version,
            first_server_block=first_server_block,
            device_copies=self._device_copies,
            classifier=self._intake.classifier,
        )
        self._engine.begin(self._model, self._server_rate)
        self._training = True

    def admit(self, device: str, work: Work, *, devices: int, most: int | None = None) -> None:
        """A device takes part, in a fleet of ``devices``; one that has finished, once more.

        It may have at most ``most`` batches out.
        """
        ledger = self._ledgers.get(device)
        granted = self._grant(work.cut, devices)
        if most is not None:
            granted = max(1, min(granted, most))
        if ledger is None:
            if work.labels is not None:
                self._labels[device] = work.labels
            if work.frozen:
                self._frozen.add(device)
            self.participants[device] = work.cut
            self._ledgers[device] = Ledger(work.quota, keep_answers=granted + 2, credits=granted)
        elif ledger.finished or ledger.next_batch >= ledger.quota:
            ledger.extend(work.quota)
            ledger.credits = granted

    def expel(self, device: str) -> list[Envelope]:
        """A device has no part in this round any more, unless it has finished; it is told.

        What it alone has trained here is gone, and its books stay as they are.
        """
        if device not in self.unfinished:
            return []
        waiting, self._waiting = self._waiting, []
        for each in waiting:
            if each.entry.device == device:
                self._refuse(device, each.message.batch, BatchRefused("quarantined"))
            else:
                self._waiting.append(each)
        self.expelled.add(device)
        if self._training:
            self._engine.finish(device)
        self._halves.pop(device, None)
        return [replies.refusal(device, self.stamp)]

    def credits(self, device: str) -> int:
        """Batches that a device may have out here; none if it has finished."""
        ledger = self._ledgers.get(device)
        out = ledger is None or ledger.finished or device in self.expelled
        return 0 if out or ledger is None else ledger.credits

    def _part_of(self, device: str) -> Ledger | None:
        """The books of a device that takes part."""
        return None if device in self.expelled else self._ledgers.get(device)

    @property
    def ledgers(self) -> Mapping[str, Ledger]:
        """By device; for looking only."""
        return self._ledgers

    @property
    def losses(self) -> Mapping[int, list[float]]:
        """Of each batch, by cut; for looking only."""
        return self._losses

    @property
    def unfinished(self) -> list[str]:
        """Devices that have not uploaded their parameters, and still may."""
        return [
            name
            for name, ledger in self._ledgers.items()
            if not ledger.finished and name not in self.expelled
        ]

    @property
    def trained_cuts(self) -> set[int]:
        """Cuts whose exit head was trained by what was folded in."""
        return {folded.cut for folded in self.added if folded.trained_head}

    # -- messages ---------------------------------------------------------------------------------

    def join(self, device: str) -> Envelope:
        """The answer to a device that wants to take part: where it stands."""
        if self._part_of(device) is not None:
            return self._receipt(device, complete=True)
        return replies.refusal(device, self.stamp)

    def activations(self, device: str, message: Activations) -> list[Envelope]:
        """Train on a batch; its gradient if wanted, and a receipt when one is due."""
        known = self._known(device, message.batch)
        if known is not None:
            return known
        ledger, batch = self._ledgers[device], message.batch
        started = self._clock()
        try:
            cut = self.participants[device]
            features = self._intake.features(message, cut, self.version)
            self._observer.codec_took("decode", self._clock() - started)
            counts = self._labels.get(device)
            prior = None if counts is None else log_prior(counts.with_batch(message.labels))
            labels = torch.tensor(message.labels)
            waiting = _Waiting(message, Entry(device, cut, features, labels, prior))
            if self._engine.gathers:
                ledger.wait(batch)
                self._waiting.append(waiting)
                return []
            wanted = self._encoder_for(device) is not None
            step = self._engine.step(waiting.entry, want_gradient=wanted)
        except BatchRefused as exc:
            return self._refuse(device, batch, exc)
        return self._applied(waiting, step, self._clock() - started)

    def gradients(self, device: str, message: FeatureGradients) -> list[Envelope]:
        """Nobody was sent last features; see ``coordinator.device_labels``."""
        del device, message
        self._observer.message_dropped("unexpected_topic")
        return []

    @property
    def gathered(self) -> bool:
        """Whether batches wait for :meth:`train_gathered`."""
        return bool(self._waiting)

    def train_gathered(self) -> list[Envelope]:
        """One step on the batches that have waited longest, at most one of each device."""
        chosen: dict[str, _Waiting] = {}
        for waiting in self._waiting:
            if len(chosen) < TOGETHER:
                chosen.setdefault(waiting.entry.device, waiting)
        together = list(chosen.values())
        self._waiting = [waiting for waiting in self._waiting if waiting not in together]
        started = self._clock()
        outcomes = self._engine.step_together(
            [waiting.entry for waiting in together], want_gradients=self._gradients is not None
        )
        share = (self._clock() - started) / len(together)
        out: list[Envelope] = []
        for waiting, outcome in zip(together, outcomes, strict=True):
            if isinstance(outcome, Step):
                out += self._applied(waiting, outcome, share)
            else:
                out += self._refuse(waiting.entry.device, waiting.message.batch, outcome)
        return out

    def parameters(
        self, device: str, message: DeviceParameters
    ) -> tuple[Contribution | None, list[Envelope]]:
        """A device's half at its quota's end: what it brought, if that is new, and its receipt."""
        ledger = self._part_of(device)
        if ledger is None:
            self._observer.message_dropped("not_a_participant")
            return None, [replies.refusal(device, self.stamp)]
        out: list[Envelope] = []
        while any(waiting.entry.device == device for waiting in self._waiting):
            out += self.train_gathered()
        brought = None
        if not ledger.finished:
            self.finished += 1
            self.durations.setdefault(device, self._clock() - self.opened)
            samples = ledger.finish(message.produced)
            if self._training or device in self._halves:
                brought = self._brought(device, message, samples)
            else:
                self._observer.late_work("not_kept", samples)
        return brought, [*out, self._receipt(device, complete=True, final=True)]

    def receipts(self) -> list[Envelope]:
        """Receipts that have waited for company long enough."""
        if self.receipts_due is None or self._clock() < self.receipts_due:
            return []
        self.receipts_due = None
        return [self._receipt(name) for name, ledger in self._ledgers.items() if ledger.unreported]

    # -- the end ----------------------------------------------------------------------------------

    @property
    def added(self) -> list[Folded]:
        """What was folded in."""
        return self._merging.added

    @property
    def late(self) -> list[Contribution]:
        """Brought to earlier rounds, to be folded in when this one closes."""
        return self._merging.late

    def add(self, brought: Contribution) -> None:
        """Take in what a device brought, to this round or an earlier one."""
        self._merging.add(brought)

    def merge(self) -> Model:
        """The aggregated model; what comes from now on is for a later round.

        What has been gathered must have been trained on.
        """
        assert not self._waiting
        merged = self._merging.close(self._engine.close)
        if self._barrier:
            self._training = False
            for name in self.unfinished:
                half = self._engine.finish(name)
                if len(self._halves) < self._kept and self._ledgers[name].samples:
                    self._halves[name] = half
        return merged

    def record(self, now: float) -> dict[str, Any]:
        """What happened, for the history."""
        cuts = sorted(self._losses)
        return {
            "attempt": self.stamp[2],
            "seconds": now - self.opened,
            "extended": self.extended,
            "server_rate": self._server_rate,
            "train_loss": {str(cut): float(np.mean(self._losses[cut])) for cut in cuts},
            "train_accuracy": {str(cut): self._correct[cut] / self._images[cut] for cut in cuts},
            "late": [
                {
                    "device": folded.device,
                    "version": folded.version,
                    "staleness": self.version - folded.version,
                    "samples": folded.samples,
                }
                for folded in self.added
                if folded.version != self.version
            ],
            "devices": {name: self.entry(name) for name in self._ledgers},
        }

    def entry(self, device: str) -> dict[str, Any]:
        """A device's line in the record."""
        ledger = self._ledgers[device]
        return {
            "cut": self.participants[device],
            "quota": ledger.quota,
            "samples": ledger.samples,
            "finished": ledger.finished,
            "account": ledger.account().as_dict(),
        }

    def progress(self, device: str) -> tuple[int, bool, float]:
        """Batches of a device that have arrived, whether it has finished, its seconds so far."""
        ledger = self._ledgers[device]
        seconds = self.durations.get(device, self._clock() - self.opened)
        return ledger.next_batch, ledger.finished, seconds

    def forget(self) -> None:
        """Nobody will bring anything for this round any more."""
        for ledger in self._ledgers.values():
            if not ledger.finished and ledger.fresh:
                self._observer.late_work("not_brought", ledger.fresh)
        self._halves.clear()

    # -- small parts ------------------------------------------------------------------------------

    def _known(self, device: str, batch: int) -> list[Envelope] | None:
        """The answer to a batch that is not to be looked at; None for a new one."""
        ledger = self._part_of(device)
        if ledger is None:
            self._observer.batch_discarded("not_a_participant")
            return [self.join(device)]
        if ledger.seen(batch):
            self._observer.message_dropped("redelivered")
            answer = ledger.answer(batch)
            return [self._receipt(device, complete=True) if answer is None else answer]
        if batch >= ledger.quota:
            self._observer.batch_discarded("beyond_quota")
            return [self._receipt(device, complete=True)]
        if ledger.finished or not self._training:
            return self._refuse(device, batch, BatchRefused("late"))
        return None

    def _refuse(self, device: str, batch: int, refused: BatchRefused) -> list[Envelope]:
        self._discard(device, batch, refused)
        return [self._receipt(device)]

    def _discard(self, device: str, batch: int, refused: BatchRefused) -> None:
        self._ledgers[device].discard(batch, refused.reason)
        self._defences.refused(device, refused.reason)
        self._observer.batch_discarded(refused.reason)
        about = {"device": device, "reason": refused.reason}
        log.warning("batch %d of %s is not trained on: %s", batch, device, refused, extra=about)

    def _applied(self, waiting: _Waiting, step: Step, seconds: float) -> list[Envelope]:
        """Enter a batch that was trained on, and answer it."""
        entry, message = waiting.entry, waiting.message
        if entry.device in self._labels:
            self._labels[entry.device].add(message.labels)
        self._losses.setdefault(entry.cut, []).append(step.loss)
        self._correct[entry.cut] = self._correct.get(entry.cut, 0) + step.correct
        self._images[entry.cut] = self._images.get(entry.cut, 0) + step.images
        gradients, answer = self._encoder_for(entry.device), None
        if gradients is not None:
            assert step.gradient is not None
            answer = replies.gradients(
                self.stamp, entry.device, message, step.gradient, gradients, step
            )
        return self._enter(
            entry.device, entry.cut, message.batch, step.images, step.loss, seconds, answer
        )

    def _enter(
        self,
        device: str,
        cut: int,
        batch: int,
        images: int,
        loss: float | None,
        seconds: float,
        answer: Envelope | None,
    ) -> list[Envelope]:
        """Enter an applied batch into the books; its answer, if it has one, and a due receipt."""
        ledger = self._ledgers[device]
        ledger.apply(batch, images)
        self._observer.batch_applied(cut, images, loss, seconds)
        out = []
        if answer is not None:
            ledger.remember(batch, answer)
            out.append(answer)
        enough = max(1, ledger.credits // 2) if answer is None else RECEIPT_BATCHES
        if ledger.unreported >= enough:
            out.append(self._receipt(device))
        elif self.receipts_due is None:
            self.receipts_due = self._clock() + RECEIPT_WAIT_S
        return out

    def _encoder_for(self, device: str) -> GradientEncoder | None:
        """What encodes its gradients, if it is sent any."""
        return None if device in self._frozen else self._gradients

    def _brought(self, device: str, message: DeviceParameters, samples: int) -> Contribution:
        """A device and its server-side copy; an unusable upload, or a frozen half, is left out."""
        cut = self.participants[device]
        half: State = {}
        try:
            if device not in self._frozen:
                half = self._intake.half(message, cut, self.version, self._model.state)
                self._defences.uploads.note(device, half, self._model.state, samples)
        except (FormatError, AveragingError) as exc:
            self._observer.message_dropped("bad_parameters")
            self._defences.refused(device, "bad_parameters")
            about = {"device": device}
            log.warning("the parameters of %s are left out: %s", device, exc, extra=about)
        if self._training:
            server, momentum = self._engine.finish(device)
        else:
            server, momentum = self._halves.pop(device, ({}, {}))
        return Contribution(device, cut, self.version, self._model, samples, half, server, momentum)

    def _receipt(self, device: str, *, complete: bool = False, final: bool = False) -> Envelope:
        ledger = self._ledgers[device]
        return replies.receipt(device, self.stamp, ledger, complete=complete, final=final)
