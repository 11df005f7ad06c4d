"""One training and test of ``splitfleet bench rate-accuracy``."""

from __future__ import annotations

import functools
import hashlib
import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from broker.envelopes import Envelope
from broker.messages import Network
from broker.training_messages import Activations, Gradients
from coordinator.evaluation import Evaluator
from coordinator.observer import Observer
from coordinator.settings import CoordinatorSettings
from edge_agent.data import DeviceData
from ops import bench_rows
from ops.experiments.images import balanced
from ops.simulator.fleet import SimulatedFleet
from ops.simulator.programs import Device
from tensors.datasets import Dataset, load_dataset
from tensors.networks import NetworkSpec, State, build_network
from tensors.partition import partition
from tensors.training import MemoryFormat, choose_compute

WANTED_TEST_IMAGES = 10_000
CUTS = (2, 3, 4, 5)
"""One device each."""
Result = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Setup:
    """What all runs have in common. ``train_images`` None: all that the data set has."""

    dataset: str = "fashion-mnist-small"
    train_images: int | None = None
    rounds: int = 4
    width: int = 16
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Case:
    """One run: everything its result depends on."""

    setup: Setup
    activation: str
    gradient: str
    seed: int

    @property
    def codec(self) -> str:
        """See :func:`pair_name`."""
        return pair_name(self.activation, self.gradient)

    @property
    def file(self) -> str:
        """The name of the file its result is kept in."""
        digest = hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:10]
        name = self.codec.replace("/", "_").replace(":", "-")
        return f"{name}-seed{self.seed}-{digest}.json"


def pair_name(activation: str, gradient: str) -> str:
    """``ACTIVATION`` if it is the gradients' codec too, else ``ACTIVATION/GRADIENT``."""
    return activation if activation == gradient else f"{activation}/{gradient}"


class _Books(Observer):
    """Payload of the tensors on the wire, and the batches that were not trained on."""

    def __init__(self) -> None:
        self.samples = self.activation_bytes = self.gradient_bytes = self.discarded = 0

    def batch_discarded(self, reason: str) -> None:
        del reason
        self.discarded += 1

    def see(self, envelope: Envelope) -> None:
        match envelope.message:
            case Activations() as message:
                self.samples += len(message.labels)
                self.activation_bytes += len(message.tensor)
            case Gradients() as message:
                self.gradient_bytes += len(message.tensor) + len(message.logits or b"")


def run_case(case: Case, data_root: Path | None) -> Result:
    """Train and test once. The result is the same every time, but for its ``seconds``.

    Accuracies (0 to 1) are those of the last round's model on all test images: ``accuracy`` that of
    the full network entered at a device's cut through its codec, mean over the devices.
    """
    started = time.perf_counter()
    train, test = load_images(case.setup, data_root)
    shares = partition(train.labels, len(CUTS), "iid", case.seed)
    nothing = np.zeros(0, np.int64)
    books = _Books()
    with tempfile.TemporaryDirectory(prefix="splitfleet-bench-") as folder:
        settings = _settings(case, train, Path(folder))
        devices = [
            Device(f"cut-{cut}", cut=cut, data=DeviceData(train, rows, None, nothing))
            for cut, rows in zip(CUTS, shares, strict=True)
        ]
        fleet = SimulatedFleet(settings, devices, learning="real", observer=books, watch=books.see)
        fleet.run()
        checkpoint = fleet.checkpoint()
    return {
        "case": asdict(case),
        **_accuracies(settings, checkpoint.model.state, test),
        "test_images": len(test),
        "train_images": len(train),
        "samples": books.samples,
        "activation_bytes": books.activation_bytes,
        "gradient_bytes": books.gradient_bytes,
        "discarded": books.discarded,
        "commit": bench_rows.commit(),
        "seconds": time.perf_counter() - started,
    }


@functools.lru_cache(maxsize=1)
def load_images(setup: Setup, data_root: Path | None) -> tuple[Dataset, Dataset]:
    """Training images, as many of each class, the same for all runs; and the test images.

    A test set of fewer than `WANTED_TEST_IMAGES` is filled up with images that are not trained on.
    """
    train = load_dataset(setup.dataset, "train", root=data_root)
    test = load_dataset(setup.dataset, "test", root=data_root)
    if setup.train_images is None:
        return train, test
    rows = balanced(train.labels, setup.train_images, "--train-images")
    others = np.setdiff1d(np.arange(len(train)), rows)
    missing = max(0, WANTED_TEST_IMAGES - len(test))
    held_out = np.sort(np.random.default_rng(1).permutation(others)[:missing])
    test = replace(
        test,
        images=np.concatenate([test.images, train.images[held_out]]),
        labels=np.concatenate([test.labels, train.labels[held_out]]),
    )
    return replace(train, images=train.images[rows], labels=train.labels[rows]), test


def _settings(case: Case, train: Dataset, folder: Path) -> CoordinatorSettings:
    _, size, _, channels = train.images.shape
    setup = case.setup
    # Both would be chosen by timing, and so now and then differently; narrow networks must be
    # contiguous (tensors/training.py).
    memory_format: MemoryFormat = "channels_last" if setup.width >= 16 else "contiguous"
    return CoordinatorSettings(
        state_dir=folder,
        network=Network(
            width=setup.width, channels=channels, size=size, classes=len(train.classes)
        ),
        codec=case.activation,
        gradient_codec=case.gradient,
        rounds=setup.rounds,
        min_devices=len(CUTS),
        seed=case.seed,
        inference=False,
        device=setup.device,
        precision="fp32",
        memory_format=memory_format,
    )


def _accuracies(settings: CoordinatorSettings, state: State, test: Dataset) -> Result:
    spec = NetworkSpec(**settings.network.model_dump())
    compute = choose_compute(
        lambda: build_network(spec),
        (settings.batch_size, spec.channels, spec.size, spec.size),
        device=settings.device,
        precision=settings.precision,
        memory_format=settings.memory_format,
    )
    evaluator = Evaluator(build_network(spec), compute, test)
    seen = {cut: evaluator.cut_scores(state, cut, settings.codec, "entropy") for cut in CUTS}
    return {
        "accuracy": statistics.fmean(scores.server_accuracy for scores in seen.values()),
        "server_accuracy": evaluator.scores(state, ()).server_accuracy,
        "exit_accuracy": statistics.fmean(scores.exit_accuracy for scores in seen.values()),
        "accuracy_by_cut": {str(cut): scores.server_accuracy for cut, scores in seen.items()},
        "exit_accuracy_by_cut": {str(cut): scores.exit_accuracy for cut, scores in seen.items()},
    }
