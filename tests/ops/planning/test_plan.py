"""``splitfleet plan`` as a person uses it."""

from __future__ import annotations

import io
import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from broker.errors import ConfigError
from coordinator.settings import CoordinatorSettings
from ops.cli import app
from ops.errors import SettingsWrong
from ops.planning import PlanSettings, make_plan, skew_of
from ops.planning.show import show, toml
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


@pytest.mark.parametrize("settings", [{}, {"strategy": "averaging"}])
def test_a_server_with_no_memory_to_speak_of(tmp_path: Path, settings: dict[str, Any]) -> None:
    made = plan(server_of(tmp_path, "memory_mb = 0.001"), devices=3, settings=settings)
    strategy = settings.get("strategy", "sequential")
    (warning,) = (text for text in made["warnings"] if "no strategy fits" in text)
    assert f"has 0.001 MiB, {strategy} takes " in warning
    assert "which is too much as well" in made["advice"]["reasons"][0]


def test_a_strategy_that_does_not_fit_is_warned_of(tmp_path: Path) -> None:
    profile = server_of(tmp_path, "memory_mb = 30")
    asked = {"devices": 30, "limits": {"last_cut": 2}}
    wanted = "only sequential and cascade would fit"
    advised = plan(profile, **asked)
    assert advised["advice"]["strategy"] == "sequential"
    assert not any(wanted in warning for warning in advised["warnings"])
    kept = plan(profile, **asked, settings={"strategy": "averaging"})
    assert any(wanted in warning for warning in kept["warnings"])


@pytest.mark.parametrize("loss", [0.5, 0.7, 0.9])
def test_links_that_lose_most_packets(tmp_path: Path, loss: float) -> None:
    path = tmp_path / "profile.toml"
    path.write_text(f"[[group]]\nloss = {loss}\n")
    made = plan(str(path), devices=3)
    assert json.dumps(made, allow_nan=False)
    assert made["slowest_s"] > 10
    assert (made["round_s"] is None) == (loss == 0.9)
    assert any("3 of 3 devices lose at least 5 %" in warning for warning in made["warnings"])


def test_a_check_of_rounds_that_never_close() -> None:
    made = plan("lan", devices=2, settings={"round_deadline_s": "0.1"}, check=True, check_rounds=1)
    assert set(made["check"].values()) == {None}
    console = Console(width=200, record=True, file=io.StringIO())
    show(made, console)
    assert "none closes" in console.export_text()


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
        ('{"a": {"cat": 1' + 400 * "0" + "}}", r"a.cat = 10+\.\.\.0+: .* from 0 to 1e\+12"),
        ('{"a": {"cat": 1e308, "dog": 1e308}}', r"a.cat = 1e\+308"),
        ('{"a": {"cat": NaN}}', r"a.cat = nan"),
        ('{"a": {"cat": 1' + 5000 * "0" + "}}", "cannot be read as JSON .*digits"),
        (99_999 * "[" + 99_999 * "]", "nested too deeply"),
        (
            '{"a": {"cat": ' + 500 * "[" + 500 * "]" + "}}",
            r"a.cat = \[\[.*\.\.\..*must be a number",
        ),
    ],
)
def test_label_files_that_cannot_be(tmp_path: Path, text: str, wanted: str) -> None:
    path = tmp_path / "labels.json"
    path.write_text(text)
    with pytest.raises(SettingsWrong, match=wanted) as caught:
        read_counts(path)
    assert len(str(caught.value).removeprefix(f"--labels {path}")) < 300


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["nowhere"], "there is no profile"),
        (["lan", "--cuts", "5-2"], "--cuts 5-2"),
        (["lan", "--by", "group"], "--by group"),
        (["lan", "--rounds-per-day", "0"], "--rounds-per-day 0"),
        (["lan", "--rounds-per-day", "nan"], "--rounds-per-day nan: it must be above 0"),
        (["lan", "--rounds-per-day", "inf"], "--rounds-per-day inf: it must be above 0"),
        (["lan", "--rounds-per-day", "1e9"], "--rounds-per-day 1e+09: it must be above 0 and at"),
        (["lan", "--set", "network=x"], "--width"),
        (["lan", "--set", "memory_budget_mb=1"], "no allowed cut fits 20 of 20"),
        (["lan", "--set", "speed=1"], "speed"),
    ],
)
def test_what_cannot_be_planned(arguments: list[str], wanted: str) -> None:
    done = CliRunner().invoke(app, ["plan", *arguments])
    assert isinstance(done.exception, (SettingsWrong, ConfigError))
    assert wanted in str(done.exception)
