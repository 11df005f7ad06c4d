"""The cells of the matrix that differ without feedback, with one server copy, without a barrier."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.faults.matrix import FAULTS
from tests.faults.modes import CELLS, MODES
from tests.faults.test_matrix import assert_outcome
from tests.faults.trial import SEED, Phase, Trial

BY_NAME = {fault.name: fault for fault in FAULTS}


@pytest.mark.parametrize(("mode", "name", "phase"), CELLS)
def test_cell(mode: str, name: str, phase: Phase, tmp_path: Path) -> None:
    settings, rows = MODES[mode]
    fault = BY_NAME[name]
    trial = Trial(tmp_path, seed=SEED, **settings)
    fault.strike(trial, phase)
    seen = trial.run(within_s=fault.within_s)
    assert trial.struck
    assert_outcome(seen.without_rounds() if mode == "buffered" else seen, rows[name][phase])


@pytest.mark.parametrize("name", ["coordinator killed", "coordinator restarted"])
@pytest.mark.parametrize("phase", ["mid-round", "aggregating"])
def test_without_a_barrier_a_killed_coordinator_forgets_legs_under_way(
    name: str, phase: Phase, tmp_path: Path
) -> None:
    """Of versions that were closed by then; what it had written down of them is what counts."""
    settings, _ = MODES["buffered"]
    fault = BY_NAME[name]
    trial = Trial(tmp_path, seed=SEED, **settings)
    fault.strike(trial, phase)
    trial.fleet.run(limit_s=fault.within_s)
    books = trial.fleet.books()
    before = re.compile(r"round \(1, 0\): d\d (says|has) \d+ applied")
    assert [problem for problem in books.problems if not before.match(problem)] == []
    history = trial.fleet.checkpoint().history
    assert [record["attempt"] for record in history] == [0, 1, 0, 0]
