"""A backup of a running coordinator brings the fleet back to where it was; docs/operations.md."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.fleet_processes import QUOTA, Fleet
from tests.mosquitto_process import Mosquitto

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1000)]


def test_fleet_goes_on_from_a_backup_that_is_older_than_its_devices(
    mosquitto: Mosquitto, tmp_path: Path
) -> None:
    archive = tmp_path / "backup.tar"
    with Fleet(tmp_path, mosquitto.url, coordinator={"rounds": 4}) as fleet:
        fleet.start()
        fleet.reach(2)
        back_up(fleet.state, archive)
        fleet.reach(4, 1)
        fleet.kill("coordinator")
        fleet.kill("device-1")  # away meanwhile, it holds a version that will not have been
        restore(archive, fleet.state, run := "restored")
        fleet.start_coordinator()
        fleet.start_agent(1)
        fleet.finish()
        result = fleet.result()
    assert result["run"] == run
    history = result["history"]
    assert [(each["round"], each["attempt"]) for each in history[1:]] == [(2, 1), (3, 0), (4, 0)]
    for record in history[1:]:
        for name, device in record["devices"].items():
            assert device["finished"], name
            assert device["account"]["applied"] == device["account"]["produced"] == QUOTA


def back_up(state: Path, archive: Path) -> None:
    """As docs/operations.md has it; 1: an old checkpoint went away meanwhile."""
    command = ["tar", "--exclude", ".writing-*", "-C", str(state), "-cf", str(archive), "."]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode in {0, 1}, done.stderr


def restore(archive: Path, state: Path, run: str) -> None:
    """As docs/operations.md has it."""
    shutil.rmtree(state)
    state.mkdir()
    subprocess.run(["tar", "-C", str(state), "-xf", str(archive)], check=True)
    old = (state / "current").read_text().strip()
    (state / old).rename(state / run)
    (state / "current").write_text(run)
