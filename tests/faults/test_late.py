"""Batches behind their device's upload, and devices that are back before the coordinator."""

from __future__ import annotations

from pathlib import Path

import pytest

from ops.simulator import Fault
from tests.faults.matrix import FAULTS
from tests.faults.trial import DEADLINE_S, GRADIENT_S, SEED, UNTROUBLED_S, Outcome, Trial


def test_a_batch_that_comes_after_the_upload_is_discarded(tmp_path: Path) -> None:
    """The round is still open, because another device is slow."""
    trial = Trial(tmp_path, seed=SEED)

    def strike() -> None:
        trial.fleet.faults.add(
            Fault("late", kind="activations", device="d0", times=1, delay_s=GRADIENT_S + 10.0)
        )
        trial.victim.slow(12)
        trial.when_gone_on(lambda: trial.victim.slow(1))

    trial.at_device("joining", strike)
    outcome = trial.run(within_s=UNTROUBLED_S + DEADLINE_S)
    assert outcome == Outcome(discarded={"late": 1}, timeouts=1)


@pytest.mark.parametrize("seed", [1, 2, 3, 5])
def test_whoever_is_back_first_after_a_broker_lost_its_memory(tmp_path: Path, seed: int) -> None:
    """Devices before the coordinator, or after it: only what timed out till then has expired."""
    fault = next(fault for fault in FAULTS if fault.name == "broker killed")
    trial = Trial(tmp_path, seed=seed)
    fault.strike(trial, "mid-round")
    outcome = trial.run(within_s=fault.within_s)
    assert (outcome.expired, outcome.timeouts) == (2, 2)
