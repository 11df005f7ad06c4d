"""How good the merged checkpoint is on held-out images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tensors.batches import normalise
from tensors.batches_torch import TorchImages
from tensors.calibration import SweepPoint, offload_curve, top_answers
from tensors.codecs import parse_codec
from tensors.datasets import Dataset
from tensors.decoding import decode_torch
from tensors.exit_rules import ExitRule, Float64s, softmax
from tensors.networks import CutNetwork, State, write_state
from tensors.privacy import GaussianMechanism
from tensors.training import Compute

THRESHOLDS = (*tuple(round(0.05 * i, 2) for i in range(20)), 0.97, 0.99)


@dataclass(frozen=True, slots=True)
class Scores:
    """Accuracies (0 to 1) on all test images: of the full network, and of the exit at each cut."""

    server_accuracy: float
    server_loss: float
    exit_accuracy: dict[int, float]


@dataclass(frozen=True, slots=True)
class CutScores:
    """A device's view: entering at its cut, through its codec."""

    exit_accuracy: float
    server_accuracy: float
    sweep: list[SweepPoint] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False)
class CutAnswers:
    """Probabilities (N, K) of a cut's exit, and of the server behind it, for the same images."""

    exit: Float64s
    server: Float64s


class Evaluator:
    """Scores checkpoints on ``dataset``, in batches of ``batch_size`` images.

    Without it 200, or 1000 on a GPU, where the images then stay. With ``mechanism`` the server is
    asked with features as devices release them; the noise is the same each time.
    """

    def __init__(
        self,
        network: CutNetwork,
        compute: Compute,
        dataset: Dataset,
        *,
        batch_size: int | None = None,
        mechanism: GaussianMechanism | None = None,
    ) -> None:
        compute.place(network)
        self._mechanism = mechanism
        self._network = network.eval()
        self._compute = compute
        self._dataset = dataset
        on_cpu = torch.device(compute.device).type == "cpu"
        self._batch_size = batch_size or (200 if on_cpu else 1000)
        self._resident = None if on_cpu else TorchImages(dataset, compute.device)

    def scores(self, state: State, cuts: Sequence[int]) -> Scores:
        """One pass over the images: every exit in ``cuts`` and the full network."""
        write_state(self._network, state)
        correct: dict[int, int] = dict.fromkeys(cuts, 0)
        full = 0
        loss = 0.0
        for images, labels in self._batches():
            x = self._forward(images, 0, 0)
            for index in range(self._network.stop):
                x = self._forward(x, index, index + 1)
                if index + 1 in correct:
                    answers = self._exit(x, index + 1).argmax(1)
                    correct[index + 1] += int((answers == labels).sum())
            logits = x.float().cpu()
            loss += torch.nn.functional.cross_entropy(
                logits, torch.from_numpy(labels), reduction="sum"
            ).item()
            full += int((logits.argmax(1).numpy() == labels).sum())
        images_seen = len(self._dataset.labels)
        return Scores(
            full / images_seen,
            loss / images_seen,
            {cut: hits / images_seen for cut, hits in correct.items()},
        )

    def cut_scores(self, state: State, cut: int, codec_name: str, rule: ExitRule) -> CutScores:
        """The exit and the full network as a device at ``cut`` sees them, over thresholds."""
        seen = self.cut_answers(state, cut, codec_name)
        labels = self._dataset.labels
        answers = top_answers(seen.server)
        return CutScores(
            float((top_answers(seen.exit) == labels).mean()),
            float((answers == labels).mean()),
            offload_curve(seen.exit, answers, labels, rule).at(THRESHOLDS),
        )

    @property
    def labels(self) -> np.ndarray:
        """Of all images, (N,)."""
        return self._dataset.labels

    def sample(self, most: int) -> np.ndarray:
        """Indices of at most so many images, rising, evenly spread over all; always the same."""
        images = len(self._dataset.labels)
        return np.linspace(0, images, min(most, images), endpoint=False).astype(np.int64)

    def cut_answers(
        self, state: State, cut: int, codec_name: str, *, rows: np.ndarray | None = None
    ) -> CutAnswers:
        """What a device at ``cut`` gets for every image: from its exit, and from the server.

        With ``rows``, the indices of some, for those. The server enters with the features as noise
        and codec leave them. Raises ``NetworkError`` for a state that does not fit or a cut that
        the network does not have.
        """
        self._network.require_cut(cut)
        write_state(self._network, state)
        codec = parse_codec(codec_name)
        rng = np.random.default_rng(0)
        of_exit, of_server = [], []
        for images, _ in self._batches(rows):
            x = self._forward(images, 0, cut)
            of_exit.append(softmax(self._exit(x, cut)))
            x = x.cpu()
            if self._mechanism is not None:
                x = self._mechanism.release(x, lambda shape: rng.standard_normal(shape, np.float32))
            received = self._compute.tensor(decode_torch(codec.encode(x)))
            logits = self._forward(received, cut, self._network.stop)
            of_server.append(softmax(logits.float().cpu().numpy()))
        return CutAnswers(np.concatenate(of_exit), np.concatenate(of_server))

    def _batches(self, rows: np.ndarray | None = None) -> Iterator[tuple[Tensor, np.ndarray]]:
        data = self._dataset
        images_seen = len(data.labels) if rows is None else len(rows)
        for start in range(0, images_seen, self._batch_size):
            part: Any = slice(start, min(start + self._batch_size, images_seen))
            if rows is not None:
                part = rows[part]
            if self._resident is not None:
                taken = np.arange(part.start, part.stop) if rows is None else part
                yield self._compute.tensor(self._resident.take(taken)), data.labels[part]
            else:
                images = normalise(data.images[part], data.mean, data.std)
                yield self._compute.tensor(images), data.labels[part]

    def _forward(self, x: Tensor, start: int, stop: int) -> Tensor:
        with torch.inference_mode(), self._compute.arithmetic():
            y: Tensor = self._network(x, start=start, stop=stop)
        return y

    def _exit(self, x: Tensor, cut: int) -> np.ndarray:
        with torch.inference_mode(), self._compute.arithmetic():
            return self._network.exit(x, cut).float().cpu().numpy()
