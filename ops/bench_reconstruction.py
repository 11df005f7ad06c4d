"""``splitfleet bench reconstruction``: what features show of an image, and what they are good for.

A network with GroupNorm is trained whole. For each cut and each way of sending (exactly, rounded,
with noise and rounded) it is then trained a little further with what is sent there, as a device and
its coordinator do together; that gives the accuracy and the layers that the attacker has.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from coordinator.evaluation import Evaluator
from ops import bench_rows
from ops.errors import SettingsWrong
from ops.reconstruction import best_similarity
from ops.similarity import WINDOW, ssim
from tensors.batches import BatchStream, normalise
from tensors.codecs import Codec, parse_codec
from tensors.datasets import load_dataset
from tensors.decoding import decode_torch
from tensors.networks import CutNetwork, NetworkSpec, build_network, read_state
from tensors.privacy import GaussianMechanism
from tensors.privacy_torch import add_noise, clip_rows
from tensors.training import Compute, make_optimizer, set_learning_rate

BATCH, RATE, TUNE_RATE = 32, 0.05, 0.01
HEADER = ("cut", "sent", "C", "σ", "ρ", "accuracy", "SSIM")


@dataclass(frozen=True, slots=True)
class Setup:
    """``noise``: the noise's norm as multiples of the clip, so σ = noise·C/√values at each cut."""

    cuts: tuple[int, ...] = (1, 3, 5, 7, 9)
    codec: str = "int4+zstd"
    noise: tuple[float, ...] = (1.0, 4.0, 16.0)
    dataset: str = "fashion-mnist-small"
    width: int = 16
    train_batches: int = 500
    tune_batches: int = 40
    images: int = 8
    steps: int = 200
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """``accuracy`` (0 to 1) of the whole network, ``ssim`` of the attack, ``rho`` of a release."""

    cut: int
    sent: str
    clip: float | None
    std: float | None
    rho: float | None
    accuracy: float
    ssim: float


@dataclass(frozen=True, slots=True)
class Way:
    """How features are sent: clipped and with noise if there is a mechanism, then encoded."""

    codec: Codec
    mechanism: GaussianMechanism | None
    normal: Callable[[tuple[int, ...]], np.ndarray]

    def shown(self, features: Tensor) -> Tensor:
        """What of features (N, …) the noise is added to; can be differentiated."""
        return features if self.mechanism is None else clip_rows(features, self.mechanism.clip)

    def received(self, features: Tensor) -> Tensor:
        """What arrives, straight through to :meth:`shown` for gradients."""
        shown = self.shown(features)
        sent = shown.detach()
        if self.mechanism is not None:
            sent = add_noise(sent, self.mechanism.std, self.normal)
        return shown + (decode_torch(self.codec.encode(sent)) - shown.detach())


