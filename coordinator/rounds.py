"""Decisions about rounds, each a pure function of its inputs."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from broker.messages import Measurement
from coordinator.label_counts import LabelCounts

MAX_QUOTA = 65_536
ENOUGH_PACES = 3
SHORTEST_S = 5.0
LATE_ROUNDS = 2
EARLY_ROUNDS = 3
SMALLEST_SHARE = 1 / 8
FILL = 0.8
"""How much of the broker's queue batches on their way may fill."""


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


def judge_buffer(*, contributions: int, wanted: int, overdue: bool) -> Verdict:
    """Without a barrier a round closes after so many contributions, or at its deadline with any."""
    if contributions >= wanted:
        return Verdict.CLOSE
    if not overdue:
        return Verdict.WAIT
    return Verdict.CLOSE if contributions else Verdict.EXTEND


def quorum_of(participants: int, fraction: float) -> int:
    """How many must finish: ``fraction`` of the participants, rounded up, at least one."""
    return max(1, math.ceil(fraction * participants))


def deadline(
    paces: Mapping[int, Sequence[float]],
    work: Mapping[int, int],
    *,
    mads: float | None,
    ceiling_s: float,
) -> float:
    """Seconds that a round may take: as long as the slowest cut in it usually needs.

    ``paces`` are seconds per batch that devices took before, by cut; ``work`` the most batches of a
    device at each cut in this round. A cut needs median + ``mads`` · MAD, where the median absolute
    deviation counts at least a tenth of the median. It is :data:`SHORTEST_S` at least and
    ``ceiling_s`` at most, and exactly that as long as some cut has fewer than :data:`ENOUGH_PACES`,
    or without ``mads``.
    """
    if mads is None or any(len(paces.get(cut, ())) < ENOUGH_PACES for cut in work):
        return ceiling_s
    needed = [batches * _usual(paces[cut], mads) for cut, batches in work.items()]
    return min(ceiling_s, max([SHORTEST_S, *needed]))


def _usual(paces: Sequence[float], mads: float) -> float:
    median = statistics.median(paces)
    deviation = statistics.median(abs(pace - median) for pace in paces)
    return median + mads * max(deviation, 0.1 * median)


def sample_devices(
    names: Sequence[str],
    fraction: float,
    *,
    most: int,
    seed: int,
    round_number: int,
    attempt: int,
) -> list[str]:
    """Who takes part in a round: ``fraction`` of the devices, at least one, in order of names.

    The same for the same arguments, whatever was drawn before; never more than ``most``.
    """
    wanted = max(1, min(most, math.ceil(fraction * len(names))))
    if wanted >= len(names):
        return sorted(names)
    rng = random.Random(f"{seed}/{round_number}/{attempt}")
    return sorted(rng.sample(sorted(names), wanted))


@dataclass(frozen=True, slots=True)
class Work:
    """What a device has to do in a round: its cut layer and its number of batches.

    With ``labels`` its losses are calibrated by them; they count what is trained on here. Of a
    ``frozen`` device the half is not trained: nothing goes back, and it brings nothing of its own.
    """

    cut: int
    quota: int
    labels: LabelCounts | None = None
    frozen: bool = False


@dataclass(frozen=True, slots=True)
class Load:
    """How much of its quota a device is given, and how it has fared since that changed.

    ``late`` and ``early`` count rounds in a row.
    """

    share: float = 1.0
    late: int = 0
    early: int = 0


def next_load(load: Load, *, finished: bool, spare: bool) -> tuple[Load, bool]:
    """The load after a round, and whether the device needs a shallower cut.

    Late (:data:`LATE_ROUNDS` rounds in a row not finished): half the work, down to an eighth; late
    again with that little: one cut shallower, and half of its work to begin with. Early
    (:data:`EARLY_ROUNDS` in a row finished in less than half the time): twice the work, up to all.
    """
    if not finished:
        if load.late + 1 < LATE_ROUNDS:
            return Load(load.share, late=load.late + 1), False
        if load.share > SMALLEST_SHARE:
            return Load(load.share / 2), False
        return Load(0.5), True
    if not spare or load.share == 1.0:
        return Load(load.share), False
    if load.early + 1 < EARLY_ROUNDS:
        return Load(load.share, early=load.early + 1), False
    return Load(min(1.0, 2 * load.share)), False


def learning_rate(base: float, round_number: int, rounds: int, schedule: str) -> float:
    """Constant within a round; ``cosine`` falls from ``base`` in round 1 to 0 after the last."""
    if schedule == "constant":
        return base
    progress = min(1.0, (round_number - 1) / max(1, rounds))
    return base * 0.5 * (1 + math.cos(math.pi * progress))


def feedback_share(schedule: str, round_number: int, rounds: int) -> float:
    """How much of the feedback's weight a round has.

    ``rising`` by the same step in every round, from 1/rounds to 1; ``falling`` the other way round.
    """
    if schedule == "constant":
        return 1.0
    number = min(max(1, round_number), rounds)
    return (number if schedule == "rising" else rounds + 1 - number) / rounds


def server_share(rule: str, participants: int) -> float:
    """By what the learning rate is multiplied in a server network that ``participants`` share.

    ``same`` 1, ``sqrt`` 1/√N, ``linear`` 1/N.
    """
    power = {"same": 0.0, "sqrt": -0.5, "linear": -1.0}[rule]
    return math.pow(max(1, participants), power)


def quota_of(samples: int, batch_size: int, fixed: int | None) -> int:
    """Batches of one device in a round: a configured number, or one pass over its images.

    The images are the device's claim, so the pass has a bound.
    """
    return fixed if fixed is not None else min(MAX_QUOTA, max(1, samples // batch_size))


def credits_of(*, window: int, devices: int, batch_chunks: int, queue_chunks: int) -> int:
    """Batches a device may have out.

    All devices together stay below :data:`FILL` of the broker's queue, so that it never has to
    drop anything; at least one each, see :func:`most_devices`.
    """
    share = int(FILL * queue_chunks / max(1, devices) / max(1, batch_chunks))
    return max(1, min(window, share))


def most_devices(*, batch_chunks: int, queue_chunks: int) -> int:
    """How many devices may train at once, with a batch out each; the rule of credits_of."""
    return max(1, int(FILL * queue_chunks / max(1, batch_chunks)))


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
