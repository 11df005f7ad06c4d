"""How a device encodes its activations: with the codec of its assignment, within its budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from broker.messages import Assignment
from edge_agent.privacy import Release
from tensors.codecs import Codec, Encode, parse_codec
from tensors.rate import RateController, Rated

LINK_SHARE = 0.8
"""Sending a batch may take this share of the time that computing it takes."""
MESSAGE_BYTES, LABEL_BYTES = 150, 2
"""About what a message takes beside the encoded tensor, and beside that for each image."""

_WEIGHT = 0.3


class ActivationEncoder:
    """Encodes a device's activations; it outlives attempts, so that what it learnt is kept.

    A budget comes from ``bytes_per_sample``, message included, or, with ``follow_link``, from the
    link: what ``uplink`` (bytes per second, 0 if unknown) carries in ``LINK_SHARE`` of the device's
    own step, so that sending never takes longer than computing. The smaller one rules; without any
    the codec is used as it is.

    With ``release`` it encodes what that lets out of the features.

    Raises CodecError if the codec is unknown, or has no levels to choose from but a budget.
    """

    def __init__(
        self,
        assignment: Assignment,
        *,
        uplink: Callable[[], float],
        encode: Encode = Codec.encode,
        release: Release | None = None,
    ) -> None:
        self._release = release
        self._codec = parse_codec(assignment.activation_codec)
        self._bytes_per_sample = assignment.bytes_per_sample
        self._follow_link = assignment.follow_link
        self._uplink = uplink
        self._encode = encode
        self._rate: RateController | None = None
        if self._follow_link or self._bytes_per_sample is not None:
            self._rate = RateController(self._codec)
        self._step_s: dict[str, float] = {}

    def spent(self, part: Literal["forward", "backward"], seconds: float) -> None:
        """Note how long that part of a step took."""
        known = self._step_s.get(part, seconds)
        self._step_s[part] = known + _WEIGHT * (seconds - known)

    def encode(self, features: Any, *, images: int, seed: int) -> Rated:
        """Encode the features of a batch. Raises CodecError as ``Codec.encode`` does."""
        if self._release is not None:
            features = self._release.of(features)
        budget = self._budget(images)
        if self._rate is None or budget is None:
            return Rated(self._encode(self._codec, features, seed=seed), self._codec.levels)
        beside = MESSAGE_BYTES + LABEL_BYTES * images
        return self._rate.encode(features, budget - beside, seed=seed)

    def _budget(self, images: int) -> float | None:
        budgets = []
        if self._bytes_per_sample is not None:
            budgets.append(self._bytes_per_sample * images)
        if self._follow_link:
            budgets.append(self._uplink() * LINK_SHARE * sum(self._step_s.values()))
        return min((budget for budget in budgets if budget > 0), default=None)
