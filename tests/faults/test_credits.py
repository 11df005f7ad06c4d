"""Whatever the size of a fleet, what its devices may have out fits the broker's queue."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.rounds import FILL
from ops.simulator import Device, DeviceCost, LinkProfile, ServerCost, SimulatedFleet
from tests.faults.trial import SEED
from tests.tiny import make_settings

DEVICES = 300
CONTROL = 2
"""Messages of a device beside its batches that can wait with them: a join, a status."""


@pytest.mark.parametrize(("queue", "takes_part"), [(1000, 300), (400, 300), (200, 160)])
def test_three_hundred_devices_and_a_slow_server(
    tmp_path: Path, queue: int, takes_part: int
) -> None:
    """Its queue fills up, and nothing is dropped."""
    fleet = SimulatedFleet(
        make_settings(
            state_dir=tmp_path,
            min_devices=DEVICES,
            max_devices=DEVICES,
            rounds=2,
            batches_per_round=4,
            window=8,
            queue_chunks=queue,
            round_deadline_s=600.0,
            gradient_timeout_s=300.0,
        ),
        [
            Device(
                f"d{i}",
                cut=2 + i % 4,
                link=LinkProfile(1e6, 1e6, latency_s=0.02),
                cost=DeviceCost(0.001, 0.002),
                start_s=0.01 * i,
            )
            for i in range(DEVICES)
        ],
        seed=SEED,
        server=ServerCost(step_s=0.02),
    )
    fleet.run(limit_s=1200)
    fleet.books().check()
    assert fleet.broker.dropped == 0
    history = fleet.checkpoint().history
    assert [len(record["devices"]) for record in history] == [takes_part] * 2
    credits_each = max(1, min(8, int(FILL * queue / takes_part)))
    out = takes_part * credits_each
    assert out <= FILL * queue
    assert fleet.broker.most_queued <= out + CONTROL * DEVICES
    assert fleet.books().totals()["applied"] == 2 * 4 * takes_part
