"""What one liar among five does to a fleet, and what of it each defence takes back.

Fifteen devices at three cuts, five each, train the bundled Fashion-MNIST subset in the simulator,
with the coordinator and the agents of production; one device of each cut attacks.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from broker.messages import Network
from coordinator.evaluation import Evaluator
from coordinator.settings import CoordinatorSettings
from edge_agent.data import DeviceData
from ops import bench_rows
from ops.errors import SettingsWrong
from ops.simulator.fleet import SimulatedFleet
from ops.simulator.hostile import ATTACKS, Attack, with_wrong_labels
from ops.simulator.programs import Device
from tensors.datasets import Dataset, load_dataset
from tensors.networks import NetworkSpec, build_network
from tensors.partition import partition
from tensors.training import Compute

CUTS = (2, 4, 6)
OF_EACH = 5
NONE = "none"
DEFENCES: Mapping[str, Mapping[str, object]] = {
    NONE: {},
    "clip": {"upload_clip": 2.0},
    "trimmed-mean": {"aggregation_rule": "trimmed-mean"},
    "median": {"aggregation_rule": "median"},
    "batches": {"loss_mads": 6.0, "gradient_clip": 3.0},
    "all": {
        "aggregation_rule": "trimmed-mean",
        "upload_clip": 2.0,
        "loss_mads": 6.0,
        "gradient_clip": 3.0,
    },
}
"""Settings of the coordinator."""
HEADER = ("date", "commit", "partition", "attack", "defence", "full network", "exits", "refused")


@dataclass(frozen=True, slots=True)
class Row:
    """Accuracies (0 to 1) on the test images, of exits the mean over the cuts.

    ``refused`` is the share of the attackers' batches that was not trained on, and ``honest`` that
    of the others'.
    """

    attack: str
    defence: str
    full: float
    exits: float
    refused: float
    honest: float


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is trained; ``how`` splits the images as ``tensors.partition`` does."""

    rounds: int = 10
    batches: int = 12
    width: int = 8
    how: str = "iid"
    strategy: str = "averaging"
    seed: int = 0


def train(
    attack: Attack | None, defence: Mapping[str, object], scale: Scale, folder: Path
) -> tuple[SimulatedFleet, list[str]]:
    """A fleet that has trained, and the names of its attackers."""
    images = load_dataset("fashion-mnist-small", "train")
    count = len(CUTS) * OF_EACH
    shares = partition(images.labels, count, scale.how, scale.seed)
    devices = []
    for number, rows in enumerate(shares):
        cut, place = CUTS[number // OF_EACH], number % OF_EACH
        data = DeviceData(images, rows, None, rows[:0])
        hostile = attack if place == 0 else None
        if hostile == "labels":
            data = with_wrong_labels(data)
        devices.append(Device(f"d{number:02d}", cut=cut, data=data, attack=hostile))
    settings = CoordinatorSettings.model_validate(
        {
            "state_dir": folder,
            "network": Network(width=scale.width, channels=1, size=28, classes=10),
            "strategy": scale.strategy,
            "rounds": scale.rounds,
            "batches_per_round": scale.batches,
            "min_devices": count,
            "inference": False,
            "seed": scale.seed,
            "device": "cpu",
            "precision": "fp32",
            "memory_format": "contiguous",
            **defence,
        }
    )
    fleet = SimulatedFleet(settings, devices, seed=scale.seed, learning="real", by_reference=True)
    fleet.run()
    return fleet, [device.name for device in devices if device.attack is not None]


def judge(attack: Attack | None, defence: str, scale: Scale, test: Dataset, folder: Path) -> Row:
    """Train a fleet in ``folder`` and test what it came to."""
    fleet, attackers = train(attack, DEFENCES[defence], scale, folder)
    checkpoint = fleet.checkpoint()
    spec = NetworkSpec(**fleet.settings.network.model_dump())
    scores = Evaluator(build_network(spec), Compute(), test).scores(checkpoint.model.state, CUTS)
    made = {True: 0, False: 0}
    refused = {True: 0, False: 0}
    for record in checkpoint.history:
        for name, entry in record["devices"].items():
            account = entry["account"]
            made[name in attackers] += account["produced"]
            refused[name in attackers] += sum(account["discarded"].values())
    return Row(
        attack or NONE,
        defence,
        scores.server_accuracy,
        statistics.fmean(scores.exit_accuracy.values()),
        refused[True] / max(1, made[True]),
        refused[False] / max(1, made[False]),
    )


def run_bench(
    attacks: Sequence[str],
    defences: Sequence[str],
    scale: Scale,
    *,
    append: Path | None,
    quiet: bool,
) -> list[dict[str, Any]]:
    """A fleet for each attack and defence; rows as dictionaries.

    Raises ``SettingsWrong`` for an attack or defence that is none.
    """
    named: dict[str, Attack | None] = {NONE: None, **{attack: attack for attack in ATTACKS}}
    for flag, names, known in (
        ("--attacks", attacks, tuple(named)),
        ("--defences", defences, tuple(DEFENCES)),
    ):
        if odd := [name for name in names if name not in known]:
            raise SettingsWrong(f"{flag} {odd[0]}: choose among {', '.join(known)}")
    torch.set_num_threads(1)
    console = Console(stderr=True, quiet=quiet)
    test = load_dataset("fashion-mnist-small", "test")
    rows = []
    for attack in attacks:
        for defence in defences:
            with tempfile.TemporaryDirectory() as folder:
                row = judge(named[attack], defence, scale, test, Path(folder))
            console.print(f"{attack}, {defence}: {100 * row.full:.1f} %", highlight=False)
            rows.append(row)
    cells = [
        [
            *(bench_rows.today(), bench_rows.commit(), scale.how, row.attack, row.defence),
            *(f"{100 * share:.1f} %" for share in (row.full, row.exits, row.refused)),
        ]
        for row in rows
    ]
    bench_rows.show("one attacker among five at every cut", HEADER, cells, console)
    if append is not None:
        bench_rows.append(append, cells)
    return [asdict(row) for row in rows]
