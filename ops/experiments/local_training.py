"""The baselines without a fleet: everything in one place, or every device by itself.

The whole network is trained with the cross entropy of its answer plus the mean of those of its
exits, which is what a fleet minimises that has a device for each exit, if exits and feedback
weigh 1. Batches, augmentation,
optimizer, learning rates and the number of batches are the fleet's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from coordinator.aggregation import Model
from coordinator.checkpoint import Checkpoint
from coordinator.orders import rate
from coordinator.store import Store
from ops.errors import FleetFailed
from ops.experiments.images import ImageSets, resident_images
from ops.experiments.spec import Training
from tensors.batches import BatchStream
from tensors.batches_torch import TorchBatchStream
from tensors.networks import CutNetwork, NetworkSpec, State, build_network, read_state, write_state
from tensors.training import (
    Compute,
    choose_compute,
    make_optimizer,
    read_momentum,
    set_learning_rate,
    write_momentum,
)

RUN = "alone"


class LocalTraining:
    """One learner (``centralized``) or one for each device (``distributed``), round by round."""

    def __init__(self, training: Training, images: ImageSets, folder: Path) -> None:
        settings = training.settings
        self._settings = settings
        quotas, shares = training.quotas(images), training.shares(images)
        if training.kind == "centralized":
            rows = np.sort(np.concatenate(shares))
            parts = {"": (tuple(sorted(set(training.cuts))), rows, sum(quotas))}
        else:
            parts = {
                name: ((cut,), rows, quota)
                for name, cut, rows, quota in zip(
                    training.devices, training.cuts, shares, quotas, strict=True
                )
            }
        spec = NetworkSpec(**settings.network.model_dump())
        compute = choose_compute(
            lambda: build_network(spec),
            (settings.batch_size, spec.channels, spec.size, spec.size),
            device=settings.device,
            precision=settings.precision,
            memory_format=settings.memory_format,
        )
        resident = resident_images(images.train, settings.device)

        def stream(name: str, rows: np.ndarray) -> BatchStream | TorchBatchStream:
            about: dict[str, Any] = {
                "batch_size": settings.batch_size,
                "seed": settings.seed,
                "device": name,
                "augment": settings.augment,
            }
            if resident is not None:
                return TorchBatchStream(resident, rows, **about)
            return BatchStream(images.train, rows, **about)

        self._learners = {
            name: _Learner(
                build_network(spec, seed=settings.seed),
                compute,
                cuts,
                stream(name or training.kind, rows),
                quota,
                Store(folder / (name or "store"), keep=2),
                training,
            )
            for name, (cuts, rows, quota) in parts.items()
        }

    @property
    def round(self) -> int:
        """How many rounds all learners have closed."""
        return min(learner.round for learner in self._learners.values())

    def advance(self) -> None:
        """Train the next round. Raises ``FleetFailed`` if a loss is not finite."""
        number = self.round + 1
        for learner in self._learners.values():
            if learner.round < number:  # some may have got so far before a crash
                learner.train(number, rate(self._settings, number))

    def models(self) -> dict[str, State]:
        """By device; one for all if centralized."""
        return {name: learner.state() for name, learner in self._learners.items()}

    def records(self) -> list[dict[str, Any]]:
        """Of every closed round; nothing is sent."""
        learners = [learner.records for learner in self._learners.values()]
        return [
            {
                "round": number,
                "samples": sum(record["samples"] for record in records),
                "discarded": 0,
                "bytes_up": 0,
                "bytes_down": 0,
                "train_loss": {"0": float(np.mean([record["loss"] for record in records]))},
            }
            # A crash may leave some a round ahead.
            for number, records in enumerate(zip(*learners, strict=False), 1)
        ]


class _Learner:
    def __init__(
        self,
        network: CutNetwork,
        compute: Compute,
        cuts: Sequence[int],
        stream: BatchStream | TorchBatchStream,
        quota: int,
        store: Store,
        training: Training,
    ) -> None:
        settings = training.settings
        heads = {cut: network.heads[str(cut)] for cut in cuts}
        blocks = {index: network.blocks[str(index)] for index in range(network.stop)}
        self._whole, self._network = network, CutNetwork(blocks, heads)
        compute.place(self._whole)
        self._whole.train()
        self._compute = compute
        self._cuts = list(cuts)
        self._stream, self._quota, self._store = stream, quota, store
        self._batch_size = settings.batch_size
        self._optimizer = make_optimizer(
            self._network, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
        self._name = f"{training.arm}, seed {settings.seed}"
        identity = training.identity()
        current = store.current()
        checkpoint = store.latest() if current is not None else None
        if checkpoint is None:
            checkpoint = Checkpoint(version=0, round=0, model=Model(self.state(), {}))
            store.create(RUN, identity, checkpoint)
        write_state(self._whole, checkpoint.model.state)
        write_momentum(self._network, self._optimizer, checkpoint.model.momentum)
        self.round = checkpoint.round
        self.records: list[dict[str, Any]] = checkpoint.history

    def state(self) -> State:
        return read_state(self._whole)

    def train(self, number: int, learning_rate: float) -> None:
        set_learning_rate(self._optimizer, learning_rate)
        losses = [
            self._step(*self._stream.batch((number - 1) * self._quota + batch))
            for batch in range(self._quota)
        ]
        loss = float(np.mean(losses))
        if not np.isfinite(loss):
            raise FleetFailed(f"{self._name}: the loss is {loss} in round {number}; lower the rate")
        self.round = number
        self.records.append({"samples": self._quota * self._batch_size, "loss": loss})
        momentum = read_momentum(self._network, self._optimizer)
        self._store.save(
            Checkpoint(
                version=number,
                round=number,
                model=Model(self.state(), momentum),
                trained_cuts=self._cuts,
                history=self.records,
            )
        )

    def _step(self, images: np.ndarray | Tensor, labels: np.ndarray | Tensor) -> float:
        targets = torch.as_tensor(labels).to(self._compute.device)
        exits = []
        x = self._compute.tensor(images)
        with self._compute.arithmetic():
            for index in range(self._network.stop):
                x = self._network(x, start=index, stop=index + 1)
                if index + 1 in self._cuts:
                    exits.append(self._network.exit(x, index + 1))
        full = F.cross_entropy(x.float(), targets)
        at_exits = torch.stack([F.cross_entropy(logits, targets) for logits in exits])
        self._optimizer.zero_grad()
        (full + at_exits.mean()).backward()
        self._optimizer.step()
        return float(full.item())
