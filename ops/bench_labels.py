"""What a coordinator learns of the labels that devices keep, from the gradients they send.

Three devices train the bundled Fashion-MNIST subset with ``labels = "device"`` in the simulator,
with the coordinator and the agents of production. Then a round is made once more with the trainer
of the device and the engine of the coordinator, which now also looks at every image's gradient as
it comes out of the codec. The attacks:

*norm* and *cosine* (Li, Sun, Yang, Gao, Zhang, Xie, Smith, Wang 2022, "Label Leakage and Protection
in Two-party Split Learning", arXiv 2102.08504), there for two classes, here for each class against
the rest: by how long a gradient is, and by its cosine to one gradient whose class is known. Leak
AUC, the mean over the classes; 0.5 is a guess.

*cosine, nearest*: the class of the one known gradient of each class that is nearest; its accuracy.

*decoded* (ours): a mean over height and width and a linear layer W give image i the gradient
Wᵀ(p − y)/N, spread over all places, so W's pseudo-inverse gives p − y, whose lowest entry is the
label. The coordinator has W as it was at the start of the round.

*own answers* needs no gradient: the label is what the coordinator's network answers with that W.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from broker.messages import Network
from coordinator.aggregation import Model, half_of
from coordinator.engines import make_engine
from coordinator.settings import CoordinatorSettings
from edge_agent.data import DeviceData
from edge_agent.trainer import DeviceTrainer
from ops import bench_rows
from ops.simulator.fleet import SimulatedFleet
from ops.simulator.programs import Device
from tensors.batches import normalise
from tensors.codecs import parse_codec
from tensors.datasets import Dataset, load_dataset
from tensors.decoding import decode_torch
from tensors.networks import NetworkSpec, build_network
from tensors.partition import partition
from tensors.training import Compute

CUTS = (2, 4, 6)
HEADER = (
    *("date", "commit", "codec of gradients", "rounds"),
    *("norm, AUC", "cosine, AUC", "cosine, nearest", "decoded", "own answers"),
)

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Row:
    """Of the attacks on one round: leak AUCs, and shares of labels that were found."""

    codec: str
    rounds: int
    norm: float
    cosine: float
    nearest: float
    decoded: float
    answers: float


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is trained before the round that is attacked, and how many batches that has."""

    rounds: int = 5
    batches: int = 12
    width: int = 8
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Seen:
    """What a coordinator sees of images: gradients (N, F) and its network's answers; the truth."""

    gradients: Floats
    answers: Labels
    labels: Labels


def settings_of(scale: Scale, folder: Path, gradient_codec: str | None) -> CoordinatorSettings:
    """Of the fleet that is attacked."""
    return CoordinatorSettings(
        state_dir=folder,
        network=Network(width=scale.width, channels=1, size=28, classes=10),
        labels="device",
        gradient_codec=gradient_codec,
        rounds=scale.rounds,
        batches_per_round=scale.batches,
        min_devices=len(CUTS),
        inference=False,
        seed=scale.seed,
        device="cpu",
        precision="fp32",
        memory_format="contiguous",
    )


def train(settings: CoordinatorSettings, images: Dataset, rows: Sequence[NDArray[Any]]) -> Model:
    """What a fleet comes to, device i with the images ``rows[i]``."""
    devices = [
        Device(f"d{cut}", cut=cut, data=DeviceData(images, own, None, own[:0]))
        for cut, own in zip(CUTS, rows, strict=True)
    ]
    fleet = SimulatedFleet(
        settings, devices, seed=settings.seed, learning="real", by_reference=True
    )
    fleet.run()
    return fleet.checkpoint().model


