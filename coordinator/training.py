"""One attempt at one round on the server side: batches in, gradients and receipts out."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from broker.envelopes import Envelope, down, down_later
from broker.messages import Activations, DeviceParameters, Gradients, Receipt, Report
from coordinator.aggregation import Aggregation, Model, half_of
from coordinator.engines import Engine
from coordinator.errors import BatchRefused
from coordinator.gradients import GradientEncoder
from coordinator.ledger import Ledger, Stamp
from coordinator.observer import Observer
from tensors.decoding import decode_torch
from tensors.deltas import apply_delta
from tensors.errors import AveragingError, FormatError
from tensors.format import Limits
from tensors.networks import State
from tensors.parameters import unpack_parameters

log = logging.getLogger("splitfleet.coordinator")

RECEIPT_WAIT_S = 0.25
RECEIPT_BATCHES = 8


class RoundInProgress:
    """Trains on what the participants send, each batch at most once.

    ``shapes[c-1]`` is the shape of features at cut ``c`` for one image; ``grant(cut, devices)`` how
    many batches each device may have out; without ``gradients`` none go back. Not opened until
    :meth:`open`.
    """

    def __init__(
        self,
        engine: Engine,
        model: Model,
        learning_rate: float,
        *,
        shapes: Sequence[tuple[int, ...]],
        classes: int,
        batch_size: int,
        gradients: GradientEncoder | None,
        channels_last: bool,
        device_copies: bool,
        grant: Callable[[int, int], int],
        observer: Observer,
        clock: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._model = model
        self._learning_rate = learning_rate
        self._shapes = shapes
        self._classes = classes
        self._batch_size = batch_size
        self._gradients = gradients
        self._channels_last = channels_last
        self._device_copies = device_copies
        self._grant = grant
        self._observer = observer
        self._clock = clock
        self._ledgers: dict[str, Ledger] = {}
        self._aggregation: Aggregation | None = None
        self._opened = clock()
        self._losses: dict[int, list[float]] = {}
        self._correct: dict[int, list[int]] = {}
        self.participants: dict[str, int] = {}
        self.stamp: Stamp = ("", 0, 0)
        self.version = 0
        self.extended = False
        self.reports: dict[str, Report] = {}
        self.receipts_due: float | None = None

    def open(self, stamp: Stamp, version: int, participants: Mapping[str, tuple[int, int]]) -> None:
        """Begin with these devices: name → (cut, quota)."""
        self.stamp, self.version = stamp, version
        self.participants = {name: cut for name, (cut, _) in participants.items()}
        for name, (cut, quota) in participants.items():
            granted = self._grant(cut, len(participants))
            self._ledgers[name] = Ledger(quota, keep_answers=granted + 2, credits=granted)
        self._aggregation = Aggregation(
            self._model,
            first_server_block=min(self.participants.values()),
            device_copies=self._device_copies,
        )
        self._engine.begin(self._model, self._learning_rate)

    @property
    def finished(self) -> int:
        """Participants that have uploaded their parameters."""
        return sum(ledger.finished for ledger in self._ledgers.values())

    @property
    def trained_cuts(self) -> set[int]:
        """Cuts whose exit head was trained by a device that finished."""
        return {
            self.participants[name]
            for name, ledger in self._ledgers.items()
            if ledger.finished and ledger.samples
        }

    # -- messages ---------------------------------------------------------------------------------

    def join(self, device: str) -> Envelope:
        """The answer to a device that wants to take part: where it stands."""
        if device not in self._ledgers:
            run, number, attempt = self.stamp
            return down(
                device,
                Receipt(
                    run=run,
                    round=number,
                    attempt=attempt,
                    credits=0,
                    complete=True,
                    participant=False,
                ),
            )
        return self._receipt(device, complete=True)

    def activations(self, device: str, message: Activations) -> list[Envelope]:
        """Train on a batch; its gradient if wanted, and a receipt when one is due."""
        ledger = self._ledgers.get(device)
        if ledger is None:
            self._observer.batch_discarded("not_a_participant")
            return [self.join(device)]
        batch = message.batch
        if ledger.seen(batch):
            self._observer.message_dropped("redelivered")
            answer = ledger.answer(batch)
            return [self._receipt(device, complete=True) if answer is None else answer]
        if batch >= ledger.quota:
            self._observer.batch_discarded("beyond_quota")
            return [self._receipt(device, complete=True)]
        try:
            answer = self._train(device, message)
        except BatchRefused as exc:
            ledger.discard(batch, exc.reason)
            self._observer.batch_discarded(exc.reason)
            log.warning("batch %d of %s is not trained on: %s", batch, device, exc.reason)
            return [self._receipt(device)]
        ledger.apply(batch, len(message.labels))
        out = []
        if answer is not None:
            ledger.remember(batch, answer)
            out.append(answer)
        enough = RECEIPT_BATCHES if self._gradients else max(1, ledger.credits // 2)
        if ledger.unreported >= enough:
            out.append(self._receipt(device))
        elif self.receipts_due is None:
            self.receipts_due = self._clock() + RECEIPT_WAIT_S
        return out

    def parameters(self, device: str, message: DeviceParameters) -> list[Envelope]:
        """A device's half at its quota's end; answered with the final receipt, also again."""
        ledger = self._ledgers.get(device)
        if ledger is None:
            self._observer.message_dropped("not_a_participant")
            return []
        if not ledger.finished:
            claimed = min(message.produced, ledger.quota)
            ledger.produced = max(claimed, ledger.next_batch)
            if self._aggregation is None:
                self._observer.message_dropped("late_parameters")
            else:
                self._take(device, message, ledger.samples, self._aggregation)
        return [self._receipt(device, complete=True, final=True)]

    def receipts(self) -> list[Envelope]:
        """Receipts that have waited for company long enough."""
        if self.receipts_due is None or self._clock() < self.receipts_due:
            return []
        self.receipts_due = None
        return [self._receipt(name) for name, ledger in self._ledgers.items() if ledger.unreported]

    # -- the end ----------------------------------------------------------------------------------

    def merge(self) -> Model:
        """The aggregated model; the round takes nothing more."""
        assert self._aggregation is not None
        self._engine.close(self._aggregation)
        merged, self._aggregation = self._aggregation.result(), None
        return merged

    def record(self, now: float) -> dict[str, Any]:
        """What happened, for history and report; see :func:`note_report` for late reports."""
        cuts = sorted(self._losses)
        record: dict[str, Any] = {
            "attempt": self.stamp[2],
            "seconds": now - self._opened,
            "learning_rate": self._learning_rate,
            "train_loss": {str(cut): float(np.mean(self._losses[cut])) for cut in cuts},
            "train_accuracy": {
                str(cut): sum(self._correct[cut]) / max(1, self._samples_of(cut)) for cut in cuts
            },
            "devices": {
                name: {
                    "cut": self.participants[name],
                    "samples": ledger.samples,
                    "finished": ledger.finished,
                    "account": ledger.account().as_dict(),
                }
                for name, ledger in self._ledgers.items()
            },
        }
        for name, report in self.reports.items():
            note_report(record, name, report)
        return record

    def contributions(self) -> dict[str, tuple[int, int]]:
        """Device → (1 if it finished the round, samples applied)."""
        return {
            name: (int(ledger.finished), ledger.samples) for name, ledger in self._ledgers.items()
        }

    # -- small parts ------------------------------------------------------------------------------

    def _train(self, device: str, message: Activations) -> Envelope | None:
        started = self._clock()
        if self._ledgers[device].finished:
            raise BatchRefused("late")
        cut = self.participants[device]
        features = self._read(message, cut)
        labels = torch.tensor(message.labels)
        encoder = self._gradients
        step = self._engine.step(device, cut, features, labels, want_gradient=encoder is not None)
        self._losses.setdefault(cut, []).append(step.loss)
        self._correct.setdefault(cut, []).append(step.correct)
        self._observer.batch_applied(cut, step.images, step.loss, self._clock() - started)
        gradient, batch, (run, number, attempt) = step.gradient, message.batch, self.stamp
        if gradient is None or encoder is None:
            return None
        return down_later(
            device,
            Gradients,
            lambda: Gradients(
                run=run,
                round=number,
                attempt=attempt,
                batch=batch,
                loss=step.loss,
                correct=step.correct,
                tensor=encoder.encode(device, gradient, features, message),
            ),
        )

    def _read(self, message: Activations, cut: int) -> torch.Tensor:
        if message.version != self.version:
            raise BatchRefused("wrong_version")
        if len(message.labels) > self._batch_size:
            raise BatchRefused("batch_too_large")
        if max(message.labels) >= self._classes:
            raise BatchRefused("bad_labels")
        shape = (len(message.labels), *self._shapes[cut - 1])
        try:
            features = decode_torch(
                message.tensor,
                limits=Limits(max_elements=int(np.prod(shape))),
                channels_last=self._channels_last,
            )
        except FormatError as exc:
            raise BatchRefused(exc.reason) from exc
        if tuple(features.shape) != shape or features.dtype is not torch.float32:
            raise BatchRefused("wrong_shape")
        if not math.isfinite(features.sum().item()):  # ten times as fast as looking at each value
            raise BatchRefused("not_finite")
        return features

    def _take(
        self, device: str, message: DeviceParameters, samples: int, aggregation: Aggregation
    ) -> None:
        """Fold a device and its server-side copy in; an unusable upload is left out."""
        try:
            aggregation.add_device(self._uploaded(message, self.participants[device]), samples)
        except (FormatError, AveragingError) as exc:
            self._observer.message_dropped("bad_parameters")
            log.warning("the parameters of %s are left out: %s", device, exc)
        self._engine.finish(device, aggregation)

    def _uploaded(self, message: DeviceParameters, cut: int) -> State:
        start = half_of(self._model.state, cut)
        if message.base is None:
            state = unpack_parameters(message.state, names=start.keys())
        elif message.base == self.version:
            state = apply_delta(start, message.state)
        else:
            raise AveragingError(f"differences to version {message.base}, not {self.version}")
        if state.keys() != start.keys():
            odd = sorted(state.keys() ^ start.keys())[:3]
            raise AveragingError(f"not the parameters of cut {cut}: {', '.join(odd)}")
        if any(
            name.endswith("running_var") and (values < 0).any() for name, values in state.items()
        ):
            raise AveragingError("a BatchNorm variance is negative")
        return state

    def _receipt(self, device: str, *, complete: bool = False, final: bool = False) -> Envelope:
        ledger = self._ledgers[device]
        applied, discarded = ledger.report(everything=complete)
        run, number, attempt = self.stamp
        return down(
            device,
            Receipt(
                run=run,
                round=number,
                attempt=attempt,
                applied=applied,
                discarded=discarded,
                credits=ledger.credits,
                next_batch=ledger.next_batch,
                complete=complete,
                final=final,
            ),
        )

    def _samples_of(self, cut: int) -> int:
        return sum(
            ledger.samples
            for name, ledger in self._ledgers.items()
            if self.participants[name] == cut
        )


def note_report(record: dict[str, Any], device: str, report: Report) -> None:
    """Enter a device's own account beside the coordinator's in a round's record."""
    entry = record["devices"].get(device)
    if entry is not None:
        entry["reported"] = {
            "produced": report.produced,
            "applied": report.applied,
            "discarded": dict(report.discarded),
            "expired": report.expired,
            "timeouts": report.timeouts,
            "late_gradients": report.late_gradients,
            "activation_bytes": report.activation_bytes,
            "activation_values": report.activation_values,
            "activation_levels": report.activation_levels,
        }
