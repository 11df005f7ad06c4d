"""``splitfleet simulate`` and ``splitfleet bench pipelining``."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from ops.bench_pipelining import run_bench, utilisation
from ops.cli import app
from ops.errors import SettingsWrong
from ops.simulate import Plan, parse_learning, show, simulate

SETTINGS = {"rounds": 2, "batches_per_round": 3}


def test_a_summary_says_what_happened() -> None:
    result = simulate(Plan(12, "home", 1, "stub", SETTINGS))
    assert result["rounds"]["closed"] == 2
    assert result["problems"] == []
    batches = result["batches"]
    assert batches["produced"] == batches["applied"] + batches["expired"] > 0
    assert sum(cut["applied"] for cut in result["by_cut"].values()) == batches["applied"]
    assert 0 < result["utilisation"]["devices"] <= 1
    assert result["bytes"]["up"]["activations"] > result["bytes"]["up"]["control"]


def test_people_get_a_table() -> None:
    text = io.StringIO()
    result = simulate(Plan(6, "lan", 1, "stub", SETTINGS))
    show(result, Console(file=text, width=120))
    for wanted in ("2 closed", "utilisation of devices", "by cut layer", result["model_sha256"]):
        assert wanted in text.getvalue()


def test_real_learning_learns() -> None:
    settings = {**SETTINGS, "rounds": 1, "min_devices": 2}
    result = simulate(Plan(2, "lan", 1, "real", settings))
    assert result["rounds"]["closed"] == 1
    assert result["problems"] == []


def test_the_command_prints_json() -> None:
    arguments = ["simulate", "--devices", "4", "--profile", "lan", "--rounds", "1", "--json"]
    settings = ["--set", "batches_per_round=2", "--set", "min_devices=4"]
    done = CliRunner().invoke(app, [*arguments, *settings])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert (result["devices"], result["batches"]["applied"]) == (4, 8)


@pytest.mark.parametrize(
    "settings",
    [
        {"state_dir": "x"},
        {"dataset": "x"},
        {"codec": "int9"},
        {"seed": 3},
        {"stay": True},
        {"min_devices": 3},
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingsWrong, match=next(iter(settings))):
        simulate(Plan(2, "lan", 1, "stub", settings))


def test_learning_is_stub_or_real() -> None:
    with pytest.raises(SettingsWrong, match="stub or real"):
        parse_learning("deep")


def test_more_batches_under_way_keep_a_device_busy() -> None:
    shares = [utilisation(window, batches=60)["utilisation"] for window in (1, 2, 4, 8)]
    assert shares == sorted(shares)
    assert shares[0] == pytest.approx(40 / 145, abs=0.01), "a step, then it waits for its answer"
    assert shares[2] >= 0.9


def test_rows_are_appended(tmp_path: Path) -> None:
    file = tmp_path / "rows.md"
    rows = run_bench([1, 4], batches=20, append=file, quiet=True)
    assert [line.count("|") for line in file.read_text().splitlines()] == [len(rows[0]) + 1] * 2