def watch(
    settings: CoordinatorSettings, model: Model, images: Dataset, rows: NDArray[Any], cut: int
) -> Seen:
    """One more round of a device with these images, and what comes of it at the coordinator."""
    network = build_network(NetworkSpec(**settings.network.model_dump()))
    last = network.stop - 1
    engine = make_engine(
        settings.strategy,
        network,
        Compute(),
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        classifier=False,
    )
    engine.begin(model, settings.learning_rate)
    half = build_network(NetworkSpec(**settings.network.model_dump()))
    trainer = DeviceTrainer(
        half.device_half(cut, classifier=True),
        Compute(),
        exit_weight=settings.exit_weight,
        feedback_weight=settings.feedback_weight,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )
    trainer.load(half_of(model.state, cut, classifier=last))
    trainer.set_learning_rate(settings.learning_rate)
    weight, bias = (
        torch.from_numpy(model.state[f"blocks.{last}.fc.{kind}"]) for kind in ("weight", "bias")
    )
    up, down = parse_codec(settings.codec), settings.codec_of_gradients
    gradients, answers, labels = [], [], []
    order = np.random.default_rng(settings.seed).permutation(rows)
    size = settings.batch_size
    for number in range(settings.batches_per_round or 1):
        own = order[number * size : (number + 1) * size]
        truth = images.labels[own]
        features = trainer.forward(
            number, normalise(images.images[own], images.mean, images.std), truth
        )
        sent = decode_torch(up.encode(features))
        found = engine.forward("device", number, cut, sent, want_gradient=True)
        gradient = trainer.classify(number, decode_torch(up.encode(found)), truth)
        seen = decode_torch(down.encode(gradient))
        back = engine.backward("device", number, seen, images=len(own))
        trainer.backward(number, back)
        gradients.append(seen.mean(dim=(2, 3)).double().numpy())
        answers.append((found.mean(dim=(2, 3)) @ weight.T + bias).argmax(1).numpy())
        labels.append(truth)
    return Seen(np.concatenate(gradients), np.concatenate(answers), np.concatenate(labels))


def leak_auc(score: Floats, positive: NDArray[np.bool_]) -> float:
    """The area under the ROC curve, turned to be at least 0.5; ties count half."""
    values, ranks = np.unique(score, return_inverse=True)
    counts = np.bincount(ranks, minlength=len(values))
    middle = (np.cumsum(counts) - (counts - 1) / 2)[ranks]
    ones, zeros = int(positive.sum()), int((~positive).sum())
    area = (middle[positive].sum() - ones * (ones + 1) / 2) / (ones * zeros)
    return float(max(area, 1 - area))


def attack(seen: Seen, weight: NDArray[Any], codec: str, rounds: int) -> Row:
    """All attacks on what was seen; ``weight`` (K, F) is the classifier's, as the attacker has it.

    The first image of every class is the known one, and not counted.
    """
    gradients, labels = seen.gradients, seen.labels
    lengths = np.linalg.norm(gradients, axis=1)
    directions = gradients / np.maximum(lengths, 1e-30)[:, None]
    classes, known = np.unique(labels, return_index=True)
    others = np.setdiff1d(np.arange(len(labels)), known)
    cosines = directions[others] @ directions[known].T
    truth = labels[others]
    decoded = gradients @ np.linalg.pinv(weight.astype(np.float64))
    return Row(
        codec,
        rounds,
        float(np.mean([leak_auc(lengths[others], truth == c) for c in classes])),
        float(np.mean([leak_auc(cosines[:, i], truth == c) for i, c in enumerate(classes)])),
        float((classes[cosines.argmax(1)] == truth).mean()),
        float((decoded.argmin(1) == labels).mean()),
        float((seen.answers == labels).mean()),
    )


def run_bench(
    codecs: Sequence[str], scale: Scale, *, append: Path | None, quiet: bool
) -> list[dict[str, Any]]:
    """A fleet for each codec of gradients; rows as dictionaries. ``default`` is the usual one."""
    torch.set_num_threads(1)
    console = Console(stderr=True, quiet=quiet)
    images = load_dataset("fashion-mnist-small", "train")
    shares = partition(images.labels, len(CUTS), "iid", scale.seed)
    rows = []
    for codec in codecs:
        with tempfile.TemporaryDirectory() as folder:
            settings = settings_of(scale, Path(folder), None if codec == "default" else codec)
            model = train(settings, images, shares)
        seen = watch(settings, model, images, shares[0], CUTS[0])
        weight = model.state["blocks.9.fc.weight"]
        rows.append(attack(seen, weight, settings.codec_of_gradients.name, scale.rounds))
    cells = [
        [
            *(bench_rows.today(), bench_rows.commit(), row.codec, str(row.rounds)),
            *(f"{row.norm:.2f}", f"{row.cosine:.2f}"),
            *(f"{100 * share:.1f} %" for share in (row.nearest, row.decoded, row.answers)),
        ]
        for row in rows
    ]
    bench_rows.show("labels from the gradients of last features", HEADER, cells, console)
    if append is not None:
        bench_rows.append(append, cells)
    return [asdict(row) for row in rows]
