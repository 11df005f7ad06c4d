"""The main job itself, through the command line, on the embedded broker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

KEYS = {
    "strategy", "feedback", "dataset", "seed", "rounds", "wall_seconds", "samples",
    "samples_per_second", "server_accuracy", "bytes_up", "bytes_down", "bytes_up_per_sample",
    "devices", "exit_sweep",
}  # fmt: skip
DEVICE_KEYS = {
    "device", "cut", "samples", "exit_accuracy", "server_accuracy", "exit_rate", "bytes_up",
    "bytes_down", "rounds",
}  # fmt: skip


def demo(out: Path, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "ops.cli", "demo", "--json", "--out", str(out), *arguments],
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    summary: dict[str, Any] = json.loads(done.stdout)
    assert summary == json.loads((out / "summary.json").read_text())
    return summary


def check_books(state: Path, quota: int) -> None:
    run = (state / "current").read_text()
    result = json.loads((state / run / "result.json").read_text())
    for record in result["history"]:
        for device in record["devices"].values():
            account = device["account"]
            outcomes = account["applied"] + sum(account["discarded"].values()) + account["expired"]
            assert account["produced"] == outcomes == quota


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_main_job_reaches_its_accuracies(tmp_path: Path) -> None:
    out = tmp_path / "run"
    summary = demo(out)
    assert summary.keys() >= KEYS
    assert [device["cut"] for device in summary["devices"]] == [2, 3, 4, 5]
    assert summary["server_accuracy"] >= 0.85
    for device in summary["devices"]:
        assert device.keys() >= DEVICE_KEYS
        assert device["exit_accuracy"] >= 0.70
        assert device["inference"]["images"] == 500
        answers = device["inference"]
        assert answers["exits"] + answers["offloads"] == 500
        assert answers["accuracy"] >= device["exit_accuracy"] - 0.03
    rates = [point["exit_rate"] for point in summary["exit_sweep"]]
    assert rates == sorted(rates, reverse=True), "a higher threshold lets fewer exit"
    assert "<svg" in (out / "report.html").read_text()
    check_books(out / "coordinator", quota=93)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("strategy", "feedback"), [("sequential", "gradient"), ("averaging", "none")]
)
def test_other_ways_to_train_learn_too(tmp_path: Path, strategy: str, feedback: str) -> None:
    out = tmp_path / "run"
    summary = demo(
        out, "--strategy", strategy, "--feedback", feedback, "--cuts", "2,4", "--rounds", "3"
    )
    assert (summary["strategy"], summary["feedback"]) == (strategy, feedback)
    assert summary["server_accuracy"] >= 0.75
    if feedback == "none":
        assert summary["bytes_by_role"].get("down/gradient", 0) == 0
    check_books(out / "coordinator", quota=187)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_with_certificates_a_token_and_all_guards(tmp_path: Path) -> None:
    out = tmp_path / "run"
    small = ("--agents", "3", "--cuts", "2,3,4", "--width", "8")
    summary = demo(out, "--secure", *small, "--rounds", "1")
    names = ["agent-1", "agent-2", "agent-3"]
    assert summary["security"]["enrolled"] == names
    assert summary["security"]["token_uses_left"] == 0
    assert summary["security"]["stranger"].startswith("refused")
    for name in names:
        identity = out / "agents" / name / "identity"
        assert (identity / "device.pem").exists()
        assert not list(identity.glob("claim*"))
        assert (out / "agents" / name / "state" / "privacy.sqlite3").exists()
    check_books(out / "fleet" / "coordinator" / "state", quota=125)

    again = demo(out, "--rounds", "2")
    assert (again["rounds"], again["run"]) == (2, summary["run"])
    assert again["security"]["enrolled"] == names


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ctrl_c_ends_every_process_and_the_run_can_be_resumed(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "ops.cli", "demo", "--out", str(out), "--rounds", "3"]
    process = subprocess.Popen(
        [*command, "--width", "4", "--cuts", "2,4"], stderr=subprocess.PIPE, text=True
    )
    checkpoints = out / "coordinator"
    deadline = time.monotonic() + 600
    while not list(checkpoints.glob("*/checkpoints/000001")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 130
    assert f"splitfleet demo --out {out}" in errors
    assert not children_of(str(out)), "every process has ended"

    summary = demo(out)
    assert summary["rounds"] == 3
    assert [device["cut"] for device in summary["devices"]] == [2, 4]
    check_books(out / "coordinator", quota=187)


def children_of(out: str) -> list[str]:
    """Command lines of other processes that mention the run's folder."""
    listing = subprocess.run(
        ["ps", "-eo", "pid=,args="], capture_output=True, text=True, check=True
    )
    own = str(os.getpid())
    return [
        line
        for line in listing.stdout.splitlines()
        if out in line and line.split()[0] != own and "pytest" not in line
    ]
