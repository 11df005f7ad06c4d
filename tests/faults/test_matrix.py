"""The fault matrix: everything that can happen, in every phase of a run, each with its outcome."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.fault import Fault
from tests.faults.matrix import FAULTS
from tests.faults.trial import NOTHING, PHASES, SEED, UNTROUBLED_S, Outcome, Phase, Trial


def assert_outcome(seen: Outcome, expected: Outcome) -> None:
    assert replace(seen, timeouts=0) == replace(expected, timeouts=0)
    assert seen.timeouts <= expected.timeouts


def test_nothing_happens(tmp_path: Path) -> None:
    seen = Trial(tmp_path, seed=SEED).run(within_s=UNTROUBLED_S)
    assert_outcome(seen, NOTHING)


def test_every_fault_has_an_outcome_in_every_phase() -> None:
    for fault in FAULTS:
        assert sorted(fault.outcomes) == sorted(PHASES), fault.name


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_cell(fault: Fault, phase: Phase, tmp_path: Path) -> None:
    trial = Trial(tmp_path, seed=SEED)
    fault.strike(trial, phase)
    seen = trial.run(within_s=fault.within_s)
    assert trial.struck
    assert all(hit.hits == hit.times for hit in trial.fleet.faults.active)
    assert_outcome(seen, fault.outcomes[phase])
