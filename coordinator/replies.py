"""What a round says to the devices in it: gradients and receipts."""

from __future__ import annotations

from broker.envelopes import Envelope, down, down_later
from broker.messages import Activations, Gradients, Receipt
from coordinator.gradients import GradientEncoder
from coordinator.ledger import Ledger, Stamp
from coordinator.server_copy import Step


def gradients(
    stamp: Stamp, device: str, answered: Activations, step: Step, encoder: GradientEncoder
) -> Envelope:
    """The answer to a batch that was trained on; it is encoded when it is sent."""
    run, number, attempt = stamp
    gradient = step.gradient
    assert gradient is not None

    def make() -> Gradients:
        logits = encoder.encode_logits(step.logits)
        spent = 0 if logits is None else len(logits)
        return Gradients(
            run=run,
            round=number,
            attempt=attempt,
            batch=answered.batch,
            loss=step.loss,
            correct=step.correct,
            logits=logits,
            tensor=encoder.encode(device, gradient, answered, spent=spent),
        )

    return down_later(device, Gradients, make)


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
