"""The server side of a fleet that does not learn: engines that count, and what real ones send."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from broker.envelopes import Envelope
from broker.messages import Parameters
from broker.training_messages import Activations, DeviceParameters, Gradients
from coordinator.aggregation import Aggregation, Model, block_of
from coordinator.engines import Entry, Outcome, Step
from coordinator.errors import BatchRefused
from coordinator.service import Parts
from coordinator.settings import CoordinatorSettings
from ops.simulator.sender import Wire
from ops.simulator.sizes import message_sizes
from ops.simulator.stub import BLOCKS, FEATURES, name_of, stub_state
from tensors.networks import State

Witness = Callable[[str, int], bool]
"""Told device and position of a batch that is about to be applied; False if it diverges."""


def stub_parts(new_witness: Callable[[], Witness], settings: CoordinatorSettings) -> Parts:
    """What a coordinator needs for stub devices; every engine has a witness of its own."""
    engines: dict[str, type[StubAveraging | StubShared]] = {
        "averaging": StubAveraging,
        "sequential": StubShared,
        "cascade": StubCascade,
    }
    state = stub_state()
    momentum = {
        name: np.zeros(value.shape, np.float32)
        for name, value in state.items()
        if value.dtype.kind == "f" and block_of(name) is not None
    }
    return Parts(
        shapes=[FEATURES] * (BLOCKS - 1),
        first=lambda: Model(dict(state), dict(momentum)),
        new_engine=lambda: engines[settings.strategy](new_witness()),
        network=StubResponder(),
    )


class _Half:
    """One server-side copy: every batch adds one to the blocks that it went through."""

    def __init__(self, model: Model, first: int) -> None:
        self.state = {
            name: value.copy()
            for name, value in model.state.items()
            if (block := block_of(name)) is not None and block >= first
        }
        self.momentum = {n: v.copy() for n, v in model.momentum.items() if n in self.state}

    def apply(self, cut: int) -> None:
        for name, value in self.state.items():
            if (block_of(name) or 0) >= cut:
                self.state[name] = value + value.dtype.type(1)


class _Counting:
    """What the engines have in common."""

    gathers: ClassVar[bool] = False

    def __init__(self, witness: Witness) -> None:
        self._witness = witness
        self._model = Model({}, {})

    def begin(self, model: Model, learning_rate: float) -> None:
        """See ``coordinator.engines.Engine``."""
        del learning_rate
        self._model = model

    def step(self, batch: Entry, *, want_gradient: bool) -> Step:
        """Count a batch. Raises ``BatchRefused`` if it is to diverge."""
        images = len(batch.labels)
        _, position = name_of(batch.labels.tolist())
        if not self._witness(batch.device, position):
            raise BatchRefused("diverged")
        self.count(batch.device, batch.cut, images)
        gradient = torch.ones_like(batch.features) if want_gradient else None
        return Step(1.0, 0, images, gradient)

    def step_together(self, batches: Sequence[Entry], *, want_gradients: bool) -> list[Outcome]:
        """One after another: who only counts gains nothing by counting together."""
        outcomes: list[Outcome] = []
        for batch in batches:
            try:
                outcomes.append(self.step(batch, want_gradient=want_gradients))
            except BatchRefused as exc:
                outcomes.append(exc)
        return outcomes

    def forward(
        self, device: str, number: int, cut: int, features: torch.Tensor, *, want_gradient: bool
    ) -> torch.Tensor:
        """Never asked: the stub's labels are the server's."""
        raise NotImplementedError

    def backward(
        self, device: str, number: int, gradient: torch.Tensor, *, images: int
    ) -> torch.Tensor | None:
        """Never asked: the stub's labels are the server's."""
        raise NotImplementedError

    def forget(self, device: str, number: int) -> None:
        """Never asked: the stub's labels are the server's."""
        raise NotImplementedError

    def count(self, device: str, cut: int, samples: int) -> None:
        """Enter a batch in the books."""
        raise NotImplementedError


class StubAveraging(_Counting):
    """A copy for every device."""

    def __init__(self, witness: Witness) -> None:
        super().__init__(witness)
        self._copies: dict[str, _Half] = {}

    def count(self, device: str, cut: int, samples: int) -> None:
        """In the device's copy."""
        del samples
        if device not in self._copies:
            self._copies[device] = _Half(self._model, cut)
        self._copies[device].apply(cut)

    def finish(self, device: str) -> tuple[State, State]:
        """The device's copy."""
        copy = self._copies.pop(device, None)
        return ({}, {}) if copy is None else (copy.state, copy.momentum)

    def close(self, aggregation: Aggregation) -> None:
        """Nothing."""


class StubShared(_Counting):
    """One copy for all."""

    def begin(self, model: Model, learning_rate: float) -> None:
        """See ``coordinator.engines.Engine``."""
        super().begin(model, learning_rate)
        self._shared = _Half(model, 1)
        self._samples: Counter[int] = Counter()

    def count(self, device: str, cut: int, samples: int) -> None:
        """In the one copy."""
        del device
        self._shared.apply(cut)
        self._samples[cut] += samples

    def finish(self, device: str) -> tuple[State, State]:
        """Nothing."""
        del device
        return {}, {}

    def close(self, aggregation: Aggregation) -> None:
        """A block weighs what entered at or below it."""
        for index in range(1, BLOCKS):
            weight = sum(n for cut, n in self._samples.items() if cut <= index)
            aggregation.add_server(
                {n: v for n, v in self._shared.state.items() if block_of(n) == index},
                {n: v for n, v in self._shared.momentum.items() if block_of(n) == index},
                weight,
            )


class StubCascade(StubShared):
    """Gathers, as the real one does."""

    gathers: ClassVar[bool] = True


class StubResponder:
    """Answers that every image is of class 0."""

    def holds(self, version: int) -> bool:
        """It needs no parameters."""
        del version
        return True

    def load(self, version: int, state: State) -> None:
        """Nothing."""

    def answer(self, version: int, questions: Sequence[tuple[int, Tensor]]) -> list[np.ndarray]:
        """Probabilities (N×2) of each."""
        del version
        sure = np.array([1.0, 0.0], np.float32)
        return [np.tile(sure, (len(features), 1)) for _, features in questions]


def real_sizes(settings: CoordinatorSettings, cut_of: Callable[[str], int | None]) -> Wire:
    """How many more bytes a stub's message would have with the network of the settings.

    As ``message_sizes`` counts them.
    """
    sizes = message_sizes(settings)

    def extra(envelope: Envelope) -> int:
        message = envelope.message
        if isinstance(message, Parameters):
            return max(0, sizes.parameters[message.cut - 1] - len(message.state))
        cut = cut_of(envelope.address.device or "")
        if cut is None:
            return 0
        match message:
            case Activations():
                return max(0, sizes.activations[cut - 1] - len(message.tensor))
            case Gradients():
                return max(0, sizes.gradients[cut - 1] - len(message.tensor))
            case DeviceParameters():
                return max(0, sizes.parameters[cut - 1] - len(message.state))
        return 0

    return extra
