"""Decisions about rounds, each a pure function of its inputs."""

from __future__ import annotations

import math
from enum import StrEnum

from broker.messages import Measurement

MAX_QUOTA = 65_536


class Verdict(StrEnum):
    """What to do with a round now."""

    WAIT = "wait"
    CLOSE = "close"
    EXTEND = "extend"
    ABANDON = "abandon"


def judge(
    *, participants: int, finished: int, quorum: int, overdue: bool, extended: bool
) -> Verdict:
    """A round closes when all have finished, or at its deadline with quorum.

    Below quorum it is extended once, then abandoned.
    """
    if finished >= participants:
        return Verdict.CLOSE
    if not overdue:
        return Verdict.WAIT
    if finished >= quorum:
        return Verdict.CLOSE
    return Verdict.ABANDON if extended else Verdict.EXTEND


def quorum_of(participants: int, fraction: float) -> int:
    """How many must finish: ``fraction`` of the participants, rounded up, at least one."""
    return max(1, math.ceil(fraction * participants))


def learning_rate(base: float, round_number: int, rounds: int, schedule: str) -> float:
    """Constant within a round; ``cosine`` falls from ``base`` in round 1 to 0 after the last."""
    if schedule == "constant":
        return base
    progress = min(1.0, (round_number - 1) / max(1, rounds))
    return base * 0.5 * (1 + math.cos(math.pi * progress))


def quota_of(samples: int, batch_size: int, fixed: int | None) -> int:
    """Batches of one device in a round: a configured number, or one pass over its images.

    The images are the device's claim, so the pass has a bound.
    """
    return fixed if fixed is not None else min(MAX_QUOTA, max(1, samples // batch_size))


def credits_of(*, window: int, devices: int, batch_chunks: int, queue_chunks: int) -> int:
    """Batches a device may have out.

    All devices together stay below 80 % of the broker's queue, so that it never has to drop
    anything; at least one each, or nothing would move.
    """
    share = int(0.8 * queue_chunks / max(1, devices) / max(1, batch_chunks))
    return max(1, min(window, share))


def choose_cut(
    measured: Measurement,
    batch_bytes: list[int],
    *,
    step_budget_ms: float,
    memory_budget_mb: float | None,
) -> int:
    """The deepest cut whose training step and memory fit the budgets; 1 if none does.

    A step at cut ``c`` is forward and backward of blocks before ``c`` and of the exit there, and
    the upload of ``batch_bytes[c-1]``. Without a memory budget the device's available memory
    counts, half of it.
    """
    memory = measured.available_mb / 2 if memory_budget_mb is None else memory_budget_mb
    best = 1
    per_cut = zip(batch_bytes, measured.exit_ms, measured.memory_mb, measured.step_ms, strict=False)
    for index, (size, exit_ms, memory_mb, _) in enumerate(per_cut):
        upload_ms = (
            1000 * size / measured.uplink_bytes_per_s if measured.uplink_bytes_per_s else 0.0
        )
        step_ms = sum(measured.step_ms[: index + 1]) + exit_ms + upload_ms
        if step_ms <= step_budget_ms and memory_mb <= memory:
            best = index + 1
    return best
