"""What devices send, checked against the round that it is for."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from broker.training_messages import Activations, DeviceParameters, FeatureGradients
from coordinator.aggregation import half_of
from coordinator.errors import BatchRefused
from tensors.decoding import decode_torch
from tensors.deltas import apply_delta
from tensors.errors import AveragingError, FormatError
from tensors.format import Encoded, Limits, read_header
from tensors.networks import State
from tensors.parameters import unpack_parameters

MOST_COUNTED = 1 << 20
"""Batches by which a BatchNorm's counter may have grown; a quota is smaller."""
_DTYPES = torch.float32, torch.bfloat16
"""No bytes decode to the latter."""


class Intake:
    """Opens batches of activations and uploads of parameters.

    ``shapes[c-1]`` is the shape of one image's features at cut ``c``; ``channels_last`` is how
    features are laid out for computing. ``classifier`` is the last block, where devices keep that
    and the labels.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        *,
        classes: int,
        batch_size: int,
        channels_last: bool,
        classifier: int | None = None,
    ) -> None:
        self._shapes = shapes
        self._classes = classes
        self._batch_size = batch_size
        self._channels_last = channels_last
        self.classifier = classifier

    def features(self, message: Activations, cut: int, version: int) -> torch.Tensor:
        """A batch's features: finite, of the shape at ``cut``; float32, or bfloat16 by reference.

        Raises :class:`BatchRefused` with the reason.
        """
        if message.version != version:
            raise BatchRefused("wrong_version")
        if bool(message.labels) is (self.classifier is not None):
            raise BatchRefused("bad_labels")
        images = len(message.labels) or self._images(message)
        if images > self._batch_size:
            raise BatchRefused("batch_too_large")
        if max(message.labels, default=0) >= self._classes:
            raise BatchRefused("bad_labels")
        return self._open(message.tensor, (images, *self._shapes[cut - 1]))

    def gradient(self, message: FeatureGradients, images: int) -> torch.Tensor:
        """The gradient of a batch's last features: finite, of their shape, float32.

        Raises :class:`BatchRefused` with the reason.
        """
        return self._open(message.tensor, (images, *self._shapes[-1]))

    def _images(self, message: Activations) -> int:
        """Of a batch without labels."""
        try:
            shape = read_header(message.tensor).shape
        except FormatError as exc:
            raise BatchRefused(exc.reason) from exc
        if not shape or not shape[0]:
            raise BatchRefused("wrong_shape")
        return shape[0]

    def _open(self, tensor: Encoded, shape: tuple[int, ...]) -> torch.Tensor:
        try:
            opened = decode_torch(
                tensor,
                limits=Limits(max_elements=int(np.prod(shape))),
                channels_last=self._channels_last,
            )
        except FormatError as exc:
            raise BatchRefused(exc.reason) from exc
        if tuple(opened.shape) != shape or opened.dtype not in _DTYPES:
            raise BatchRefused("wrong_shape")
        total = opened.sum(dtype=torch.float32)
        if not math.isfinite(total.item()):  # ten times as fast as looking at each value
            raise BatchRefused("not_finite")
        return opened

    def half(self, message: DeviceParameters, cut: int, version: int, state: State) -> State:
        """A device's half, sent whole or as what changed since ``state``, which is ``version``.

        Raises ``FormatError`` or ``AveragingError`` for one that cannot be averaged.
        """
        start = half_of(state, cut, classifier=self.classifier)
        if message.base is None:
            half = unpack_parameters(message.state, names=start.keys())
        elif message.base == version:
            half = apply_delta(start, message.state)
        else:
            raise AveragingError(f"differences to version {message.base}, not {version}")
        if half.keys() != start.keys():
            odd = sorted(half.keys() ^ start.keys())[:3]
            raise AveragingError(f"not the parameters of cut {cut}: {', '.join(odd)}")
        for name, values in half.items():
            if values.shape != start[name].shape:
                raise AveragingError(f"{name}: shape {values.shape}, not {start[name].shape}")
            if not np.isfinite(values).all():
                raise AveragingError(f"{name} is not finite")
            if name.endswith("running_var") and (values < 0).any():
                raise AveragingError("a BatchNorm variance is negative")
            if name.endswith("num_batches_tracked"):
                counted = values.astype(np.float64) - start[name]
                if not ((counted >= 0) & (counted <= MOST_COUNTED)).all():
                    raise AveragingError(f"{name} does not count the batches of a round")
        return half
