"""What a device has asked the coordinator and what came back. A stranger may have written that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker.serving_messages import Features, Prediction
from broker.telemetry import REFUSALS
from edge_agent.answer_counts import REFUSED, Counts
from edge_agent.encoding import MESSAGE_BYTES
from edge_agent.exit_policy import ExitPolicy
from edge_agent.tickets import By, Ticket
from tensors.decoding import decode
from tensors.errors import CodecError, TensorsError
from tensors.format import Limits

Classify = Callable[[NDArray[np.float32]], NDArray[Any]]
"""Last features (N, …) → probabilities (N, K)."""

LONGEST_MS = 600_000
"""The protocol's bound of a deadline."""


@dataclass(slots=True, eq=False)
class Asked:
    """One image in a message. It may be offloaded, audited or both; what is over is neither.

    ``row`` is its place in its request, ``index`` among the images that were computed with it.
    ``due``: when whoever waits for it gives up, on the clock.
    """

    ticket: Ticket
    row: int
    index: int
    due: float
    offloaded: bool
    audited: bool
    exit_label: int


@dataclass(slots=True, eq=False)
class _Sent:
    """A message that is out since ``at`` and of interest until ``due``."""

    version: int
    at: float
    due: float
    images: list[Asked]
    classify: Classify | None


class Offloads:
    """Asks about images, and says of each what came of it: by whom it is answered, and why so.

    ``settle(image, by, reason)`` is told once for every image that is offloaded, unless it is
    :meth:`withdrawn`. Messages are numbered from ``first`` on; at most ``most`` are out at once.
    """

    def __init__(
        self,
        policy: ExitPolicy,
        counts: Counts,
        settle: Callable[[Asked, By, str | None], None],
        *,
        clock: Callable[[], float],
        first: int,
        most: int,
    ) -> None:
        self._policy = policy
        self._counts = counts
        self._settle = settle
        self._clock = clock
        self._first = self._next = first
        self._most = most
        self._out: dict[int, _Sent] = {}

    def ask(
        self,
        run: str,
        version: int,
        images: list[Asked],
        admit: Callable[[list[Asked]], NDArray[np.bool_]],
        encode: Callable[[list[Asked]], Any],
        *,
        classify: Classify | None = None,
    ) -> Features | None:
        """The message that asks about these images, or about those that may leave the device.

        ``admit`` says which of some may, (N,), and books that they do; ``encode`` makes the encoded
        features of some. With ``classify`` last features come back, for that to answer. None if
        nothing is sent. What is offloaded and not asked about is settled.
        """
        if len(self._out) >= self._most:
            self._hold(images, "busy")
            return None
        if not self._policy.affords:
            self._hold(images, "budget")
            return None
        began = self._clock()
        allowed = list(zip(images, admit(images), strict=True))
        self._hold([image for image, may in allowed if not may], "privacy")
        images = [image for image, may in allowed if may]
        if not images:
            return None
        try:
            encoded = encode(images)
        except CodecError:  # not finite: there is nothing to ask with
            self._hold(images, REFUSED + "not_finite")
            return None
        now = self._clock()
        for image in images:
            if image.offloaded:
                image.ticket.seconds["encode"] = now - began
            else:  # only audited: nobody waits for it
                image.due = now + self._policy.policy.timeout_s
        due = max(image.due for image in images)
        number, self._next = self._next, self._next + 1
        self._out[number] = _Sent(version, now, due, images, classify)
        self._policy.sent(len(encoded) + MESSAGE_BYTES)
        counts = self._counts
        counts.seconds["encode"].observe(now - began)
        counts.messages += 1
        counts.bytes_up += len(encoded)
        counts.offloads += sum(image.offloaded for image in images)
        counts.audits += sum(image.audited for image in images)
        deadline_ms = min(LONGEST_MS, max(1, round(1000 * (due - now))))
        return Features(
            run=run, request=number, version=version, deadline_ms=deadline_ms, tensor=encoded
        )

    def answer(self, prediction: Prediction) -> None:
        """Enter the coordinator's answer; one that comes too late changes nothing."""
        self.tick()
        sent = self._out.pop(prediction.request, None)
        if sent is None:
            self._counts.late += self._first <= prediction.request < self._next
            return
        elapsed = self._clock() - sent.at
        self._policy.returned(elapsed)
        self._counts.replies += 1
        self._counts.seconds["round_trip"].observe(elapsed)
        self._counts.bytes_down += len(prediction.tensor or b"")
        found, stages = _read(prediction, sent), _stages(prediction, elapsed)
        for row, image in enumerate(sent.images):
            if isinstance(found, str):
                self._lose(image, found, elapsed)
            else:
                self._answered(image, found[row], stages)

    def withdraw(self, ticket: Ticket) -> None:
        """Nobody waits for the images of this request any more."""
        for sent in self._out.values():
            for image in sent.images:
                image.offloaded = image.offloaded and image.ticket is not ticket

    def give_up(self, reason: str) -> None:
        """All that is out is lost."""
        now, out, self._out = self._clock(), self._out, {}
        for sent in out.values():
            for image in sent.images:
                self._lose(image, reason, now - sent.at)

    def tick(self) -> None:
        """Give up on what has waited too long."""
        now = self._clock()
        for sent in self._out.values():
            for image in sent.images:
                if now >= image.due:
                    self._fall_back(image, "timeout", now - sent.at)
        for number in [number for number, sent in self._out.items() if now >= sent.due]:
            sent = self._out.pop(number)
            self._policy.round_trip.missed(now - sent.at)
            for image in sent.images:
                self._lose(image, "timeout", now - sent.at)

    @property
    def deadline(self) -> float | None:
        """When :meth:`tick` has something to do, on the clock; None if nothing is out."""
        out = self._out.values()
        times = [image.due for sent in out for image in sent.images if image.offloaded]
        return min([*times, *(sent.due for sent in out)], default=None)

    def hold(self, image: Asked, reason: str) -> None:
        """The server is not asked about this one."""
        self._counts.held[reason] += 1
        self._settle(image, "fallback", reason)

    def _hold(self, images: list[Asked], reason: str) -> None:
        for image in images:
            if image.offloaded:
                self.hold(image, reason)

    def _answered(self, image: Asked, found: NDArray[np.float32], stages: dict[str, float]) -> None:
        if image.audited:
            agreed = int(found.argmax()) == image.exit_label
            self._counts.audits_agreed += agreed
            self._counts.audits_disagreed += not agreed
            self._policy.audited(agreed=agreed)
        if image.offloaded:
            self._counts.answered += 1
            image.ticket.probabilities[image.row] = found
            image.ticket.seconds |= stages
            self._settle(image, "server", None)

    def _lose(self, image: Asked, reason: str, elapsed_s: float) -> None:
        """The server was asked, and that is over."""
        self._counts.audits_lost += image.audited
        self._fall_back(image, reason, elapsed_s)

    def _fall_back(self, image: Asked, reason: str, elapsed_s: float) -> None:
        """The server was asked, and whoever waits for it does so no longer."""
        if image.offloaded:
            image.offloaded = False
            self._counts.lost[reason] += 1
            image.ticket.seconds["round_trip"] = elapsed_s
            self._settle(image, "fallback", reason)


