"""What BatchNorm statistics of its own for each cut could bring, on the checkpoint of a run.

Running statistics have no part in training: there every batch is normalised by its own. So what a
network with statistics for each cut would answer can be had afterwards from any checkpoint: those
of the blocks behind a cut are estimated anew from training images that enter there, through the
codec, and the test images are answered with them. Beside it stand the statistics as they were
trained and averaged, and those estimated anew for all cuts together.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.nn.modules.batchnorm import _BatchNorm

from coordinator.aggregation import block_of
from coordinator.evaluation import Evaluator
from coordinator.settings import CoordinatorSettings
from coordinator.store import Store
from ops import bench_rows
from ops.errors import SettingsWrong
from ops.experiments.images import balanced
from tensors.batches import normalise
from tensors.codecs import parse_codec
from tensors.datasets import Dataset, load_dataset
from tensors.decoding import decode_torch
from tensors.networks import CutNetwork, NetworkSpec, State, build_network, read_state, write_state
from tensors.training import Compute

BATCH = 100
HEADER = ("date", "commit", "run", "cut", "as trained", "estimated anew", "for each cut")


@dataclass(frozen=True, slots=True)
class Row:
    """Accuracies (0 to 1) of the full network entered at ``cut``."""

    cut: int
    trained: float
    estimated: float
    by_cut: float


def compare(
    spec: NetworkSpec,
    state: State,
    train: Dataset,
    test: Dataset,
    *,
    cuts: Sequence[int],
    codec: str,
    compute: Compute,
) -> list[Row]:
    """Accuracy at each cut with the three kinds of statistics; estimated on all of ``train``."""
    network = build_network(spec)
    compute.place(network)
    evaluator = Evaluator(build_network(spec), compute, test)

    def accuracy(cut: int, other: State | None = None) -> float:
        if other is not None:
            behind = {n: v for n, v in other.items() if (block_of(n) or 0) >= cut}
            other = state | behind
        return evaluator.cut_scores(other or state, cut, codec, "entropy").server_accuracy

    together = estimate(network, state, train, cuts, codec, compute)
    return [
        Row(
            cut,
            accuracy(cut),
            accuracy(cut, together),
            accuracy(cut, estimate(network, state, train, [cut], codec, compute)),
        )
        for cut in cuts
    ]


def estimate(
    network: CutNetwork,
    state: State,
    images: Dataset,
    cuts: Sequence[int],
    codec: str,
    compute: Compute,
) -> State:
    """``state`` with new statistics behind the first of ``cuts``.

    They are the means over batches of what enters at each of the cuts through ``codec``, a batch of
    one cut at a time. Blocks before a cut compute as a device does that answers.
    """
    write_state(network, state)
    before = copy.deepcopy(network).eval()
    network.eval()
    for index in range(min(cuts), network.stop):
        for module in network.blocks[str(index)].modules():
            if isinstance(module, _BatchNorm):
                module.reset_running_stats()
                module.momentum = None  # the mean of all batches
                module.train()
    for start in range(0, len(images.labels), BATCH):
        pixels = images.images[start : start + BATCH]
        x = compute.tensor(normalise(pixels, images.mean, images.std))
        for cut in cuts:
            with torch.no_grad(), compute.arithmetic():
                features = before(x, stop=cut)
                sent = parse_codec(codec).encode(features.float().cpu(), seed=start)
                network(compute.tensor(decode_torch(sent)), start=cut)
    return read_state(network)


def run_bench(
    state_dir: Path,
    *,
    dataset: str | None,
    data_root: Path | None,
    images: int,
    append: Path | None,
    quiet: bool,
) -> list[dict[str, Any]]:
    """Compare on the last checkpoint of the run in ``state_dir``; rows as dictionaries.

    Raises:
        SettingsWrong: there is no run, no device has a cut, or the network has no BatchNorm.
    """
    if not state_dir.is_dir():
        raise SettingsWrong(f"--state-dir {state_dir}: no run there; give a coordinator's folder")
    store = Store(state_dir)
    current = store.current()
    checkpoint = store.latest() if current else None
    if current is None or checkpoint is None:
        raise SettingsWrong(f"--state-dir {state_dir}: no run there; give a coordinator's folder")
    settings = CoordinatorSettings.model_validate(current[1])
    cuts = sorted({entry["cut"] for entry in checkpoint.registry if entry["cut"] is not None})
    if not cuts or settings.network.norm != "batch":
        raise SettingsWrong(f"--state-dir {state_dir}: a run with devices and norm = batch, please")
    name = dataset or settings.dataset
    if name is None:
        raise SettingsWrong("the run names no data set: give --dataset")
    train = load_dataset(name, "train", root=data_root)
    if images < len(train.labels):
        chosen = balanced(train.labels, images, "--images")
        train = replace(train, images=train.images[chosen], labels=train.labels[chosen])
    rows = compare(
        NetworkSpec(**settings.network.model_dump()),
        checkpoint.model.state,
        train,
        load_dataset(name, "test", root=data_root),
        cuts=cuts,
        codec=settings.codec,
        compute=Compute(),
    )
    cells = [
        [
            *(bench_rows.today(), bench_rows.commit(), current[0], str(row.cut)),
            *(f"{100 * share:.2f} %" for share in (row.trained, row.estimated, row.by_cut)),
        ]
        for row in rows
    ]
    title = "full network entered at a cut, by its BatchNorm statistics"
    bench_rows.show(title, HEADER, cells, Console(stderr=True, quiet=quiet))
    if append is not None:
        bench_rows.append(append, cells)
    return [asdict(row) for row in rows]
