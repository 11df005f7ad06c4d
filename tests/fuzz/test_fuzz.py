"""Bytes of strangers: every refusal has a documented reason, and memory stays within the limits."""

from __future__ import annotations

import multiprocessing
import random
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import ClassVar

import pytest
import torch

from broker.envelopes import decode_message
from tensors.decoding import decode
from tensors.parameters import unpack_parameters
from tests.fuzz.campaign import (
    BATCH,
    TARGETS,
    TRACED_EVERY,
    Finding,
    Tally,
    bound_memory,
    run,
    table,
)
from tests.fuzz.message_targets import TOPICS
from tests.fuzz.seeds import FOLDER
from tests.fuzz.target import Target
from tests.fuzz.tensor_targets import mask_for

BATCHES = {
    "decode": 35,
    "decode_torch": 30,
    "nonzero": 30,
    "unpack_parameters": 25,
    "frames": 30,
    "messages": 30,
    "link": 25,
}
"""Batches of a short run; a long one has ``LONG`` times as many."""
LONG = 50
JOB = 50
PROCESSES = 2


def check(tallies: list[Tally]) -> None:
    """Every documented reason occurred, and some inputs were taken."""
    for tally in tallies:
        missing = (TARGETS[tally.target].reasons | {""}) - tally.outcomes.keys()
        assert not missing, f"{tally.target} never gave {sorted(missing)}\n{table(tallies)}"


@pytest.mark.parametrize("target", TARGETS)
def test_damaged_input_is_refused_with_a_reason(target: str, rng: random.Random) -> None:
    tally = run(target, rng.randrange(2**32), range(BATCHES[target]))
    sys.stdout.write(table([tally]))
    check([tally])


def start_worker() -> None:
    torch.set_num_threads(1)
    for target in TARGETS:
        run(target, 0, range(1))
    bound_memory()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_million_damaged_inputs(rng: random.Random, capfd: pytest.CaptureFixture[str]) -> None:
    seed = rng.randrange(2**32)
    jobs = [
        (target, seed, range(start, start + JOB))
        for target in TARGETS
        for start in range(0, LONG * BATCHES[target], JOB)
    ]
    tallies = {target: Tally(target) for target in TARGETS}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, mp_context=spawn, initializer=start_worker) as pool:
        for tally in pool.map(run, *zip(*jobs, strict=True)):
            tallies[tally.target].add(tally)
    with capfd.disabled():
        sys.stdout.write(f"\nseed {seed}\n{table(list(tallies.values()))}\n")
    assert sum(tally.outcomes.total() for tally in tallies.values()) >= 10_000_000
    check(list(tallies.values()))


def test_the_slow_run_has_ten_million_inputs() -> None:
    assert BATCHES.keys() == TARGETS.keys()
    assert LONG * BATCH * sum(BATCHES.values()) >= 10_000_000
    assert all(LONG * batches % JOB == 0 for batches in BATCHES.values())
    assert min(BATCHES.values()) >= TRACED_EVERY


class Hungry(Target):
    reasons = frozenset()
    memory = 100_000
    batches: ClassVar[list[int]]
    """For each batch tried, bytes that each of its inputs takes; the next one's first."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self._taken = self.batches.pop(0)

    def once(self) -> str:
        bytearray(self._taken)
        return ""


def test_too_much_memory_is_a_finding_where_it_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "hungry", Hungry)
    traced = range(TRACED_EVERY - 1, TRACED_EVERY)
    Hungry.batches = [200_000, 1000]
    assert 1000 <= run("hungry", 0, traced).peak < 100_000
    Hungry.batches = [200_000, 200_000]
    with pytest.raises(Finding, match=f"100000 allowed.* hungry 0 {TRACED_EVERY - 1}$"):
        run("hungry", 0, traced)


def made(kind: str) -> list[bytes]:
    files = sorted((FOLDER / kind).glob("made-*"))
    assert len(files) > 5
    return [file.read_bytes() for file in files]


def test_fuzzing_starts_from_what_is_whole() -> None:
    """Else, after a change of the format, damage would never get past the first checks."""
    for data in made("tensors"):
        decode(data, keep=mask_for(data))
    for data in made("packs"):
        unpack_parameters(data)
    for data in made("messages"):
        topic, _, message = data.partition(b"\n")
        decode_message(TOPICS.parse(topic.decode()), message)
