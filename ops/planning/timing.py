"""How long a round takes: closed formulas for one device, and one queue that all of them share.

A device with a window of ``w`` is a ring in which ``w`` batches go round: forward, uplink, server,
downlink, backward. In a ring without chance the time from batch to batch is the largest of the
parts, or the whole way round divided by ``w`` (the cycle mean of an event graph, Baccelli et al.,
*Synchronization and Linearity*, 1992, ch. 2). The server belongs to all rings. What a batch waits
for there is the mean of an M/G/1 queue (Pollaczek and Khinchine) at the load of the other devices,
and the load follows from the wait: both are solved for together, so that a server that is asked for
more than it can do slows everybody down until it is not.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

BISECTIONS = 24
ROUNDING = 1e-9
NEGLIGIBLE = 1e-3
"""A wait that makes nobody's training longer by more than this share needs no further look."""
STEPS = 8
"""The load is looked at anew whenever so many-th part of the devices has finished."""


@dataclass(frozen=True, slots=True)
class Rings:
    """Training of devices in a round: arrays of one shape, of devices, or of devices × cuts.

    ``batches``: of the device, at least 1. ``window``: batches that may be out. ``loop_s``: one
    batch's whole way round, without waiting for others. ``slowest_s``: the longest that any one
    part of the ring is busy with a batch. ``server_s``: how long the server is. ``company_s``: how
    long an answer waits for others that go with it; the last one of all does not.
    """

    batches: Floats
    window: Floats
    loop_s: Floats
    slowest_s: Floats
    server_s: Floats
    company_s: Floats

    def seconds(self, wait_s: float) -> Floats:
        """From the first batch to the last one learnt from, if each waits so long for others."""
        loop = self.loop_s + wait_s
        bursts, rest = np.divmod(self.batches - 1, self.window)
        in_turn = (self.batches - 1) * self.slowest_s
        ahead = np.maximum(in_turn, bursts * (loop + self.company_s) + rest * self.slowest_s)
        result: Floats = loop + ahead
        return result

    def cycle_s(self, wait_s: float) -> Floats:
        """From batch to batch, on average, if each waits so long for others."""
        around = (self.loop_s + self.company_s + wait_s) / self.window
        result: Floats = np.maximum(self.slowest_s, around)
        return result

    def take(self, chosen: Any) -> Rings:
        """Those that an index of the arrays chooses."""
        return Rings(*(getattr(self, field.name)[chosen] for field in fields(self)))


@dataclass(frozen=True, slots=True)
class Training:
    """What came of it: seconds of each device, and of the server's queue."""

    seconds: Floats
    wait_s: float
    """For others, while all devices are at it."""
    load: float
    """Share of that time in which the server is busy."""


def train(rings: Rings, *, share: float = 1.0) -> Training:
    """Devices (1-D) at the same server, each from 0 on until its own end.

    Devices that have finished leave the server to the others. Only a ``share`` of all, whichever,
    takes part at a time.
    """
    count = len(rings.batches)
    first_wait, load = wait_for(rings, share=share)
    alone = rings.seconds(0.0)
    if np.all(rings.seconds(first_wait) <= (1 + NEGLIGIBLE) * alone):
        return Training(rings.seconds(first_wait), first_wait, load)
    finished = np.zeros(count)
    left = np.ones(count)
    active = np.ones(count, np.bool_)
    now = 0.0
    while active.any():
        rest = rings.take(active)
        wait, _ = wait_for(rest, share=share)
        whole = rest.seconds(wait)
        ends = left[active] * whole
        nth = -(-len(ends) // STEPS) - 1
        step = float(np.partition(ends, nth)[nth])
        done = ends <= step
        indices = np.flatnonzero(active)
        finished[indices[done]] = now + ends[done]
        left[indices] -= step / whole
        active[indices[done]] = False
        now += step
    return Training(finished, first_wait, load)


def wait_for(rings: Rings, *, share: float = 1.0) -> tuple[float, float]:
    """Seconds that a batch waits for others at the server, and the server's load, 0 to 1.

    The wait grows with the load, and the load falls with the wait: there is one answer.
    """
    count = len(rings.batches)
    work = rings.batches * rings.server_s
    total = float(work.sum())
    if not total:
        return 0.0, 0.0
    residual = float((work * rings.server_s).sum()) / total / 2
    low, high = 0.0, float((np.minimum(rings.window, rings.batches) * rings.server_s).sum())
    for _ in range(BISECTIONS):
        wait = (low + high) / 2
        busy = share * float((work / rings.seconds(wait)).sum())
        load = busy * (1 - 1 / count)
        if busy > 1 + ROUNDING or wait < residual * load / (1 - load):
            low = wait
        else:
            high = wait
    wait = (low + high) / 2
    return wait, min(1.0, share * float((work / rings.seconds(wait)).sum()))
