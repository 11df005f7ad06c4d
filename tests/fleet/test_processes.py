"""Whole systems: coordinator and agents as processes on a real Mosquitto, killed on the way.

What every run has to come to is in ``check_books``; more faults are in ``test_fault_processes``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fleet_processes import QUOTA, Fleet, check_books
from tests.mosquitto_process import Mosquitto


@pytest.mark.timeout(1000)
def test_killed_agent_and_coordinator_come_back_and_the_books_balance(
    mosquitto: Mosquitto, tmp_path: Path
) -> None:
    with Fleet(tmp_path, mosquitto.url, cuts=(1, 3, 5), coordinator={"inference": True}) as fleet:
        fleet.start()
        fleet.reach(1)
        fleet.kill("device-1")
        fleet.start_agent(1)
        fleet.reach(2)
        fleet.kill("coordinator")
        fleet.start_coordinator()
        fleet.finish()
        history = check_books(fleet)
        devices = fleet.result()["devices"]
    assert [record["attempt"] for record in history] == [0, 1, 0], "round 2 was tried again"
    for record in history:
        assert sorted(record["devices"]) == fleet.names
        assert all(d["account"]["applied"] == QUOTA for d in record["devices"].values())
    assert all(device["inference"]["images"] > 0 for device in devices)
