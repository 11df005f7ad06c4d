from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from ops import rate_accuracy
from ops.bench_server import WAYS, Bench, Setup, make_rows, run_bench
from ops.errors import DiskTrouble, SettingsWrong
from tensors.datasets import Dataset, load_dataset
from tensors.errors import DataError
from tests.tiny import make_dataset

TRAIN, TEST = make_dataset(256, seed=1), make_dataset(64, seed=2)
SETUP = Setup(
    train_images=256,
    rounds=2,
    dataset="tiny",
    precision="fp32",
    memory_format="contiguous",
)


@pytest.fixture(autouse=True)
def tiny_images(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, split: str, *, root: Path | None) -> Dataset:
        if name != "tiny":
            return load_dataset(name, split, root=root)
        return TRAIN if split == "train" else TEST

    monkeypatch.setattr(rate_accuracy, "load_dataset", load)
    rate_accuracy.load_images.cache_clear()


def bench(
    *,
    widths: tuple[int, ...] = (4,),
    pairs: int = 2,
    seconds: float = 0.01,
    seeds: int = 0,
    append: Path | None = None,
    **changes: Any,
) -> list[dict[str, Any]]:
    return run_bench(
        widths,
        dataclasses.replace(SETUP, **changes),
        pairs=pairs,
        seconds=seconds,
        seeds=seeds,
        data_root=None,
        append=append,
        quiet=True,
    )


def accuracies(**changes: Any) -> list[float]:
    measured = Bench(4, dataclasses.replace(SETUP, **changes), TRAIN, TEST)
    return [measured.accuracy(way, seed=3) for way in WAYS]


def test_every_way_is_measured_and_its_row_kept(tmp_path: Path) -> None:
    file = tmp_path / "benchmarks.md"
    file.write_text("| a table |\n")
    rows = bench(append=file, seeds=1)
    assert [(row["way"], row["together"]) for row in rows] == [
        ("in turn", 1),
        ("equal cuts", 2),
        ("cascade", 4),
    ]
    for row in rows:
        assert row["samples_per_s"] > 0
        assert row["ratio"] > 0
        assert 0 <= row["accuracy"] <= 1
        assert row["half_interval"] is None, "of one seed there is none"
    assert rows[0]["ratio"] == 1
    first, *lines = file.read_text().splitlines()
    assert first == "| a table |"
    assert len(lines) == len(WAYS)
    assert len({line.count("|") for line in lines}) == 1
    assert all(" cpu fp32 contiguous " in line for line in lines)


def test_without_seeds_only_the_speed_is_measured() -> None:
    assert [row["accuracy"] for row in bench()] == [None] * 3


def test_training_is_the_same_every_time_and_learns_something() -> None:
    first = accuracies(rounds=4)
    assert accuracies(rounds=4) == first
    assert min(first) > 0.5, "chance is 0.25"


def test_ways_meet_the_same_weights_and_batches() -> None:
    """One device, and one batch in a step: nothing is left that could differ."""
    assert len(set(accuracies(cuts=(3,)))) == 1
    in_turn, _, cascade = accuracies(together=1)
    assert cascade == in_turn
    in_turn, equal, _ = accuracies(cuts=(2, 3, 4, 5))
    assert equal == in_turn


def test_rows_are_medians_of_paired_ratios_and_means_of_paired_differences() -> None:
    speeds = {"in turn": [100.0, 50.0, 80.0], "equal cuts": [110.0, 60.0, 88.0]}
    scores = {"in turn": [0.5, 0.6], "equal cuts": [0.51, 0.63]}
    rows = make_rows(
        Bench(4, SETUP, TRAIN, TEST),
        speeds | {"cascade": [200.0, 90.0, 160.0]},
        scores | {"cascade": [0.5, 0.6]},
    )
    assert [row["samples_per_s"] for row in rows] == [80, 88, 160]
    assert [row["ratio"] for row in rows] == pytest.approx([1, 1.1, 2])
    assert [row["accuracy"] for row in rows] == pytest.approx([0.55, 0.57, 0.55])
    assert rows[1]["difference"] == pytest.approx(2)
    assert rows[1]["half_interval"] == pytest.approx(12.706)
    assert (rows[0]["difference"], rows[2]["difference"]) == (None, pytest.approx(0))


@pytest.mark.parametrize(
    "changes",
    [
        {"widths": ()},
        {"widths": (16, 0)},
        {"pairs": 0},
        {"seconds": 0.0},
        {"seeds": -1},
        {"together": 0},
        {"rounds": 0},
        {"train_images": 127},
    ],
)
def test_settings_that_cannot_be_measured_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(SettingsWrong):
        bench(**changes)


def test_an_unknown_name_is_refused_with_those_allowed() -> None:
    with pytest.raises(SettingsWrong, match=r"cubic.*linear, sqrt, none, momentum"):
        bench(rate_rule="cubic")
    with pytest.raises(SettingsWrong, match=r"fp99.*auto, fp32, bf16"):
        bench(precision="fp99")


def test_too_few_images_and_a_full_disk_are_told() -> None:
    with pytest.raises(DataError, match="train-images"):
        bench(train_images=100_000)
    with pytest.raises(DiskTrouble):
        bench(append=Path("/nowhere/benchmarks.md"))
