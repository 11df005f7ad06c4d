"""``splitfleet bench pipelining``: how busy a device is while its batches are under way.

One device whose step takes 40 ms (15 forward, 25 backward), a server that takes 5 ms for a batch,
100 ms to and fro between them: on virtual time, so every figure is exactly reproducible. What is
measured is the share of a round's training phase in which the device computes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from broker.messages import Network
from coordinator.settings import CoordinatorSettings
from ops import bench_rows
from ops.simulator.charging import DeviceCost, ServerCost
from ops.simulator.fleet import SimulatedFleet
from ops.simulator.link import LinkProfile
from ops.simulator.programs import Device

FORWARD_S, BACKWARD_S, SERVER_S, ROUND_TRIP_S = 0.015, 0.025, 0.005, 0.1
ROUNDS = 3
Row = dict[str, Any]


def utilisation(window: int, *, batches: int) -> Row:
    """One fleet; a round has so many batches."""
    hop = LinkProfile(latency_s=ROUND_TRIP_S / 4)  # device to broker, broker to coordinator
    with tempfile.TemporaryDirectory(prefix="splitfleet-bench-") as folder:
        settings = CoordinatorSettings(
            state_dir=Path(folder),
            network=Network(width=4, channels=1, size=8, head="linear"),
            codec="fp32",
            batch_size=4,
            rounds=ROUNDS,
            batches_per_round=batches,
            window=window,
            inference=False,
        )
        device = Device("device", cut=1, cost=DeviceCost(FORWARD_S, BACKWARD_S), link=hop)
        fleet = SimulatedFleet(
            settings, [device], server=ServerCost(step_s=SERVER_S), coordinator_link=hop
        )
        fleet.run()
        fleet.books().check()
    stretch = fleet.stretches["device"]
    return {
        "date": bench_rows.today(),
        "commit": bench_rows.commit(),
        "window": window,
        "batches": batches,
        "round_s": round(stretch.training_s / ROUNDS, 3),
        "utilisation": round(stretch.busy_s / stretch.training_s, 3),
    }


def run_bench(
    windows: Sequence[int], *, batches: int, append: Path | None, quiet: bool
) -> list[Row]:
    """Every window in turn; the rows, which are printed side by side and appended if wanted."""
    rows = [utilisation(window, batches=batches) for window in windows]
    cells = [[str(value) for value in row.values()] for row in rows]
    title = "share of the training phase in which the device computes"
    bench_rows.show(title, list(rows[0]), cells, Console(stderr=True, quiet=quiet))
    if append is not None:
        bench_rows.append(append, cells)
    return rows
