"""Runs fuzz targets in batches, each repeatable by its seed, and counts what came of it.

``python -m tests.fuzz.campaign TARGET SEED BATCH`` repeats one batch, from the root of the
repository. The input that failed goes into ``tests/fuzz/corpus/``.
"""

from __future__ import annotations

import logging
import random
import resource
import sys
import time
import tracemalloc
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.message_targets import Frames, Messages, Opening
from tests.fuzz.target import Target
from tests.fuzz.tensor_targets import Decode, DecodeTorch, Nonzero, Pack

TARGETS: dict[str, type[Target]] = {
    "decode": Decode,
    "decode_torch": DecodeTorch,
    "nonzero": Nonzero,
    "unpack_parameters": Pack,
    "frames": Frames,
    "messages": Messages,
    "link": Opening,
}

BATCH = 1000
TRACED_EVERY = 25
"""Batches of which the last has its memory traced, which is slow."""
HANG_S = 10.0
ROOM_BYTES = 128 << 20


class Finding(AssertionError):
    """An input that did something else than documented."""


@dataclass
class Tally:
    """What came of the inputs of one target; ``""`` counts those that were taken."""

    target: str
    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    peak: int = 0
    """Most memory of a traced batch, bytes."""

    def add(self, other: Tally) -> None:
        """Count in what another run of the target came to."""
        self.outcomes += other.outcomes
        self.seconds += other.seconds
        self.peak = max(self.peak, other.peak)


def run(target: str, seed: int, batches: range) -> Tally:
    """Try the inputs of these batches. Raises Finding, which says how to repeat it."""
    logging.getLogger("splitfleet.link").setLevel(logging.CRITICAL)
    tally = Tally(target)
    for batch in batches:
        tally.add(_run_batch(target, seed, batch, traced=(batch + 1) % TRACED_EVERY == 0))
    return tally


def bound_memory() -> None:
    """Let this process take no more than ``ROOM_BYTES`` beyond what it has now (Linux only).

    What C libraries take counts too, which tracing does not see.
    """
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        (line,) = (line for line in status.splitlines() if line.startswith("VmData:"))
        limit = int(line.split()[1]) * 1024 + ROOM_BYTES
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _run_batch(name: str, seed: int, batch: int, *, traced: bool) -> Tally:
    """One batch; a traced one that took too much is tried once more, for whose memory it was.

    The interpreter's own tables count too when they grow: that of its interned names takes
    3.8 MB at once (CPython 3.11 with torch), in whichever batch comes to it.
    """
    tally = _try_batch(name, seed, batch, traced=traced)
    if tally.peak > TARGETS[name].memory:
        tally = _try_batch(name, seed, batch, traced=traced)
    if tally.peak > TARGETS[name].memory:
        raise Finding(
            f"{tally.peak} bytes of memory, {TARGETS[name].memory} allowed: "
            f"{_to_repeat(name, seed, batch)}"
        )
    return tally


def _to_repeat(name: str, seed: int, batch: int) -> str:
    return f"python -m tests.fuzz.campaign {name} {seed} {batch}"


def _try_batch(name: str, seed: int, batch: int, *, traced: bool) -> Tally:
    target = TARGETS[name](random.Random(f"{name} {seed} {batch}"))
    tally = Tally(name)
    slowest = 0.0
    started = last = time.perf_counter()
    if traced:
        tracemalloc.start()
    try:
        for _ in range(BATCH):
            tally.outcomes[target.once()] += 1
            now = time.perf_counter()
            slowest, last = max(slowest, now - last), now
        if traced:
            tally.peak = tracemalloc.get_traced_memory()[1]
    except Exception as exc:
        raise Finding(f"{exc!r} for {target.input.hex()}: {_to_repeat(name, seed, batch)}") from exc
    finally:
        if traced:
            tracemalloc.stop()
    tally.seconds = last - started
    unknown = tally.outcomes.keys() - target.reasons - {""}
    if unknown:
        raise Finding(
            f"reasons that are not documented, {sorted(unknown)}: {_to_repeat(name, seed, batch)}"
        )
    if slowest > HANG_S:
        raise Finding(f"an input took {slowest:.0f} s: {_to_repeat(name, seed, batch)}")
    return tally


def table(tallies: list[Tally]) -> str:
    """Inputs, rate and memory of each target, and how many were refused for each reason."""
    lines = []
    for tally in tallies:
        count = tally.outcomes.total()
        lines.append(
            f"{tally.target}: {count:,} inputs, {count / tally.seconds:,.0f} a second, "
            f"{tally.peak / 1000:,.0f} kB at most"
        )
        lines += [f"  {n:>10,}  {reason or 'taken'}" for reason, n in tally.outcomes.most_common()]
    return "\n".join(lines)


if __name__ == "__main__":
    name, first, number = sys.argv[1:]
    sys.stdout.write(table([run(name, int(first), range(int(number), int(number) + 1))]) + "\n")
