"""A round in which the devices keep the labels and the classifier: a step lies in two messages.

Activations are answered with last features, the gradient of those with the step. A batch that is
open between the two counts as arrived and not as applied; it is applied when its gradient was.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch

from broker.envelopes import Envelope
from broker.training_messages import Activations, DeviceParameters, FeatureGradients
from coordinator import replies
from coordinator.aggregation import Model
from coordinator.contribution import Contribution
from coordinator.errors import BatchRefused
from coordinator.training import RoundInProgress
from tensors.codecs import Codec


@dataclass(frozen=True, slots=True, eq=False)
class _Open:
    message: Activations
    images: int
    seconds: float
    """That the forward pass took."""


class RoundWithDeviceLabels(RoundInProgress):
    """``codec`` encodes last features.

    A device has at most as many batches open as it has credits. With another the oldest is given up
    (``unanswered``), as all of them are when it uploads, and when the round closes.
    """

    def __init__(self, *args: Any, codec: Codec, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._codec = codec
        self._open: defaultdict[str, dict[int, _Open]] = defaultdict(dict)

    def activations(self, device: str, message: Activations) -> list[Envelope]:
        """Compute a batch's last features, and answer with them."""
        known = self._known(device, message.batch)
        if known is not None:
            return known
        started = self._clock()
        cut, batch = self.participants[device], message.batch
        try:
            features = self._intake.features(message, cut, self.version)
            self._observer.codec_took("decode", self._clock() - started)
            wanted = self._encoder_for(device) is not None
            last = self._engine.forward(device, batch, cut, features, want_gradient=wanted)
        except BatchRefused as exc:
            return self._refuse(device, batch, exc)
        ledger, opened = self._ledgers[device], self._open[device]
        ledger.wait(batch)
        opened[batch] = _Open(message, len(features), self._clock() - started)
        out = []
        while len(opened) > ledger.credits:
            out += self._give_up(device, min(opened))
        answer = replies.last_features(self.stamp, device, batch, last, self._codec)
        ledger.remember(batch, answer)
        return [answer, *out]

    def gradients(self, device: str, message: FeatureGradients) -> list[Envelope]:
        """Finish the step of an open batch."""
        ledger = self._part_of(device)
        if ledger is None:
            self._observer.message_dropped("not_a_participant")
            return [self.join(device)]
        batch = message.batch
        opened = self._open[device].pop(batch, None)
        if opened is None:
            self._observer.message_dropped("redelivered")
            answer = ledger.answer(batch)
            return [self._receipt(device, complete=True) if answer is None else answer]
        started = self._clock()
        cut = self.participants[device]
        try:
            gradient = self._intake.gradient(message, opened.images)
            back = self._engine.backward(device, batch, gradient, images=opened.images)
        except BatchRefused as exc:
            self._engine.forget(device, batch)
            return self._refuse(device, batch, exc)
        answer = self._gradient(device, opened.message, back)
        seconds = opened.seconds + self._clock() - started
        return self._enter(device, cut, batch, opened.images, None, seconds, answer)

    def parameters(
        self, device: str, message: DeviceParameters
    ) -> tuple[Contribution | None, list[Envelope]]:
        """See :meth:`RoundInProgress.parameters`; what is open then will not be finished."""
        self._give_up_all(device)
        return super().parameters(device, message)

    def expel(self, device: str) -> list[Envelope]:
        """See :meth:`RoundInProgress.expel`."""
        if device in self.unfinished:
            self._give_up_all(device, "quarantined")
        return super().expel(device)

    def merge(self) -> Model:
        """See :meth:`RoundInProgress.merge`."""
        if self._barrier:
            for device in list(self._open):
                self._give_up_all(device)
        return super().merge()

    def forget(self) -> None:
        """See :meth:`RoundInProgress.forget`."""
        for device in list(self._open):
            self._give_up_all(device)
        super().forget()

    def _gradient(
        self, device: str, answered: Activations, gradient: torch.Tensor | None
    ) -> Envelope | None:
        encoder = self._encoder_for(device)
        if encoder is None:
            return None
        assert gradient is not None
        return replies.gradients(self.stamp, device, answered, gradient, encoder)

    def _give_up_all(self, device: str, reason: str = "unanswered") -> None:
        for batch in sorted(self._open.pop(device, {})):
            self._engine.forget(device, batch)
            self._discard(device, batch, BatchRefused(reason))

    def _give_up(self, device: str, batch: int) -> list[Envelope]:
        del self._open[device][batch]
        self._engine.forget(device, batch)
        return self._refuse(device, batch, BatchRefused("unanswered"))
