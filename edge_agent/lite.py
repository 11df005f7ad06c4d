"""A device without torch: its half of the network is a program on onnxruntime, and never trained.

It computes features for the rest of the network to learn from, and answers with its exit; what it
runs with are the parameters that the other devices of its cut have trained. Activations are encoded
by NumPy; no gradient is of use to it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from broker.messages import Assignment, Measurement, Program
from edge_agent.errors import AssignmentError, NotReady, StateError, TrainingError
from edge_agent.figures import Outcome
from edge_agent.programs import Programs, ProgramStore
from edge_agent.snapshots import Snapshot
from tensors.codecs import Codec, Encode
from tensors.errors import NetworkError
from tensors.exit_rules import softmax
from tensors.format import Encoded
from tensors.onnx_half import OnnxHalf

log = logging.getLogger("splitfleet.agent")

State = Mapping[str, np.ndarray]


class OnnxPredictor:
    """The half and its exit with one version of the parameters."""

    def __init__(self, half: OnnxHalf) -> None:
        self._half = half

    def predict(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images → features at the cut and the exit's probabilities (float64, N×K)."""
        features, logits = self._half.run(images)
        return features, softmax(logits)

    def classify(self, features: np.ndarray) -> np.ndarray:
        """Never asked: it keeps no classifier."""
        raise NotImplementedError


class FrozenLearner:
    """Computes features and what its exit makes of them; nothing changes but by :meth:`load`."""

    def __init__(self, program: Program, *, threads: int | None) -> None:
        self._program = program
        self._threads = threads
        self._start = Snapshot({}, {})
        self._half: OnnxHalf | None = None
        self._outcomes: dict[int, Outcome] = {}

    @property
    def start(self) -> Snapshot:
        """The parameters it computes with; none at first."""
        return self._start

    def load(self, state: State) -> None:
        """Compute with these. Raises ``TensorsError`` for such as the program does not take."""
        self._half = None  # before there is another
        self._half = open_half(self._program, state, self._threads)
        self._start = Snapshot(dict(state), {})

    def restore(self, snapshot: Snapshot) -> None:
        """Compute with the parameters of a snapshot."""
        self.load(snapshot.state)

    def rewind(self) -> None:
        """What is computed now is what was computed at the start of the round."""
        self._outcomes.clear()

    def calibrate(self, counts: np.ndarray) -> None:
        """Nothing is trained on a loss."""

    def set_learning_rate(self, rate: float) -> None:
        """No step is made."""

    def set_feedback_weight(self, weight: float) -> None:
        """No gradient is followed."""

    def forward(self, batch: int, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Features at the cut (float32, N×…) of images (float32, N×C×H×W)."""
        assert self._half is not None
        features, logits = self._half.run(images)
        right = softmax(logits)[np.arange(len(labels)), labels]
        with np.errstate(divide="ignore"):
            loss = float(-np.log(right).mean())
        correct = int((logits.argmax(1) == labels).sum())
        self._outcomes[batch] = Outcome(loss, correct, len(labels))
        return features

    def backward(self, batch: int, gradient: Any | None, teacher: Any | None = None) -> Outcome:
        """What the exit made of a batch. Raises :class:`TrainingError` if that is not finite."""
        del gradient, teacher
        outcome = self._outcomes.pop(batch)
        if not np.isfinite(outcome.loss):
            raise TrainingError(f"the exit's loss of batch {batch} is {outcome.loss}")
        return outcome

    def classify(self, batch: int, features: Any, labels: Any) -> Any:
        """Never asked: it keeps no classifier."""
        raise NotImplementedError

    @property
    def encode(self) -> Encode:
        """See :meth:`tensors.codecs.Codec.encode`."""
        return Codec.encode

    def decode(self, data: Encoded, keep: np.ndarray | None) -> None:
        """What is sent to learn from is left as it is."""

    def discard(self, batch: int) -> None:
        """Forget a batch."""
        del self._outcomes[batch]

    def state(self) -> dict[str, np.ndarray]:
        """Nothing has been learnt."""
        return {}

    def predictor(self) -> OnnxPredictor:
        """Answers with the parameters of the last :meth:`load`."""
        assert self._half is not None
        return OnnxPredictor(self._half)


class LiteFactory:
    """Builds learners and predictors from the program in ``store``."""

    def __init__(self, store: ProgramStore, *, threads: int | None = None) -> None:
        self._store = store
        self._threads = threads
        self._program: Program | None = None

    @property
    def programs(self) -> Programs:
        """What learners are built from: its own."""
        return self

    def has_program(self, assignment: Assignment) -> bool:
        """See :class:`Programs`."""
        return self._find(assignment) is not None

    def take(self, program: Program) -> None:
        """See :class:`Programs`."""
        if program.graph is None:
            raise AssignmentError(
                f"the coordinator has no program for cut layer {program.cut}: {program.refused}"
            )
        self._program = program
        try:
            self._store.save(program)
        except StateError as exc:
            log.warning("after a restart this device has to fetch its program again: %s", exc)

    def build(self, assignment: Assignment) -> FrozenLearner:
        """The learner for an assignment whose program is here.

        Raises :class:`AssignmentError` for one that wants the classifier trained here.
        """
        if assignment.classifier is not None:
            raise AssignmentError(
                "labels = device at the coordinator: a device that does not train cannot keep the "
                "classifier; give this one engine = torch"
            )
        return FrozenLearner(self._need(assignment), threads=self._threads)

    def predictor(self, assignment: Assignment, state: State) -> OnnxPredictor:
        """What answers with ``state``; with one thread.

        Raises :class:`NotReady` while the program is not here, ``TensorsError`` for a state that it
        does not take.
        """
        return OnnxPredictor(open_half(self._need(assignment), state, threads=1))

    def measure(self, assignment: Assignment) -> Measurement:
        """Never possible. Raises :class:`AssignmentError`."""
        del assignment
        raise AssignmentError(
            "a device with engine = onnxruntime cannot time a network it does not have: update the "
            "coordinator, or give this device a cut layer (cut = N)"
        )

    def _need(self, assignment: Assignment) -> Program:
        program = self._find(assignment)
        if program is None:
            raise NotReady("the program for this assignment has not come yet")
        return program

    def _find(self, assignment: Assignment) -> Program | None:
        wanted = assignment.run, assignment.cut
        assert wanted[1] is not None
        if self._program is None or (self._program.run, self._program.cut) != wanted:
            try:
                self._program = self._store.load(wanted[0], wanted[1])
            except StateError as exc:
                log.warning("the program has to be fetched again: %s", exc)
                self._program = None
        return self._program


def open_half(program: Program, state: State, threads: int | None) -> OnnxHalf:
    """The program with these parameters.

    Raises ``NetworkError`` for names or shapes that it does not take, ``ProgramError`` if it does
    not run.
    """
    assert program.graph is not None
    for name, shape in program.parameters.items():
        if name not in state or state[name].shape != tuple(shape):
            raise NetworkError(
                f"the program of cut layer {program.cut} takes a parameter {name} of shape "
                f"{tuple(shape)}; these are of another network"
            )
    taken = {name: state[name] for name in program.parameters}
    return OnnxHalf(bytes(program.graph), taken, threads=threads)
