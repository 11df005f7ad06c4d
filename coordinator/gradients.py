"""How the gradient at the cut is encoded for the device that waits for it."""

from __future__ import annotations

import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable

import torch

from broker.training_messages import Activations
from tensors.codecs import Codec, Encode, parse_codec
from tensors.decoding import relu_mask
from tensors.errors import CodecError
from tensors.format import Encoded
from tensors.rate import RateController


class GradientEncoder:
    """Encodes gradients with ``codec``; ``masked`` leaves out those of activations that are zero.

    ``bytes_per_sample`` is a budget for each image; with ``follow_link`` a gradient is not larger
    than the activations that it answers, which takes a link for as fast down as it is up. Both only
    make the levels fewer, for each device by what was learnt of its gradients before. ``logits``
    says whether the whole network's answers go with the gradient. ``took`` is told the seconds, by
    ``clock``, that a gradient took. Safe to share between threads.
    """

    def __init__(
        self,
        codec: Codec,
        *,
        masked: bool,
        bytes_per_sample: float | None = None,
        follow_link: bool = False,
        encode: Encode = Codec.encode,
        logits: bool = False,
        took: Callable[[float], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._codec = codec
        self._masked = masked and codec.levels is not None and not codec.per_channel
        self._bytes_per_sample = bytes_per_sample
        self._follow_link = follow_link
        self._encode = encode
        self._logits = logits
        self._took = took
        self._clock = clock
        self._rates: dict[str, RateController] = defaultdict(lambda: RateController(codec))
        self._lock = threading.Lock()

    def encode_logits(self, logits: torch.Tensor | None) -> bytes | None:
        """Logits (N, K) as float16, as float32 if they are too large; None if none are wanted."""
        if logits is None or not self._logits:
            return None
        try:
            return parse_codec("fp16").encode(logits)
        except CodecError:
            return parse_codec("fp32").encode(logits)

    def encode(
        self, device: str, gradient: torch.Tensor, answered: Activations, *, spent: int = 0
    ) -> Encoded:
        """The gradient of the loss at the activations that ``answered`` brought, of their shape.

        ``spent`` bytes of the budget are gone: what else is in the message.
        """
        started = self._clock()
        try:
            budget = max(1.0, self._budget(answered, len(gradient)) - spent)
            return self._encode_within(budget, device, gradient, answered)
        except CodecError:  # its range is too small for this one; the receiver reads any codec
            return parse_codec("fp32").encode(gradient)
        finally:
            self._took(self._clock() - started)

    def _encode_within(
        self, budget: float, device: str, gradient: torch.Tensor, answered: Activations
    ) -> Encoded:
        keep = relu_mask(answered.tensor) if self._masked else None
        if math.isinf(budget):
            return self._encode(self._codec, gradient, keep=keep, seed=answered.batch)
        with self._lock:
            rated = self._rates[device].encode(gradient, budget, keep=keep, seed=answered.batch)
        return rated.data

    def _budget(self, answered: Activations, images: int) -> float:
        budget = math.inf
        if self._bytes_per_sample is not None:
            budget = self._bytes_per_sample * images
        if self._follow_link:
            budget = min(budget, len(answered.tensor))
        return budget
