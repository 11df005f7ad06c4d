"""What one device brought to a round, and how it counts when the fleet has gone on meanwhile."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from coordinator.aggregation import Aggregation, Model
from tensors.errors import AveragingError
from tensors.networks import State

log = logging.getLogger("splitfleet.coordinator")


@dataclass(frozen=True, slots=True)
class Contribution:
    """A device's half and its server-side copy, trained on ``samples`` images from ``start`` on.

    Either may be empty: a device's if its upload was unusable, the server's if the strategy has
    no copy for each device.
    """

    device: str
    cut: int
    version: int
    start: Model
    samples: int
    half: State
    server: State
    momentum: State

    def fold(self, aggregation: Aggregation, model: Model, version: int) -> None:
        """Enter it into a round that began with ``model`` as ``version``.

        In its own round it counts as it is. In a later one its difference from where it started,
        times 1/√(1 + staleness), is added to ``model``; it weighs its samples either way (as in
        FedBuff, arXiv 2106.06639, whose buffer this is with ``aggregation = "buffered"``).

        A half that cannot be averaged is left out.
        """
        staleness = version - self.version
        scale, weight = discount(staleness), self.samples
        half, server, momentum = self.half, self.server, self.momentum
        if staleness:
            half = _moved(half, self.start.state, model.state, scale)
            server, momentum = _moved(server, self.start.state, model.state, scale), {}
        with self._leaving_out("own half"):
            aggregation.add_device(half, weight)
        with self._leaving_out("server-side copy"):
            aggregation.add_server(server, momentum, weight)

    @contextlib.contextmanager
    def _leaving_out(self, what: str) -> Iterator[None]:
        try:
            yield
        except AveragingError as exc:
            about = {"device": self.device}
            log.warning(
                "the %s of %s is left out of the average: %s", what, self.device, exc, extra=about
            )

    def folded(self) -> Folded:
        """What of it is remembered."""
        return Folded(
            self.device, self.cut, self.version, self.samples, bool(self.half and self.samples)
        )


class Folded(NamedTuple):
    """A contribution that was folded in."""

    device: str
    cut: int
    version: int
    samples: int
    trained_head: bool


def discount(staleness: int) -> float:
    """How much less work counts that began ``staleness`` versions ago."""
    return 1 / math.sqrt(1 + staleness)


def _moved(state: State, start: State, now: State, scale: float) -> State:
    """``now`` moved by ``scale`` · (``state`` − ``start``), for the names in ``state``.

    What is counted in whole numbers is not scaled.
    """
    moved = {}
    for name, values in state.items():
        difference = values - start[name]
        value = now[name] + (difference if difference.dtype.kind in "iu" else scale * difference)
        if name.endswith("running_var"):
            value = np.maximum(value, now[name] / 2)  # a difference can exceed a variance
        moved[name] = value.astype(now[name].dtype)
    return moved
