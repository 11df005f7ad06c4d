"""What a file may say, and what it is told when it says something else."""

from __future__ import annotations

from pathlib import Path

import pytest

from ops.errors import SettingsWrong
from ops.experiments.spec import FILES, read_experiment, rehearsal, trainings
from tensors.errors import DataError

GOOD = """
name = "try"
seeds = [3, 4]
reference = "a"
[data]
dataset = "fashion-mnist-small"
train_images = 100
[fleet]
cuts = [2, 3]
[training]
rounds = 2
device = "cpu"
precision = "fp32"
memory_format = "contiguous"
network = { width = 4 }
[[arms]]
name = "a"
[[arms]]
name = "b"
cuts = [5]
partition = "dirichlet:0.5"
training = { strategy = "sequential", network = { head = "linear" } }
"""


def write(folder: Path, text: str) -> str:
    path = folder / "experiment.toml"
    path.write_text(text)
    return str(path)


def test_an_arm_is_what_all_have_in_common_and_what_it_does_otherwise(tmp_path: Path) -> None:
    experiment = read_experiment(write(tmp_path, GOOD))
    made = trainings(experiment, data_root=None)
    assert [(t.arm, t.seed) for t in made] == [("a", 3), ("b", 3), ("a", 4), ("b", 4)]
    first, second = made[:2]
    assert (first.cuts, second.cuts) == ((2, 3), (5,))
    assert (first.partition, second.partition) == ("iid", "dirichlet:0.5")
    assert second.settings.strategy == "sequential"
    assert second.settings.network.head == "linear"
    assert second.settings.network.width == first.settings.network.width == 4
    assert (first.settings.network.channels, first.settings.network.size) == (1, 28)
    assert [training.settings.min_devices for training in (first, second)] == [2, 1]
    assert first.settings.rounds == second.settings.rounds == 2


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('reference = "a"', 'reference = "c"', "none of the arms a, b"),
        (
            'name = "b"',
            'name = "b"\nagainst = "c"',
            "arm b: against = 'c' is none of the arms a, b",
        ),
        ('name = "b"', 'name = "a"', "two arms are called 'a'"),
        ("seeds = [3, 4]", "seeds = []", "seeds"),
        ("seeds = [3, 4]", "seeds = [-1]", "seeds.0"),
        ("seeds = [3, 4]", "seeds = [3, 3]", "a seed is there twice"),
        ('network = { head = "linear" }', "network = 5", "network is a table"),
        ("{ width = 4 }", "{ width = 4, nrom = 1 }", "nrom is not a setting of the network"),
        ('name = "b"', 'name = ".."', "name = '..'"),
        ("rounds = 2", "rounds = 0", "arm a: rounds = 0"),
        ("rounds = 2", "ruonds = 2", "arm a: ruonds is not a setting"),
        ("rounds = 2", "rounds = 2\nseed = 1", "training.seed cannot be set"),
        ("{ width = 4 }", "{ width = 4, size = 32 }", "network.size cannot be set"),
        ('precision = "fp32"', "", "training.precision must be set"),
        ("cuts = [5]", "cuts = [12]", "arm b: cut layer 12"),
        ("cuts = [5]", "cuts = []", "cuts"),
        ('"dirichlet:0.5"', '"dirichlet:0"', "arm b: partition 'dirichlet:0'"),
        ('strategy = "sequential"', 'strategy = "best"', "arm b: strategy = 'best'"),
        (
            'name = "a"\n',
            'name = "a"\nkind = "distributed"\ntraining = { exit_weight = 2 }\n',
            "arm a: a distributed arm does not know training.exit_weight",
        ),
        ("[fleet]", "[flet]", "flet is not a setting"),
        ('name = "try"', "", "name is missing"),
        ('name = "try"', 'name = "../x"', "name = '../x'"),
        ("[data]", "[data", "not valid TOML"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(
    tmp_path: Path, old: str, new: str, words: str
) -> None:
    assert old in GOOD
    with pytest.raises(SettingsWrong, match=words.replace("[", r"\[")):
        trainings(read_experiment(write(tmp_path, GOOD.replace(old, new))), data_root=None)


def test_images_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="train_images"):
        trainings(
            read_experiment(write(tmp_path, GOOD.replace("= 100", "= 1_000_000"))), data_root=None
        )
    with pytest.raises(SettingsWrong, match="give a TOML file or one of"):
        read_experiment("nothing-of-this-name")


@pytest.mark.parametrize("path", sorted(FILES.glob("*.toml")), ids=lambda path: path.stem)
def test_bundled_experiments_can_be_read(path: Path) -> None:
    experiment = read_experiment(path.stem)
    assert experiment.name == path.stem
    assert len(experiment.arms) <= 12


@pytest.mark.parametrize("path", sorted(FILES.glob("*.toml")), ids=lambda path: path.stem)
def test_a_rehearsal_is_small_and_has_every_arm(path: Path) -> None:
    whole = read_experiment(path.stem)
    small = rehearsal(whole)
    assert [(arm.name, arm.kind, arm.cuts) for arm in small.arms] == [
        (arm.name, arm.kind, arm.cuts) for arm in whole.arms
    ]
    for arm in small.arms:
        training = {**small.training, **arm.training}
        assert (training["rounds"], training["batches_per_round"]) == (2, 2)
        assert training["network"]["width"] == 16
