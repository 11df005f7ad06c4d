"""What a round says to the devices in it: last features, gradients and receipts."""

from __future__ import annotations

from torch import Tensor

from broker.envelopes import Envelope, down, down_later
from broker.training_messages import Activations, Gradients, LastFeatures, Receipt
from coordinator.gradients import GradientEncoder
from coordinator.ledger import Ledger, Stamp
from coordinator.server_copy import Step
from tensors.codecs import Codec, parse_codec
from tensors.errors import CodecError


def gradients(
    stamp: Stamp,
    device: str,
    answered: Activations,
    gradient: Tensor,
    encoder: GradientEncoder,
    step: Step | None = None,
) -> Envelope:
    """The answer to a batch that was trained on; it is encoded when it is sent.

    Without a ``step`` of the classifier it says nothing of that.
    """
    run, number, attempt = stamp

    def make() -> Gradients:
        logits = None if step is None else encoder.encode_logits(step.logits)
        spent = 0 if logits is None else len(logits)
        return Gradients(
            run=run,
            round=number,
            attempt=attempt,
            batch=answered.batch,
            loss=None if step is None else step.loss,
            correct=None if step is None else step.correct,
            logits=logits,
            tensor=encoder.encode(device, gradient, answered, spent=spent),
        )

    return down_later(device, Gradients, make)


def last_features(
    stamp: Stamp, device: str, batch: int, features: Tensor, codec: Codec
) -> Envelope:
    """A batch's last features (N×…), for the device's classifier; encoded when they are sent."""
    run, number, attempt = stamp

    def make() -> LastFeatures:
        try:
            tensor = codec.encode(features, seed=batch)
        except CodecError:  # its range is too small for these; the receiver reads any codec
            tensor = parse_codec("fp32").encode(features)
        return LastFeatures(run=run, round=number, attempt=attempt, batch=batch, tensor=tensor)

    return down_later(device, LastFeatures, make)


def receipt(device: str, stamp: Stamp, ledger: Ledger, *, complete: bool, final: bool) -> Envelope:
    """What became of a device's batches: the news, or ``complete``; this marks it as reported."""
    applied, discarded = ledger.report(everything=complete)
    run, number, attempt = stamp
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
            quota=ledger.quota if complete else None,
            complete=complete,
            final=final,
        ),
    )


def refusal(device: str, stamp: Stamp) -> Envelope:
    """To a device without a part in this attempt: nothing of it counts, no more is wanted."""
    run, number, attempt = stamp
    return down(
        device,
        Receipt(
            run=run,
            round=number,
            attempt=attempt,
            credits=0,
            complete=True,
            participant=False,
            final=True,
        ),
    )
