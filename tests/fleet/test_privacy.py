"""Noise in whole runs: what devices book is what left them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from broker.memory import MemoryBroker
from edge_agent.privacy_account import PrivacyAccount
from tensors.privacy import GaussianMechanism
from tests.fleet_in_process import Fleet, in_memory
from tests.tiny import NETWORK, make_device_data

DEVICES = {"a": 2, "b": 5}
IMAGES, TESTS, BATCH, QUOTA, ROUNDS = 48, 10, 8, 4, 2
NOISE = {"clip_norm": 4.0, "noise_std": 0.5}
RHO = GaussianMechanism(4.0, 0.5).rho


async def run(folder: Path, **agents: Any) -> tuple[dict[str, Any], Fleet]:
    fleet = Fleet(
        folder,
        in_memory(MemoryBroker()),
        DEVICES,
        lambda name: make_device_data(IMAGES, seed=ord(name), tests=TESTS),
        agents,
        network=NETWORK.model_copy(update={"norm": "group"}),
        rounds=ROUNDS,
        batches_per_round=QUOTA,
        inference=True,
        threshold=1.0,
        **NOISE,
    )
    fleet.start()
    return await fleet.finish(), fleet


async def test_every_release_of_a_run_is_booked_once(tmp_path: Path) -> None:
    result, fleet = await run(tmp_path)
    for device in result["devices"]:
        assert device["samples"] == BATCH * QUOTA * ROUNDS
        assert device["inference"]["answered"] == TESTS
        booked = PrivacyAccount(tmp_path / device["device"]).summary()
        assert booked.releases == BATCH * QUOTA * ROUNDS + TESTS
        assert booked.images == IMAGES + TESTS
        assert booked.rho_max == pytest.approx(2 * RHO)
    assert not fleet.watcher.discarded


async def test_a_run_closes_although_budgets_are_used_up(tmp_path: Path) -> None:
    """48 images, one release each: six batches of the eight; test images have their own."""
    result, fleet = await run(tmp_path, **NOISE, privacy_rho=RHO)
    assert result["rounds"] == ROUNDS
    for device in result["devices"]:
        assert device["samples"] == IMAGES
        assert device["inference"]["answered"] == TESTS
        assert PrivacyAccount(tmp_path / device["device"]).summary().rho_max == RHO
    reports = list(fleet.watcher.reports.values())
    assert sum(report.discarded.get("privacy", 0) for report in reports) == 2 * len(DEVICES)
