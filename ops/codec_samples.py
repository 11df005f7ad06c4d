"""Tensors to try codecs on: activations and gradients at the cuts of a trained network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from coordinator.evaluation import Evaluator
from tensors.batches import BatchStream
from tensors.datasets import load_dataset
from tensors.networks import CutNetwork, NetworkSpec, build_network, read_state
from tensors.training import Compute, choose_compute, make_optimizer, set_learning_rate

Kind = Literal["activation", "gradient"]

TRAIN_BATCH = 32
RATE = 0.05


@dataclass(frozen=True, slots=True)
class Sample:
    """One tensor as training has it, bf16 or channels_last perhaps."""

    kind: Kind
    cut: int
    tensor: Tensor
    activation: Tensor
    """The activation at this cut: ``tensor`` itself, or what it is the gradient at."""

    def plain(self) -> Tensor:
        """The same values as contiguous float32."""
        return self.tensor.float().contiguous()


@dataclass(frozen=True, slots=True)
class Trained:
    """The network's accuracy on the test images (0 to 1), its arithmetic, and the tensors."""

    accuracy: float
    compute: str
    samples: list[Sample]


def collect(
    *,
    dataset: str,
    data_root: Path | None,
    width: int,
    train_batches: int,
    cuts: Sequence[int],
    batch_size: int,
    seed: int,
    progress: Callable[[int, float], None],
) -> Trained:
    """Train a ResNet-18, then take activations and gradients at ``cuts`` from test images.

    It is trained as a fleet does: on the loss of the whole network and of the exit at one of the
    cuts, another one each batch. The tensors are those of one training step more, on ``batch_size``
    test images (BatchNorm uses the batch's statistics). ``progress`` is told batch and loss.
    """
    train = load_dataset(dataset, root=data_root)
    test = load_dataset(dataset, "test", root=data_root)
    _, _, size, channels = train.images.shape
    spec = NetworkSpec(width=width, channels=channels, size=size, classes=len(train.classes))
    network = build_network(spec, seed=seed)
    for cut in cuts:
        network.require_cut(cut)
    compute = choose_compute(lambda: build_network(spec), (TRAIN_BATCH, channels, size, size))
    compute.place(network)
    stream = BatchStream(
        train, np.arange(len(train)), batch_size=TRAIN_BATCH, seed=seed, device="bench"
    )
    _train(network, compute, stream, cuts, train_batches, progress)
    evaluator = Evaluator(copy.deepcopy(network), compute, test)
    accuracy = evaluator.scores(read_state(network), ()).server_accuracy
    held_out = BatchStream(
        test, np.arange(len(test)), batch_size=batch_size, seed=seed, device="bench"
    )
    images, labels = held_out.batch(0)
    samples = [
        sample
        for cut in cuts
        for sample in _samples(network, compute, cut, images, torch.from_numpy(labels))
    ]
    samples.sort(key=lambda sample: sample.kind)
    return Trained(accuracy, compute.label, samples)


def _train(
    network: CutNetwork,
    compute: Compute,
    stream: BatchStream,
    cuts: Sequence[int],
    batches: int,
    progress: Callable[[int, float], None],
) -> None:
    network.train()
    # One each: a step of the fused optimizer needs gradients of all its parameters, or of none.
    parts = [network.blocks, *(network.heads[str(cut)] for cut in cuts)]
    optimizers = [make_optimizer(part, momentum=0.9, weight_decay=5e-4) for part in parts]
    for position in range(batches):
        images, targets = stream.batch(position)
        labels = torch.from_numpy(targets).to(compute.device)
        turn = position % len(cuts)
        with compute.arithmetic():
            features = network(compute.tensor(images), stop=cuts[turn])
            answers = network.exit(features, cuts[turn]), network(features, start=cuts[turn])
        losses = [F.cross_entropy(logits.float(), labels) for logits in answers]
        stepped = optimizers[0], optimizers[1 + turn]
        for optimizer in stepped:
            set_learning_rate(optimizer, RATE * (1 - position / batches))
            optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        for optimizer in stepped:
            optimizer.step()
        progress(position, losses[1].item())


def _samples(
    network: CutNetwork, compute: Compute, cut: int, images: np.ndarray, labels: Tensor
) -> list[Sample]:
    """Both tensors of one cut, made as agent and coordinator make them."""
    network.train()
    with compute.arithmetic():
        activation = network(compute.tensor(images), stop=cut).detach()
    received = compute.tensor(activation).clone().requires_grad_()
    with compute.arithmetic():
        logits = network(received, start=cut)
    F.cross_entropy(logits.float(), labels.to(compute.device)).backward()
    assert received.grad is not None
    return [
        Sample("activation", cut, activation, activation),
        Sample("gradient", cut, received.grad, activation),
    ]
