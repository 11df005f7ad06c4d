"""How the gradient at the cut is encoded for the device that waits for it."""

from __future__ import annotations

import math
import threading
from collections import defaultdict

import torch

from broker.messages import Activations
from tensors.codecs import Codec, Encode, parse_codec
from tensors.decoding import relu_mask
from tensors.errors import CodecError
from tensors.format import Encoded
from tensors.rate import RateController


class GradientEncoder:
    """Encodes gradients with ``codec``; ``masked`` leaves out those of activations that are zero.

    ``bytes_per_sample`` is a budget for each image; with ``follow_link`` a gradient is not larger
    than the activations that it answers, which takes a link for as fast down as it is up. Both only
    make the levels fewer, for each device by what was learnt of its gradients before. Safe to share
    between threads.
    """

    def __init__(
        self,
        codec: Codec,
        *,
        masked: bool,
        bytes_per_sample: float | None = None,
        follow_link: bool = False,
        encode: Encode = Codec.encode,
    ) -> None:
        self._codec = codec
        self._masked = masked and codec.levels is not None and not codec.per_channel
        self._bytes_per_sample = bytes_per_sample
        self._follow_link = follow_link
        self._encode = encode
        self._rates: dict[str, RateController] = defaultdict(lambda: RateController(codec))
        self._lock = threading.Lock()

    def encode(self, device: str, gradient: torch.Tensor, answered: Activations) -> Encoded:
        """The gradient of the loss at the activations that ``answered`` brought, of their shape."""
        keep = relu_mask(answered.tensor) if self._masked else None
        budget = self._budget(answered)
        try:
            if math.isinf(budget):
                return self._encode(self._codec, gradient, keep=keep, seed=answered.batch)
            with self._lock:
                rated = self._rates[device].encode(gradient, budget, keep=keep, seed=answered.batch)
            return rated.data
        except CodecError:  # its range is too small for this one; the receiver reads any codec
            return parse_codec("fp32").encode(gradient)

    def _budget(self, answered: Activations) -> float:
        budget = math.inf
        if self._bytes_per_sample is not None:
            budget = self._bytes_per_sample * len(answered.labels)
        if self._follow_link:
            budget = min(budget, len(answered.tensor))
        return budget
