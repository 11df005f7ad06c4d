"""What the outside can watch: metrics and progress bars are observers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

from broker.serving_messages import CutPolicy
from broker.training_messages import Report
from coordinator.identity.standing import Standing
from coordinator.telemetry import Gain

Codec = Literal["decode", "encode"]


class Observer:
    """Does nothing; override what is of interest.

    Called from the thread of the training machine, what is about answers from that of the answering
    one, what is about certificates from that of identity, and :meth:`codec_took` from any.
    """

    def batch_applied(self, cut: int, images: int, loss: float | None, seconds: float) -> None:
        """The server trained on a batch; ``seconds`` include decoding and encoding.

        The ``loss`` is None where devices keep the labels.
        """

    def batch_discarded(self, reason: str) -> None:
        """A batch was refused."""

    def message_dropped(self, reason: str) -> None:
        """A message was not understood or not wanted."""

    def round_opened(self, number: int, rounds: int, attempt: int, quota: int) -> None:
        """A round starts; ``quota`` is the batches expected of all participants together."""

    def round_ended(self, number: int, outcome: str, record: dict[str, object]) -> None:
        """A round was ``closed``, ``extended`` or ``abandoned``."""

    def resumed(self, record: Mapping[str, object]) -> None:
        """A run goes on that was there before; ``record`` is of its last closed round."""

    def device_report(self, device: str, cut: int, report: Report) -> None:
        """A device gave its account."""

    def telemetry(self, gain: Gain) -> None:
        """A device said what it has counted; this is what is new of it."""

    def devices(self, by_state: dict[str, int]) -> None:
        """How many devices are in each state."""

    def retired(self, devices: Collection[str]) -> None:
        """These are devices of the fleet no more."""

    def late_work(self, outcome: str, samples: int) -> None:
        """A contribution to an earlier round was ``folded`` in, or dropped and why.

        ``too_late``, ``not_kept`` (no room for its server-side copy), ``run_over``, or
        ``not_brought``: the device never came back for it.
        """

    def upload_clipped(self, cut: int) -> None:
        """A device had moved further than it may; what it brought was shortened."""

    def breach(self, reason: str) -> None:
        """A device broke a rule. From any thread."""

    def quarantined(self, devices: int) -> None:
        """So many devices are in quarantine now."""

    def work_changed(self, device: str, cut: int, share: float) -> None:
        """A device that is late, or early again, has another share of its work or another cut."""

    def features_answered(self, cut: int, images: int, refused: str | None) -> None:
        """Offloaded features were answered or refused (then ``images`` is 0)."""

    def answer_waited(self, seconds: float) -> None:
        """A question that was answered had waited so long for its turn."""

    def answers_computed(self, questions: int, images: int, seconds: float) -> None:
        """A forward pass answered so many together; decoding and encoding not included."""

    def answers_waiting(self, images: int) -> None:
        """So many images wait for their turn now."""

    def serving(self, version: int, *, pinned: bool, cuts: Mapping[str, CutPolicy]) -> None:
        """Another version answers images, or with other policies; those by cut."""

    def codec_took(self, stage: Codec, seconds: float) -> None:
        """A batch's activations were decoded, or its gradient encoded, in so many seconds."""

    def checkpoint(self, size: int, *, written: float) -> None:
        """The newest checkpoint has so many bytes and was written then, in seconds since 1970."""

    def connection(self, *, up: bool) -> None:
        """The broker is there, or gone."""

    def phase(self, phase: str) -> None:
        """gathering, training, inference or finished."""

    def certificate_asked(self, outcome: str) -> None:
        """A device asked for a certificate: it got one, or was refused and why."""

    def identity(self, standing: Standing) -> None:
        """When certificates and lists end; about once a minute, and when something has changed."""


class Observers(Observer):
    """Several observers as one."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def batch_applied(self, cut: int, images: int, loss: float | None, seconds: float) -> None:
        for observer in self._observers:
            observer.batch_applied(cut, images, loss, seconds)

    def batch_discarded(self, reason: str) -> None:
        for observer in self._observers:
            observer.batch_discarded(reason)

    def message_dropped(self, reason: str) -> None:
        for observer in self._observers:
            observer.message_dropped(reason)

    def round_opened(self, number: int, rounds: int, attempt: int, quota: int) -> None:
        for observer in self._observers:
            observer.round_opened(number, rounds, attempt, quota)

    def round_ended(self, number: int, outcome: str, record: dict[str, object]) -> None:
        for observer in self._observers:
            observer.round_ended(number, outcome, record)

    def resumed(self, record: Mapping[str, object]) -> None:
        for observer in self._observers:
            observer.resumed(record)

    def device_report(self, device: str, cut: int, report: Report) -> None:
        for observer in self._observers:
            observer.device_report(device, cut, report)

    def telemetry(self, gain: Gain) -> None:
        for observer in self._observers:
            observer.telemetry(gain)

    def devices(self, by_state: dict[str, int]) -> None:
        for observer in self._observers:
            observer.devices(by_state)

    def retired(self, devices: Collection[str]) -> None:
        for observer in self._observers:
            observer.retired(devices)

    def late_work(self, outcome: str, samples: int) -> None:
        for observer in self._observers:
            observer.late_work(outcome, samples)

    def upload_clipped(self, cut: int) -> None:
        for observer in self._observers:
            observer.upload_clipped(cut)

    def breach(self, reason: str) -> None:
        for observer in self._observers:
            observer.breach(reason)

    def quarantined(self, devices: int) -> None:
        for observer in self._observers:
            observer.quarantined(devices)

    def work_changed(self, device: str, cut: int, share: float) -> None:
        for observer in self._observers:
            observer.work_changed(device, cut, share)

    def features_answered(self, cut: int, images: int, refused: str | None) -> None:
        for observer in self._observers:
            observer.features_answered(cut, images, refused)

    def answer_waited(self, seconds: float) -> None:
        for observer in self._observers:
            observer.answer_waited(seconds)

    def answers_computed(self, questions: int, images: int, seconds: float) -> None:
        for observer in self._observers:
            observer.answers_computed(questions, images, seconds)

    def answers_waiting(self, images: int) -> None:
        for observer in self._observers:
            observer.answers_waiting(images)

    def serving(self, version: int, *, pinned: bool, cuts: Mapping[str, CutPolicy]) -> None:
        for observer in self._observers:
            observer.serving(version, pinned=pinned, cuts=cuts)

    def codec_took(self, stage: Codec, seconds: float) -> None:
        for observer in self._observers:
            observer.codec_took(stage, seconds)

    def checkpoint(self, size: int, *, written: float) -> None:
        for observer in self._observers:
            observer.checkpoint(size, written=written)

    def connection(self, *, up: bool) -> None:
        for observer in self._observers:
            observer.connection(up=up)

    def phase(self, phase: str) -> None:
        for observer in self._observers:
            observer.phase(phase)

    def certificate_asked(self, outcome: str) -> None:
        for observer in self._observers:
            observer.certificate_asked(outcome)

    def identity(self, standing: Standing) -> None:
        for observer in self._observers:
            observer.identity(standing)
