"""How many batches a device makes in a round, and where in its data they lie."""

from __future__ import annotations

from broker.errors import MessageError
from broker.messages import Assignment
from broker.training_messages import Receipt

MAX_QUOTA = 1 << 20
"""Batches of one device in one round that make sense, all its legs together."""
LEG_POSITIONS = 1 << 40


def quota_of(assignment: Assignment, receipt: Receipt) -> int:
    """The batches a device has in a round, by the answer to its join.

    Raises ``MessageError`` if that is absurd.
    """
    if receipt.quota is None:
        return assignment.quota
    if receipt.quota > MAX_QUOTA:
        raise MessageError("invalid", f"a quota of {receipt.quota} batches is not plausible")
    return receipt.quota


def stream_position(number: int, batch: int, quota: int) -> int:
    """Where in a device's data batch ``batch`` of round ``number`` lies; no two share a place.

    ``quota`` is the assignment's. Batches within it lie one round behind the other. A batch beyond
    it, in another leg at the same round, lies where it would in that leg's own stream, 2^40 batches
    further on for each leg: ``batch // quota · 2^40 + (number − 1) · quota + batch mod quota``.
    """
    leg, within = divmod(batch, quota)
    return leg * LEG_POSITIONS + (number - 1) * quota + within
