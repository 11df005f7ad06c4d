"""Uploads that moved too far are shortened; those of honest devices are let alone."""

from __future__ import annotations

import numpy as np
import pytest

from coordinator.aggregation import half_of
from coordinator.defences.uploads import ENOUGH, UploadLimits
from tensors.networks import State
from tests.server_side import STATE
from tests.tiny import assert_same, differs

WEIGHT, HEAD = "blocks.0.conv.weight", "heads.2.0.fc.weight"
MEAN = next(name for name in STATE if name.endswith("running_mean"))
COUNTER = MEAN.replace("running_mean", "num_batches_tracked")


def moved(step: float, cut: int = 2) -> State:
    """A half of which every number has moved so far."""
    return {
        name: values + values.dtype.type(0 if name.endswith("tracked") else step)
        for name, values in half_of(STATE, cut).items()
    }


def norm(half: State, block: str) -> float:
    """How far a block's parameters are from the start."""
    squares = (
        np.square(half[name] - STATE[name]).sum()
        for name in half
        if name.startswith(block) and "running" not in name and "tracked" not in name
    )
    return float(np.sqrt(sum(squares)))


def known(limits: UploadLimits, *steps: float, samples: int = 64) -> None:
    for number, step in enumerate(steps):
        limits.note(f"d{number}", moved(step), STATE, samples)


def brought(
    limits: UploadLimits, half: State, samples: int = 64, device: str = "another"
) -> tuple[State, int]:
    """What becomes of an upload."""
    limits.note(device, half, STATE, samples)
    return limits.clip(half, STATE, samples)


def test_without_a_rule_nothing_is_touched() -> None:
    limits = UploadLimits()
    known(limits, 0.1, 0.1, 0.1)
    half = moved(50.0)
    clipped, parts = brought(limits, half, device="liar")
    assert clipped is half
    assert parts == 0


def test_the_bound_follows_the_median_of_the_others() -> None:
    limits = UploadLimits(factor=2.0)
    known(limits, 0.1, 0.1, 0.1, 0.1)
    clipped, parts = brought(limits, moved(-1.0), device="liar")
    assert parts == 5, "two blocks, their statistics, and the head"
    for block in ("blocks.0.", "blocks.1.", "heads.2."):
        assert norm(clipped, block) == pytest.approx(2 * norm(moved(0.1), block), rel=1e-3)
    assert (clipped[WEIGHT] <= STATE[WEIGHT]).all(), "in the direction that it had"
    np.testing.assert_allclose(clipped[MEAN], STATE[MEAN] - 0.2, rtol=1e-3)
    assert clipped[COUNTER] == STATE[COUNTER]


def test_what_is_within_it_comes_out_bit_for_bit() -> None:
    limits = UploadLimits(factor=2.0)
    known(limits, 0.1, 0.2, 0.1)
    half = moved(0.19)
    clipped, parts = brought(limits, half, device="d9")
    assert parts == 0
    assert_same(clipped, half)


def test_for_a_median_norms_of_some_devices_must_be_known() -> None:
    limits = UploadLimits(factor=2.0)
    for number in range(ENOUGH):
        assert not limits.can_judge(moved(9.0))
        limits.note(f"d{number}", moved(0.1), STATE, 64)
    assert limits.can_judge(moved(9.0))
    assert not limits.can_judge(moved(9.0, cut=5)), "nobody else holds blocks 2 to 4"
    assert UploadLimits(norm=1.0).can_judge(moved(9.0))
    assert UploadLimits().can_judge(moved(9.0))


def test_blocks_are_judged_by_all_who_hold_them_heads_by_their_own() -> None:
    limits = UploadLimits(factor=2.0)
    known(limits, 0.1, 0.1, 0.1)
    clipped, _ = brought(limits, moved(1.0, cut=5), device="deep")
    alone = differs(clipped, moved(1.0, cut=5))
    assert WEIGHT in alone
    assert not any(name.startswith(("heads.5.", "blocks.4.")) for name in alone)


def test_who_was_trained_on_more_may_go_further() -> None:
    limits = UploadLimits(factor=2.0)
    known(limits, 0.1, 0.1, 0.1, samples=64)
    assert brought(limits, moved(0.75), samples=256, device="large")[1] == 0
    limits = UploadLimits(factor=2.0)
    known(limits, 0.1, 0.1, 0.1, samples=64)
    assert brought(limits, moved(0.19), samples=8, device="small")[1] == 0, (
        "and fewer samples cost nothing"
    )


def test_a_fixed_bound_needs_nobody_else() -> None:
    limits = UploadLimits(norm=0.5)
    clipped, _ = brought(limits, moved(9.0), device="liar")
    for block in ("blocks.0.", "blocks.1.", "heads.2."):
        assert norm(clipped, block) == pytest.approx(0.5, rel=1e-3)


def test_with_both_the_lower_one_counts() -> None:
    limits = UploadLimits(factor=2.0, norm=1e-3)
    known(limits, 0.1, 0.1, 0.1)
    clipped, _ = brought(limits, moved(9.0), device="liar")
    assert norm(clipped, "heads.2.") == pytest.approx(1e-3, rel=1e-2)


def test_what_nothing_was_applied_of_and_what_was_not_trained_say_nothing() -> None:
    limits = UploadLimits(factor=2.0)
    for number in range(5):
        limits.note(f"idle{number}", moved(0.0), STATE, 64)
        limits.note(f"refused{number}", moved(1e6), STATE, 0)
    known(limits, 0.1, 0.1, 0.1)
    assert brought(limits, moved(0.15), device="honest")[1] == 0
    assert brought(limits, moved(9.0), device="liar")[1] == 5


def test_the_last_norms_of_so_many_devices_are_remembered() -> None:
    limits = UploadLimits(factor=2.0, devices=3)
    known(limits, *[9.0] * 5)
    known(limits, 0.1, 0.1, 0.1)
    assert brought(limits, moved(9.0), device="d1")[1] == 5


def test_a_variance_stays_one() -> None:
    limits = UploadLimits(norm=0.5)
    variance = MEAN.replace("running_mean", "running_var")
    half = moved(0.0) | {variance: np.zeros_like(STATE[variance])}
    clipped, parts = brought(limits, half, device="liar")
    assert parts == 1
    assert (clipped[variance] > 0).all()
