"""``splitfleet plan`` as a person uses it."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from coordinator.settings import CoordinatorSettings
from ops.cli import app
from ops.errors import SettingsWrong
from ops.planning import PlanSettings, make_plan, skew_of
from ops.planning.show import toml
from ops.planning.skew import read_counts
from ops.simulator.profile import bundled
from tensors.partition import partition


def plan(profile: str, **asked: Any) -> dict[str, Any]:
    return make_plan(PlanSettings(profile=profile, **asked))


def server_of(tmp_path: Path, text: str) -> str:
    path = tmp_path / "profile.toml"
    path.write_text(f"[[group]]\nname = 'camera'\n[server]\n{text}\n")
    return str(path)


@pytest.mark.parametrize("profile", bundled())
def test_the_settings_can_be_pasted(profile: str) -> None:
    made = plan(profile, devices=8, settings={"window": "3"})
    read = tomllib.loads(toml(made))
    settings = CoordinatorSettings(**read["coordinator"])
    assert settings.window == 3
    assert settings.strategy == made["advice"]["strategy"]


def test_the_command_prints_json_and_tables() -> None:
    arguments = ["plan", "cellular", "--devices", "6", "--cuts", "2-5"]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    made = json.loads(done.stdout)
    assert len(made["cuts"]) == 6
    assert all(2 <= cut <= 5 for cut in made["cuts"].values())
    assert sum(entry["devices"] for entry in made["classes"]) == 6
    text = CliRunner().invoke(app, [*arguments, "--check"]).output
    for wanted in ("LTE-M", "bottleneck", "predicted", "simulated", "advice", "[coordinator]"):
        assert wanted in text


def test_what_is_planned_is_no_slower_than_the_profile_s_own_cuts() -> None:
    compared = {entry["how"]: entry["round_s"] for entry in plan("mixed", devices=12)["compared"]}
    assert compared["planned by class"] <= 1.05 * compared["as in the profile"]
    assert compared["planned by device"] <= 1.05 * compared["planned by class"]


def test_a_server_with_little_memory_gets_one_network(tmp_path: Path) -> None:
    made = plan(server_of(tmp_path, "memory_mb = 12"), devices=30, limits={"last_cut": 2})
    assert made["server"]["memory_mb_by_strategy"]["averaging"] > 12
    assert made["advice"]["strategy"] == "sequential"
    assert "12" in made["advice"]["reasons"][0]


def test_a_busy_server_is_the_bottleneck(tmp_path: Path) -> None:
    made = plan(server_of(tmp_path, "step_s = 0.5"), devices=10)
    assert made["bottleneck"].startswith("server")


def test_who_asks_for_a_strategy_keeps_it() -> None:
    made = plan("cellular", devices=10, settings={"strategy": "sequential"})
    assert (made["settings"]["strategy"], made["settings"]["aggregation"]) == (
        "sequential",
        "rounds",
    )


@pytest.mark.parametrize(
    ("how", "level"),
    [("iid", "even"), ("dirichlet:0.5", "noticeable"), ("dirichlet:0.1", "strong")],
)
@pytest.mark.parametrize(("devices", "classes"), [(12, 10), (100, 10), (100, 100)])
def test_skew_of_known_partitions(how: str, level: str, devices: int, classes: int) -> None:
    labels = np.arange(20_000) % classes
    parts = partition(labels, devices, how, seed=1)
    counts = [np.bincount(labels[rows], minlength=classes) for rows in parts]
    assert skew_of(np.array(counts, np.float64)).level == level


def test_one_label_each_is_as_far_as_can_be() -> None:
    assert skew_of(np.eye(10) * 1000).distance == pytest.approx(0.9)


def test_uneven_labels_are_warned_of(tmp_path: Path) -> None:
    path = tmp_path / "labels.json"
    path.write_text(json.dumps({"a": {"cat": 100}, "b": {"dog": 100}, "c": {"bird": 50}}))
    made = plan("lan", devices=3, labels=path)
    assert made["skew"]["level"] == "strong"
    assert any("unevenly" in warning for warning in made["warnings"])
    assert made["advice"]["strategy"] == "sequential"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("[]", "write"),
        ("{", "cannot be read as JSON"),
        ('{"a": 3}', "a = 3: give images by label"),
        ('{"a": {"cat": -1}}', "a.cat = -1"),
        ('{"a": [0, 0]}', "a has no images"),
    ],
)
def test_label_files_that_cannot_be(tmp_path: Path, text: str, wanted: str) -> None:
    path = tmp_path / "labels.json"
    path.write_text(text)
    with pytest.raises(SettingsWrong, match=wanted):
        read_counts(path)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["nowhere"], "there is no profile"),
        (["lan", "--cuts", "5-2"], "--cuts 5-2"),
        (["lan", "--by", "group"], "--by group"),
        (["lan", "--rounds-per-day", "0"], "--rounds-per-day 0"),
        (["lan", "--set", "network=x"], "--width"),
        (["lan", "--set", "memory_budget_mb=1"], "no allowed cut fits 20 of 20"),
        (["lan", "--set", "speed=1"], "speed"),
    ],
)
def test_what_cannot_be_planned(arguments: list[str], wanted: str) -> None:
    done = CliRunner().invoke(app, ["plan", *arguments])
    assert isinstance(done.exception, Exception)
    assert wanted in str(done.exception)