def _stages(prediction: Prediction, elapsed_s: float) -> dict[str, float]:
    """Seconds of a round trip, and of those that the server says it took."""
    parts = {"server_queue": prediction.queue_ms, "server_forward": prediction.forward_ms}
    taken = {name: min(elapsed_s, (ms or 0.0) / 1000) for name, ms in parts.items()}
    return {"round_trip": elapsed_s, **taken}


def _read(prediction: Prediction, sent: _Sent) -> NDArray[np.float32] | str:
    """Probabilities (N, K) for the images of a message, or the reason why there are none."""
    if prediction.tensor is None:
        said = prediction.refused
        # What else a coordinator may say counts as one, so that counters stay few.
        return REFUSED + (said if said in REFUSALS else "other")
    if prediction.version != sent.version:
        return REFUSED + "version"
    shape = len(sent.images), sent.images[0].ticket.probabilities.shape[1]
    try:
        if sent.classify is None:
            found = decode(prediction.tensor, limits=Limits(max_elements=shape[0] * shape[1]))
        else:
            found = sent.classify(decode(prediction.tensor).astype(np.float32, copy=False))
    except (TensorsError, RuntimeError, ValueError, IndexError):
        return REFUSED + "nonsense"
    return found.astype(np.float32) if _are_probabilities(found, shape) else REFUSED + "nonsense"


def _are_probabilities(found: NDArray[Any], shape: tuple[int, int]) -> bool:
    return (
        found.shape == shape
        and found.dtype.kind == "f"
        and bool(np.isfinite(found).all())
        and bool((found >= 0).all())
        and bool((np.abs(found.sum(axis=1, dtype=np.float64) - 1) < 1e-2).all())
    )
