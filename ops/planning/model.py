"""A fleet as the planner sees it: what each device would need at each cut, and a round of all.

The costs are the simulator's: ``DeviceCost``, ``ServerCost``, ``LinkProfile`` and
``message_sizes``; credits, quotas and deadlines are the coordinator's own functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from broker.link import DEFAULT_CHUNK_BYTES
from coordinator.placement import Placement
from coordinator.rounds import MAX_QUOTA, deadline, quorum_of, quota_of
from coordinator.settings import CoordinatorSettings
from coordinator.training import RECEIPT_WAIT_S
from ops.planning.memory import device_mb
from ops.planning.timing import Floats, Rings, train, wait_for
from ops.simulator.profile import Server
from ops.simulator.programs import Device
from ops.simulator.sizes import MessageSizes

Cuts = NDArray[np.int64]
"""A cut layer for each device (N,)."""
MESSAGE_BYTES = 240
"""Of a batch's message beside its tensor: topic, stamp, labels; as counted in the simulator."""
ROUND_BYTES = 1500
"""Announcement, join, receipts, report and manifest of a round, each way; the same."""
PARTS = ("computing", "uplink", "downlink", "latency", "server", "parameters")


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """A round with these ``cuts``; arrays (N,). Seconds.

    ``slowest_s`` is what a round takes that waits for everybody, ``round_s`` one that ends by the
    coordinator's rules (infinite if none would close); without a barrier, both are the time from
    version to version. ``device_s`` is from a round's opening to the end of a device's upload;
    ``late`` are devices that miss the deadline. ``batches`` are made in a round. ``busy`` (N, 6) is
    the share of the device's time that each of :data:`PARTS` takes.
    """

    cuts: Cuts
    round_s: float
    slowest_s: float
    device_s: Floats
    batches: Floats
    busy: Floats
    wait_s: float
    server_load: float
    deadline_s: float
    late: NDArray[np.int64]
    leg: Floats
    """Batches of a device each time that it takes part (N,)."""

    @property
    def batches_per_s(self) -> float:
        """Of the whole fleet, while rounds follow on each other."""
        done = float(self.batches.sum() - self.batches[self.late].sum())
        return done / self.round_s if math.isfinite(self.round_s) else 0.0


