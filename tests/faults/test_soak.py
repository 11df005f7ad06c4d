"""Everything at once, for many rounds: the run ends, and its books balance.

`python -m tests.faults.figures --soak` prints what the slow ones came to.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from tests.faults.soak import Soak

SETTINGS: dict[str, dict[str, Any]] = {
    "gradient": {},
    "none": {"feedback": "none"},
    "sequential": {"strategy": "sequential"},
    "cascade": {"strategy": "cascade"},
    "buffered": {"aggregation": "buffered", "buffer_size": 6},
}
SHORT = [("gradient", 1), ("gradient", 2), ("gradient", 3), *((mode, 4) for mode in SETTINGS)]
LONG = [("gradient", 1), ("gradient", 2), ("gradient", 3), ("none", 4), ("buffered", 5)]
"""Mode and seed."""
ROUNDS = 200


@pytest.mark.parametrize(("mode", "seed"), SHORT)
def test_twenty_rounds(tmp_path: Path, mode: str, seed: int) -> None:
    soak = Soak(tmp_path, seed=seed, rounds=20, **SETTINGS[mode])
    soak.run()
    assert soak.figures["faults"] > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("mode", "seed"), LONG)
def test_two_hundred_rounds(tmp_path: Path, mode: str, seed: int) -> None:
    soak = Soak(tmp_path, seed=seed, rounds=ROUNDS, **SETTINGS[mode])
    soak.run()
    assert soak.figures["faults"] > ROUNDS
    second, last = quarters(soak)
    assert last < 1.5 * second, f"memory grows: {second:.0f} objects, then {last:.0f}"


def test_what_is_kept_for_ever_is_seen(tmp_path: Path) -> None:
    soak = Soak(tmp_path, seed=1, rounds=20)
    soak.fleet.run(until=lambda: len(soak.watcher.opened) == 2)
    before = soak.weigh()
    soak.fleet.core._run.leak = [object() for _ in range(1000)]  # type: ignore[attr-defined]
    assert soak.weigh() >= before + 1000


def quarters(soak: Soak) -> tuple[float, float]:
    """Objects in the second and in the last quarter of the rounds, on average."""
    weights, length = soak.weights, soak.rounds // 4
    second = [weights[n] for n in weights if length < n <= 2 * length]
    return mean(second), mean(weights[n] for n in weights if n > soak.rounds - length)
