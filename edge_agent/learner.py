"""The torch learner of a device: built from an assignment, trains, predicts, measures itself."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from broker.messages import Assignment, Measurement
from edge_agent.errors import AssignmentError
from edge_agent.figures import Outcome
from edge_agent.snapshots import Snapshot
from edge_agent.trainer import DeviceTrainer
from tensors.codecs import Codec, Encode
from tensors.decoding import decode_torch
from tensors.exit_rules import softmax
from tensors.format import Encoded
from tensors.networks import CutNetwork, NetworkSpec, build_network, write_state
from tensors.training import Compute, MemoryFormat, Precision, choose_compute

BUILT_IN = ("resnet18",)


class TorchPredictor:
    """A copy of the device's half in evaluation mode."""

    def __init__(self, half: CutNetwork, compute: Compute) -> None:
        self._half = half.eval()
        self._compute = compute
        (self._cut,) = (int(cut) for cut in half.heads)

    def predict(self, images: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """Images → features at the cut and the exit's probabilities (float64, N×K)."""
        with torch.inference_mode(), self._compute.arithmetic():
            features = self._half(self._compute.tensor(images))
            logits = self._half.exit(features, self._cut)
        return features.cpu(), softmax(logits.float().cpu().numpy())

    def classify(self, features: np.ndarray) -> np.ndarray:
        """The whole network's probabilities (float64, N×K) for last features (float32, N×…)."""
        with torch.inference_mode(), self._compute.arithmetic():
            logits = self._half.classify(self._compute.tensor(features))
        return softmax(logits.float().cpu().numpy())


class TorchLearner:
    """A :class:`DeviceTrainer` and the start of the round to which it can return."""

    def __init__(self, half: CutNetwork, compute: Compute, trainer: DeviceTrainer) -> None:
        self._half = half
        self._compute = compute
        self._trainer = trainer
        self._start = trainer.snapshot()

    @property
    def start(self) -> Snapshot:
        """The start of the round: what :meth:`rewind` returns to."""
        return self._start

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Take parameters (the momentum stays) as the start of the next round."""
        self._trainer.load(state)
        self._start = self._trainer.snapshot()

    def restore(self, snapshot: Snapshot) -> None:
        """Take parameters and momentum as the start of the next round."""
        self._trainer.restore(snapshot)
        self._start = snapshot

    def rewind(self) -> None:
        """Return to the start of the round."""
        self._trainer.restore(self._start)

    def calibrate(self, counts: np.ndarray) -> None:
        """See :meth:`DeviceTrainer.calibrate`."""
        self._trainer.calibrate(counts)

    def set_learning_rate(self, rate: float) -> None:
        """Use ``rate`` from the next step on."""
        self._trainer.set_learning_rate(rate)

    def set_feedback_weight(self, weight: float) -> None:
        """See :meth:`DeviceTrainer.set_feedback_weight`."""
        self._trainer.set_feedback_weight(weight)

    def forward(
        self, batch: int, images: np.ndarray | Tensor, labels: np.ndarray | Tensor
    ) -> Tensor:
        """See :meth:`DeviceTrainer.forward`."""
        return self._trainer.forward(batch, images, labels)

    def backward(
        self, batch: int, gradient: Tensor | None, teacher: Tensor | None = None
    ) -> Outcome:
        """See :meth:`DeviceTrainer.backward`."""
        return self._trainer.backward(batch, gradient, teacher)

    def classify(self, batch: int, features: Tensor, labels: np.ndarray | Tensor) -> Tensor:
        """See :meth:`DeviceTrainer.classify`."""
        return self._trainer.classify(batch, features, labels)

    @property
    def encode(self) -> Encode:
        """See :meth:`tensors.codecs.Codec.encode`."""
        return Codec.encode

    def decode(self, data: Encoded, keep: np.ndarray | None) -> Tensor:
        """See :func:`tensors.codecs.decode_torch`; laid out as the features are."""
        return decode_torch(data, keep=keep, channels_last=self._compute.channels_last)

    def discard(self, batch: int) -> None:
        """Forget a batch without learning from it."""
        self._trainer.discard(batch)

    def state(self) -> dict[str, np.ndarray]:
        """Parameters and buffers as they are now."""
        return self._trainer.state()

    def predictor(self) -> TorchPredictor:
        """Answers with the parameters of the start of the round."""
        half = copy.deepcopy(self._half)
        write_state(half, self._start.state)
        return TorchPredictor(half, self._compute)


class LearnerFactory:
    """Builds learners and measurements for assignments, within what this device allows.

    A user's network is imported only if the device's own configuration names its factory: an
    assignment alone must not make a device import code.
    """

    programs: ClassVar[None] = None

    def __init__(
        self,
        *,
        networks: Sequence[str] = (),
        device: str = "auto",
        precision: Precision = "auto",
        memory_format: MemoryFormat = "auto",
    ) -> None:
        self._networks = (*BUILT_IN, *networks)
        self._device = device
        self._precision: Precision = precision
        self._memory_format: MemoryFormat = memory_format
        self.compute: Compute | None = None
        self._threads = torch.get_num_threads()

    def build(self, assignment: Assignment) -> TorchLearner:
        """The learner for an assignment with a cut. Raises :class:`AssignmentError`."""
        _compute_with(self._threads)
        spec = self._spec(assignment)
        assert assignment.cut is not None
        cut, classifier = assignment.cut, assignment.classifier is not None
        shape = (assignment.batch_size, spec.channels, spec.size, spec.size)
        self.compute = choose_compute(
            lambda: build_network(spec).device_half(cut),
            shape,
            device=self._device,
            precision=self._precision,
            memory_format=self._memory_format,
        )
        half = build_network(spec, seed=assignment.seed).device_half(cut, classifier=classifier)
        if assignment.noise is not None and mixes_images(half):
            raise AssignmentError(
                "BatchNorm lets every image of a batch into the features of all others, so noise "
                "on one image's features does not hide it: set network.norm = group at the "
                "coordinator, or do without clip_norm and noise_std"
            )
        trainer = DeviceTrainer(
            half,
            self.compute,
            exit_weight=assignment.exit_weight,
            feedback_weight=assignment.feedback_weight,
            momentum=assignment.momentum,
            weight_decay=assignment.weight_decay,
            distill_weight=assignment.distill_weight,
            distill_temperature=assignment.distill_temperature,
            clip=None if assignment.noise is None else assignment.noise.clip_norm,
        )
        return TorchLearner(half, self.compute, trainer)

    def predictor(self, assignment: Assignment, state: Mapping[str, np.ndarray]) -> TorchPredictor:
        """What answers with ``state``, a copy of its own; with one thread, which it is to stay in.

        Computed as the settings say, where they leave it open in float32: nothing is timed. Raises
        :class:`AssignmentError`, and ``TensorsError`` for a state that does not fit.
        """
        _compute_with(1)
        spec = self._spec(assignment)
        assert assignment.cut is not None
        compute = choose_compute(
            lambda: build_network(spec),
            (1, spec.channels, spec.size, spec.size),
            device=self._device,
            precision="fp32" if self._precision == "auto" else self._precision,
            memory_format=("contiguous" if self._memory_format == "auto" else self._memory_format),
        )
        classifier = assignment.classifier is not None
        half = build_network(spec).device_half(assignment.cut, classifier=classifier)
        write_state(half, state)
        compute.place(half)
        return TorchPredictor(half, compute)

    def measure(self, assignment: Assignment) -> Measurement:
        """Time every block and exit of the assignment's network on this device."""
        from edge_agent.measure import measure

        _compute_with(self._threads)
        spec = self._spec(assignment)
        shape = (assignment.batch_size, spec.channels, spec.size, spec.size)
        compute = choose_compute(
            lambda: build_network(spec),
            shape,
            device=self._device,
            precision=self._precision,
            memory_format=self._memory_format,
        )
        return measure(build_network(spec), spec, compute, assignment.batch_size, time.perf_counter)

    def _spec(self, assignment: Assignment) -> NetworkSpec:
        if assignment.network.name not in self._networks:
            raise AssignmentError(
                f"the coordinator wants the network {assignment.network.name!r}, which this device "
                f"does not allow; add it to `networks` in its configuration if that is meant"
            )
        return NetworkSpec(**assignment.network.model_dump())


def mixes_images(half: CutNetwork) -> bool:
    """Whether, in training, an image's features depend on the others of its batch: BatchNorm.

    That a user's own blocks do so in another way is not seen.
    """
    return any(isinstance(each, _BatchNorm) for each in half.blocks.modules())


def _compute_with(threads: int) -> None:
    """Use so many in what this thread computes from now on; others may use other numbers."""
    torch.set_num_threads(threads)
    torch.get_num_threads()  # without it, it would still take over what another thread sets
