"""Fifteen devices at three cuts, one of each an attacker: with a defence they learn as before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ops.bench_attacks import Row, Scale, judge
from ops.simulator.hostile import Attack
from tensors.datasets import load_dataset

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
SCALE = Scale(rounds=8, batches=8)
TEST = load_dataset("fashion-mnist-small", "test")


def fleet(attack: Attack | None, defence: str, folder: Path, scale: Scale = SCALE) -> Row:
    return judge(attack, defence, scale, TEST, folder)


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Row:
    row = fleet(None, "none", tmp_path_factory.mktemp("honest"))
    assert row.full > 0.65
    return row


def test_plain_averaging_collapses(tmp_path: Path) -> None:
    row = fleet("sign-flip-scale", "none", tmp_path, replace(SCALE, rounds=3))
    assert row.full < 0.3


@pytest.mark.parametrize(
    ("attack", "rule"),
    [
        ("sign-flip-scale", "trimmed-mean"),
        ("sign-flip-scale", "median"),
        ("sign-flip", "trimmed-mean"),
        ("scale", "trimmed-mean"),
    ],
)
def test_a_robust_rule_stays_within_three_points(
    attack: Attack, rule: str, honest: Row, tmp_path: Path
) -> None:
    row = fleet(attack, rule, tmp_path)
    assert row.full > honest.full - 0.03


@pytest.mark.parametrize("attack", ["labels", "garbage"])
def test_poisoned_batches_are_refused_and_those_of_others_are_not(
    attack: Attack, honest: Row, tmp_path: Path
) -> None:
    row = fleet(attack, "batches", tmp_path)
    assert row.refused > 0.5
    assert row.honest < 0.02
    assert row.full > honest.full - 0.03