class FleetModel:
    """Predicts rounds of ``devices`` under ``settings``. Failures and duty cycles are left out."""

    def __init__(
        self,
        settings: CoordinatorSettings,
        devices: Sequence[Device],
        server: Server,
        sizes: MessageSizes,
    ) -> None:
        self.settings = settings
        self.devices = list(devices)
        self.server = server
        self.sizes = sizes
        self.memory_mb = np.array(device_mb(settings, sizes))
        """Of training at each cut (C,)."""
        count, deepest = len(devices), len(sizes.shapes)
        self.cuts = np.arange(1, deepest + 1)
        self._placement = Placement(settings, sizes.shapes, chunk_bytes=DEFAULT_CHUNK_BYTES)
        self.quotas = np.array(
            [
                MAX_QUOTA
                if settings.round_seconds is not None and settings.batches_per_round is None
                else quota_of(d.samples, settings.batch_size, settings.batches_per_round)
                for d in devices
            ],
            np.float64,
        )
        self.windows = np.array(
            [min(settings.window, self._placement.credits(int(c), count)) for c in self.cuts],
            np.float64,
        )
        self._compute()

    def _compute(self) -> None:
        settings, sizes, server = self.settings, self.sizes, self.server

        def column(values: Sequence[float]) -> Floats:
            return np.array(values, np.float64)[:, None]

        costs = [device.cost for device in self.devices]
        links = [device.link for device in self.devices]
        feedback = settings.feedback == "gradient"
        sent = np.array(sizes.activations, np.float64) + MESSAGE_BYTES
        back = feedback * np.array(sizes.gradients, np.float64) + MESSAGE_BYTES
        half = np.array(sizes.parameters, np.float64)
        block = column([cost.forward_s + cost.backward_s for cost in costs])
        up = column([1 / link.up_bytes_per_s for link in links])
        down = column([1 / link.down_bytes_per_s for link in links])
        self._trip = column([link.mean_delay_s + server.latency_s for link in links])
        self._computing = block * self.cuts
        self._up, self._down = sent * up, back * down
        busy = np.array([server.cost.batch_s(int(c), sizes.blocks) for c in self.cuts])
        arriving, leaving = sent / server.down_bytes_per_s, back / server.up_bytes_per_s
        at_server = np.maximum(busy, np.maximum(arriving, leaving))
        slowest = np.maximum(self._computing, np.maximum(self._up, self._down))
        slowest = np.maximum(slowest, at_server)
        loop = self._computing + self._up + self._down + 2 * self._trip
        loop = loop + busy + arriving + leaving
        group = 1.0 if feedback else np.maximum(1, self.windows // 2)
        shape = loop.shape
        self._fetch, self._bring = half * down, half * up
        self._rings = Rings(
            np.broadcast_to(self.quotas[:, None], shape),
            np.broadcast_to(self.windows, shape),
            loop,
            slowest,
            np.broadcast_to(at_server, shape),
            (group - 1) * slowest,
        )
        self._around = self._fetch + self._bring + 4 * self._trip
        if not feedback:
            left_over = (self.quotas[:, None] % group) > 0
            self._around = self._around + RECEIPT_WAIT_S / 2 * left_over
        if settings.aggregation == "buffered":
            self._around = self._around + self._trip  # the parameters are asked for
        self.up_bytes = self.quotas[:, None] * sent + half + ROUND_BYTES
        self.down_bytes = self.quotas[:, None] * back + half + ROUND_BYTES
        self._sent, self._back, self._half = sent, back, half

    # -- what is asked ----------------------------------------------------------------------------

    @cached_property
    def alone_s(self) -> Floats:
        """Seconds of a round for each device at each cut (N, C), had it the server to itself."""
        return self._around + self._rings_by_time().seconds(0.0)

    @cached_property
    def server_s(self) -> Floats:
        """Seconds of a round that each device keeps the server busy at each cut (N, C)."""
        rings = self._rings_by_time()
        result: Floats = rings.batches * rings.server_s
        return result

    @property
    def budget_mb(self) -> Floats:
        """Memory that each device may use for training (N,), by the rule of cut ``auto``."""
        if self.settings.memory_budget_mb is not None:
            return np.full(len(self.devices), self.settings.memory_budget_mb)
        return np.array([device.memory_mb / 2 for device in self.devices])

    def predict(self, cuts: Sequence[int] | Cuts) -> Prediction:
        """A round in which device ``i`` is cut at ``cuts[i]``."""
        settings = self.settings
        chosen = np.asarray(cuts, np.int64)
        index = np.arange(len(chosen)), chosen - 1
        share, participants = self._participation(chosen)
        rings = self._rings.take(index)
        if settings.round_seconds is None:
            training = train(rings, share=share)
            seconds, wait, load = training.seconds, training.wait_s, training.load
        else:
            rings, wait, load = _by_time(rings, settings.round_seconds, share)
            seconds = np.minimum(rings.seconds(wait), settings.round_seconds + rings.loop_s + wait)
        broadcast = sum(self._half[cut - 1] for cut in set(chosen.tolist()))
        device_s = broadcast / self.server.up_bytes_per_s + self._around[index] + seconds
        busy = self._shares(index, rings, wait, device_s)
        if settings.aggregation == "buffered":
            pace = float((1 / device_s).sum())
            version_s = settings.buffer_size / pace + self.server.merge_s
            made = rings.batches * settings.buffer_size / device_s / pace
            return Prediction(
                chosen, version_s, version_s, device_s, made, busy, wait, load,
                settings.round_deadline_s, np.zeros(0, np.int64), rings.batches,
            )  # fmt: skip
        slowest = self.server.merge_s + _mean_of_largest(device_s, participants)
        limit, round_s, late = self._rules(chosen, device_s, rings.batches, slowest)
        return Prediction(
            chosen, round_s, slowest, device_s, rings.batches * participants / len(chosen), busy,
            wait, load, limit, late, rings.batches,
        )  # fmt: skip

    def bytes_per_round(self, prediction: Prediction) -> tuple[Floats, Floats]:
        """Bytes that each device sends and receives in a round (N,), (N,)."""
        half, made = self._half[prediction.cuts - 1], prediction.batches
        legs = made / prediction.leg
        fetched = half * (legs if self.settings.aggregation == "buffered" else 1.0)
        up = made * self._sent[prediction.cuts - 1] + half * legs + ROUND_BYTES
        down = made * self._back[prediction.cuts - 1] + fetched + ROUND_BYTES
        return up, down

    # -- inside -----------------------------------------------------------------------------------

    def _rings_by_time(self) -> Rings:
        seconds = self.settings.round_seconds
        return self._rings if seconds is None else _by_time(self._rings, seconds, 0.0)[0]

    def _participation(self, cuts: Cuts) -> tuple[float, int]:
        count = len(cuts)
        if self.settings.aggregation == "buffered":
            return 1.0, count
        wanted = max(1, math.ceil(self.settings.participation * count))
        participants = min(wanted, self._placement.room({int(cut) for cut in cuts}))
        return participants / count, min(count, participants)

    def _rules(
        self, cuts: Cuts, device_s: Floats, batches: Floats, slowest: float
    ) -> tuple[float, float, NDArray[np.int64]]:
        settings = self.settings
        paces: dict[int, list[float]] = {}
        most: dict[int, int] = {}
        for cut, seconds, made in zip(cuts.tolist(), device_s, batches, strict=True):
            paces.setdefault(cut, []).append(float(seconds / made))
            most[cut] = max(int(made), most.get(cut, 0))
        by_count = settings.round_seconds is None
        limit = deadline(
            paces,
            most,
            mads=settings.deadline_mads if by_count else None,
            ceiling_s=settings.round_deadline_s,
        )
        late = np.flatnonzero(device_s > limit)
        if not len(late):
            return limit, slowest, late
        quorum = quorum_of(len(cuts), settings.quorum)
        for end in (limit, 2 * limit):
            if (device_s <= end).sum() >= quorum:
                late = np.flatnonzero(device_s > end)
                return limit, min(slowest, end + self.server.merge_s), late
        return limit, math.inf, late

    def _shares(
        self, index: tuple[Cuts, Cuts], rings: Rings, wait: float, device_s: Floats
    ) -> Floats:
        made, window = rings.batches, rings.window
        parts = [
            made * self._computing[index],
            made * self._up[index],
            made * self._down[index],
            made * 2 * self._trip[index[0], 0] / window,
            made * np.maximum(rings.server_s, (rings.server_s + wait) / window),
            self._fetch[index] + self._bring[index],
        ]
        return np.stack(parts, axis=1) / device_s[:, None]


def _by_time(rings: Rings, seconds: float, share: float) -> tuple[Rings, float, float]:
    """The batches that fit into so many seconds, and the wait and the load at the server then."""
    wait = load = 0.0
    for _ in range(4):
        made = np.minimum(rings.batches, 1 + np.floor(seconds / rings.cycle_s(wait)))
        rings_now = replace(rings, batches=made)
        if not share:
            break
        wait, load = wait_for(rings_now, share=share)
    return rings_now, wait, load


def _mean_of_largest(values: Floats, drawn: int) -> float:
    """Mean of the largest of so many values drawn from these."""
    count = len(values)
    if drawn >= count:
        return float(values.max())
    below, total = 1.0, 0.0
    for number, value in zip(range(count, 0, -1), np.sort(values)[::-1], strict=True):
        less = below * max(0, number - drawn) / number
        total += (below - less) * float(value)
        below = less
    return total
