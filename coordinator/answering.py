"""Answering what devices offload, with the parameters of the last closed round."""

from __future__ import annotations

import numpy as np
import torch

from broker.messages import Features, Prediction
from coordinator.errors import BatchRefused
from coordinator.evaluation import Responder
from coordinator.observer import Observer
from tensors.codecs import parse_codec
from tensors.decoding import decode_torch
from tensors.errors import TensorsError
from tensors.format import Limits


class Answering:
    """Checks offloaded features, answers or refuses them, and counts which.

    ``shapes[c-1]`` is the shape of one image's features at cut ``c``; a request holds at most
    ``batch_size`` images.
    """

    def __init__(
        self,
        responder: Responder,
        shapes: list[tuple[int, ...]],
        *,
        batch_size: int,
        observer: Observer,
    ) -> None:
        self._responder = responder
        self._shapes = shapes
        self._batch_size = batch_size
        self._observer = observer

    def answer(self, cut: int | None, trained: set[int], message: Features) -> Prediction:
        """Probabilities for the features of a device with this cut, or the reason why not."""
        version = self._responder.version
        assert version is not None
        probabilities, refused = None, None
        try:
            probabilities = self._probabilities(cut, trained, message)
        except TensorsError:
            refused = "bad_tensor"
        except BatchRefused as exc:
            refused = exc.reason
        images = 0 if probabilities is None else len(probabilities)
        self._observer.features_answered(cut or 0, images, refused)
        return Prediction(
            request=message.request,
            version=version,
            tensor=None if probabilities is None else parse_codec("fp32").encode(probabilities),
            refused=refused,
        )

    def _probabilities(self, cut: int | None, trained: set[int], message: Features) -> np.ndarray:
        if message.version != self._responder.version:
            raise BatchRefused("version")
        if cut is None or cut not in trained:
            raise BatchRefused("untrained")
        shape = self._shapes[cut - 1]
        limits = Limits(max_elements=self._batch_size * int(np.prod(shape)))
        features = decode_torch(message.tensor, limits=limits)
        fits = features.ndim and len(features) and tuple(features.shape[1:]) == shape
        if not fits or features.dtype is not torch.float32:
            raise BatchRefused("wrong_shape")
        probabilities = self._responder.answer(cut, features)
        if not np.isfinite(probabilities).all():
            raise BatchRefused("not_finite")
        return probabilities
