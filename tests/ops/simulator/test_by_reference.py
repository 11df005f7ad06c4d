"""Messages passed by reference: nothing else is different."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ops.simulator import Device, Fault, LinkProfile, SimulatedFleet
from tensors.batches_torch import TorchImages
from tests.tiny import make_device_data, make_settings


def run_fleet(
    folder: Path, *, by_reference: bool, link: LinkProfile, **settings: Any
) -> SimulatedFleet:
    devices = [
        Device(f"d{cut}", cut=cut, link=link, data=make_device_data(40, seed=cut))
        for cut in (2, 3, 5)
    ]
    fleet = SimulatedFleet(
        make_settings(state_dir=folder, min_devices=len(devices), **settings),
        devices,
        learning="real",
        by_reference=by_reference,
    )
    fleet.run()
    fleet.books().check()
    return fleet


def seen(fleet: SimulatedFleet) -> dict[str, Any]:
    """All that could be different."""
    checkpoint = fleet.checkpoint()
    return {
        "model": fleet.digest(),
        "history": [
            {key: value for key, value in record.items() if key != "seconds"}
            for record in checkpoint.history
        ],
        "traffic": checkpoint.traffic,
        "sent": [process.tally.sent_bytes for process in fleet.processes],
        "received": [process.received_bytes for process in fleet.processes],
        "routed": fleet.broker.routed,
        "queued": fleet.broker.most_queued,
        "now": fleet.world.now,
    }


SLOW = LinkProfile(up_bytes_per_s=5e4, down_bytes_per_s=1e5, latency_s=0.01, jitter_s=0.01)


@pytest.mark.parametrize(
    "settings",
    [
        {"codec": "fp32"},
        {"codec": "fp32", "precision": "bf16"},
        {"codec": "fp32", "gradient_codec": "int4+zstd", "strategy": "sequential"},
        {"codec": "int4+zstd", "gradient_codec": "fp32", "window": 1},
        {"codec": "fp32", "feedback": "none"},
        {"codec": "int8", "strategy": "cascade"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
@pytest.mark.parametrize("link", [LinkProfile(), SLOW], ids=["ideal", "slow"])
def test_a_fleet_learns_and_counts_the_same(
    tmp_path: Path, link: LinkProfile, settings: dict[str, Any]
) -> None:
    sent = run_fleet(tmp_path / "sent", by_reference=False, link=link, **settings)
    passed = run_fleet(tmp_path / "passed", by_reference=True, link=link, **settings)
    assert seen(passed) == seen(sent)


def test_test_images_are_answered_the_same(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"inference": True, "rounds": 1, "threshold": 0.9}
    sent = run_fleet(tmp_path / "sent", by_reference=False, link=SLOW, **settings)
    passed = run_fleet(tmp_path / "passed", by_reference=True, link=SLOW, **settings)
    assert seen(passed) == seen(sent)


def test_batches_made_on_the_compute_device_teach_the_same(tmp_path: Path) -> None:
    digests = []
    for resident in (False, True):
        data = make_device_data(40)
        if resident:
            data = replace(data, resident=TorchImages(data.train, "cpu"))
        settings = make_settings(state_dir=tmp_path / str(resident), augment="crop-flip")
        fleet = SimulatedFleet(
            settings, [Device("d", data=data)], learning="real", by_reference=True
        )
        fleet.run()
        digests.append(fleet.digest())
    assert digests[0] == digests[1]


def test_a_message_without_frames_cannot_be_damaged(tmp_path: Path) -> None:
    fleet = SimulatedFleet(make_settings(state_dir=tmp_path), [Device("d")], by_reference=True)
    with pytest.raises(AssertionError, match="by reference"):
        fleet.faults.add(Fault("flip"))
