"""How far a device may move what it holds: its upload's difference to the round's start, clipped.

Source: norm clipping, Sun, Kairouz, Suresh, McMahan 2019, arXiv 1911.07963; by block, with a bound
that follows what the others send, ours.
"""

from __future__ import annotations

import statistics
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from tensors.averaging import last_part
from tensors.networks import State

ENOUGH = 3
"""Of so many devices norms must be known before one is judged by their median."""
_COUNTER = "num_batches_tracked"
_STATISTICS = ("running_mean", "running_var")


@dataclass(slots=True)
class UploadLimits:
    """Clips, for each block and each exit head, the L2 norm of what a device changed in it.

    The bound is ``factor`` times the median, over the devices, of the norms that each last brought
    for this block; and ``norm``, if that is given. A device that was trained on more samples than
    the median may go further in proportion. BatchNorm's running statistics are clipped by
    themselves. The last norms of at most ``devices`` are known, of those heard of last.

    Without either nothing is clipped.
    """

    factor: float | None = None
    norm: float | None = None
    devices: int = 1000
    _last: dict[str, OrderedDict[str, tuple[float, int]]] = field(default_factory=dict)

    def note(self, device: str, half: State, start: State, samples: int) -> None:
        """A device has brought this; ``samples`` were applied of it, without any it says nothing.

        The names in ``half`` are also in ``start``.
        """
        if self.factor is None or not samples:
            return
        for part, names in _parts(half).items():
            norm = _norm(half, start, names)
            if not norm:
                continue  # it was not trained, and says nothing of those that were
            known = self._last.setdefault(part, OrderedDict())
            known[device] = norm, samples
            known.move_to_end(device)
            while len(known) > self.devices:
                known.popitem(last=False)

    def can_judge(self, half: State) -> bool:
        """Whether enough is known to go by for every part of ``half``."""
        parts = () if self.factor is None else _parts(half)
        return all(len(self._last.get(part, ())) >= ENOUGH for part in parts)

    def clip(self, half: State, start: State, samples: int) -> tuple[State, int]:
        """``half``, no further from ``start`` than it may be; how many parts of it were clipped."""
        if self.factor is None and self.norm is None:
            return half, 0
        clipped, count = dict(half), 0
        for part, names in _parts(half).items():
            norm, bound = _norm(half, start, names), self._bound(part, samples)
            if norm > bound:
                count += 1
                share = np.float32(bound / norm)
                for name in names:
                    clipped[name] = start[name] + share * (half[name] - start[name])
        return clipped, count

    def _bound(self, part: str, samples: int) -> float:
        bound = np.inf if self.norm is None else self.norm
        known = self._last.get(part)
        if self.factor is None or not known:
            return bound
        usual = statistics.median(norm for norm, _ in known.values())
        work = samples / statistics.median(samples for _, samples in known.values())
        return min(bound, self.factor * usual * max(1.0, work))


def _parts(half: Mapping[str, object]) -> dict[str, list[str]]:
    """Names by block or head, BatchNorm's statistics apart."""
    parts: dict[str, list[str]] = {}
    for name in half:
        kind = last_part(name)
        if kind != _COUNTER:
            part = ".".join(name.split(".", 2)[:2])
            parts.setdefault(f"{part}/statistics" if kind in _STATISTICS else part, []).append(name)
    return parts


def _norm(half: State, start: State, names: Iterable[str]) -> float:
    squares = (
        float(np.square(half[name].astype(np.float64) - start[name]).sum()) for name in names
    )
    return float(np.sqrt(sum(squares)))