class Bench:
    """A data set and a network trained on it."""

    def __init__(self, setup: Setup, data_root: Path | None) -> None:
        self.setup = setup
        self.train = load_dataset(setup.dataset, root=data_root)
        self.test = load_dataset(setup.dataset, "test", root=data_root)
        _, _, size, channels = self.train.images.shape
        if size < WINDOW:
            raise SettingsWrong(f"images of {size} pixels: the similarity needs {WINDOW} at least")
        classes = len(self.train.classes)
        self.spec = NetworkSpec(
            width=setup.width, channels=channels, size=size, classes=classes, norm="group"
        )
        self.mean = _unit(self.train.images).mean(0, keepdim=True)
        """Of the training images; an attacker knows what images look like."""
        self.network = build_network(self.spec, seed=setup.seed)
        for cut in setup.cuts:
            self.network.require_cut(cut)
        self.stream = BatchStream(
            self.train,
            np.arange(len(self.train)),
            batch_size=BATCH,
            seed=setup.seed,
            device="bench",
        )
        self._train(self.network, None, 0, setup.train_batches, RATE)

    def ways(self, cut: int) -> list[tuple[str, Way]]:
        """Each way of sending at this cut, with its name."""
        normal = self._normal()
        exact, codec = parse_codec("fp32"), parse_codec(self.setup.codec)
        clip, values = self._norm(cut)
        noisy = [
            (
                f"noise {ratio:g}, {codec.name}",
                Way(codec, GaussianMechanism(clip, ratio * clip / math.sqrt(values)), normal),
            )
            for ratio in self.setup.noise
        ]
        return [("fp32", Way(exact, None, normal)), (codec.name, Way(codec, None, normal)), *noisy]

    def row(self, cut: int, name: str, way: Way) -> Row:
        """Train on with what is sent so, then attack."""
        network = copy.deepcopy(self.network)
        self._train(network, way, cut, self.setup.tune_batches, TUNE_RATE)
        evaluator = Evaluator(
            build_network(self.spec), Compute(), self.test, mechanism=way.mechanism
        )
        scores = evaluator.cut_scores(read_state(network), cut, way.codec.name, "entropy")
        network.eval().requires_grad_(requires_grad=False)
        pixels = self.test.images[: self.setup.images]
        with torch.no_grad():
            sent = way.received(network(torch.from_numpy(self._normalised(pixels)), stop=cut))
        truth = _unit(pixels)

        def features_of(images: Tensor) -> Tensor:
            return way.shown(network(self._scaled(images), stop=cut))

        similarity = best_similarity(features_of, sent, truth, self.mean, steps=self.setup.steps)
        found = way.mechanism
        return Row(
            cut,
            name,
            None if found is None else found.clip,
            None if found is None else found.std,
            None if found is None else found.rho,
            scores.server_accuracy,
            similarity,
        )

    @property
    def blind(self) -> float:
        """SSIM of the mean image with the attacked ones: what needs no features."""
        truth = _unit(self.test.images[: self.setup.images])
        return ssim(self.mean.expand_as(truth), truth).mean().item()

    def _train(
        self, network: CutNetwork, way: Way | None, cut: int, batches: int, rate: float
    ) -> None:
        network.train()
        optimizer = make_optimizer(network.blocks, momentum=0.9, weight_decay=5e-4)
        first = 0 if way is None else self.setup.train_batches
        for step in range(batches):
            images, labels = self.stream.batch(first + step)
            features = network(torch.from_numpy(images), stop=cut)
            logits = network(features if way is None else way.received(features), start=cut)
            set_learning_rate(optimizer, rate * (1 - step / batches))
            optimizer.zero_grad()
            F.cross_entropy(logits, torch.from_numpy(labels)).backward()
            optimizer.step()

    def _norm(self, cut: int) -> tuple[float, int]:
        """The median norm of an image's features at a cut, and how many values they are."""
        pixels = torch.from_numpy(self._normalised(self.train.images[:256]))
        with torch.no_grad():
            features = self.network.eval()(pixels, stop=cut).flatten(1)
        return features.norm(dim=1).median().item(), features.shape[1]

    def _normal(self) -> Callable[[tuple[int, ...]], np.ndarray]:
        rng = np.random.default_rng(self.setup.seed)
        return lambda shape: rng.standard_normal(shape, np.float32)

    def _normalised(self, pixels: np.ndarray) -> np.ndarray:
        return normalise(pixels, self.train.mean, self.train.std)

    def _scaled(self, images: Tensor) -> Tensor:
        """Images of values in 0 … 1 as the network takes them."""
        mean, std = (
            torch.tensor(each).view(1, -1, 1, 1) for each in (self.train.mean, self.train.std)
        )
        return (images - mean) / std


def _unit(pixels: np.ndarray) -> Tensor:
    """uint8 (N, H, W, C) as float32 (N, C, H, W) in 0 … 1."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def run_bench(
    setup: Setup, *, data_root: Path | None = None, append: Path | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Attack every cut and way of sending; the result, ready for JSON, with ``rows``.

    Raises:
        SettingsWrong: a number is too small, or the images are.
        CodecError, NetworkError, DataError: a codec, cut or data set that does not exist.
        DiskTrouble: ``append`` cannot be written.
    """
    if min(setup.train_batches, setup.tune_batches, setup.images, setup.steps) < 1:
        raise SettingsWrong("--train-batches, --tune-batches, --images and --steps: at least 1")
    if any(not 0 < ratio < math.inf for ratio in setup.noise):
        raise SettingsWrong("--noise: numbers above 0")
    console = Console(stderr=True, quiet=quiet, width=110)
    bench = Bench(setup, data_root)
    rows = []
    for cut in setup.cuts:
        for name, way in bench.ways(cut):
            rows.append(bench.row(cut, name, way))
            console.print("  ".join(_cells(rows[-1])))
    about = (
        f"{bench_rows.today()}, commit {bench_rows.commit()}: {setup.dataset}, resnet18 of width "
        f"{setup.width} with GroupNorm; {setup.images} images, {setup.steps} steps; "
        f"the mean image has SSIM {bench.blind:.3f}"
    )
    cells = [_cells(row) for row in rows]
    bench_rows.show(about, HEADER, cells, console)
    if append is not None:
        head = f"\n{about}\n\n| {' | '.join(HEADER)} |\n{'|---' * len(HEADER)}|\n"
        bench_rows.append_text(append, head)
        bench_rows.append(append, cells)
    return {"about": about, "blind": bench.blind, "rows": [asdict(row) for row in rows]}


def _cells(row: Row) -> list[str]:
    noise = ["–" if value is None else f"{value:.3g}" for value in (row.clip, row.std, row.rho)]
    return [str(row.cut), row.sent, *noise, f"{100 * row.accuracy:.1f} %", f"{row.ssim:.3f}"]
