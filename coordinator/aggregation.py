"""Cross-layer aggregation: every block becomes the weighted mean over all its holders.

Holders of block ``b`` are the server's copies it was trained in (the shared network, or the
replicas of devices cut at or below it) and the devices cut above it. A holder weighs as many
samples as the coordinator applied for it, never what a device claims. Source: Hetero-SplitEE
(arXiv 2512.09313), Averaging strategy; the rules for buffers and momentum are in docs/method.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from coordinator.defences.robust import RobustAverager, RobustRule
from tensors.averaging import Arrays, Averager
from tensors.networks import State


@dataclass(frozen=True, slots=True)
class Model:
    """Everything that training changes: parameters and buffers, and the server's momentum.

    ``velocity`` is the momentum of the versions among themselves (``coordinator.server_momentum``).
    """

    state: State
    momentum: State
    velocity: State = field(default_factory=dict)


def block_of(name: str) -> int | None:
    """The index of the block a parameter belongs to; None for one of an exit head."""
    kind, index, _ = name.split(".", 2)
    return int(index) if kind == "blocks" else None


def half_of(state: State, cut: int, *, classifier: int | None = None) -> State:
    """What a device with this cut holds, in order of names: blocks before it and its exit head.

    And the block ``classifier``, where devices keep that.
    """
    return {
        name: state[name] for name in sorted(state) if is_in_half(name, cut, classifier=classifier)
    }


def is_in_half(name: str, cut: int, *, classifier: int | None = None) -> bool:
    """Whether a device with this cut holds this parameter or buffer."""
    block = block_of(name)
    if block is None:
        return name.startswith(f"heads.{cut}.")
    return block < cut or block == classifier


class Aggregation:
    """The running mean of one round; memory does not grow with the number of holders.

    Args:
        start: the model the round began with.
        first_server_block: blocks before it are held by devices only.
        device_copies: whether devices count as holders of blocks that the server trains too.
        robust: the rule that takes the mean's place; all contributions are kept on disk then.
        classifier: the last block, where devices keep that; nobody else holds it.
    """

    def __init__(
        self,
        start: Model,
        *,
        first_server_block: int,
        device_copies: bool,
        robust: RobustRule | None = None,
        classifier: int | None = None,
    ) -> None:
        self._first_server_block = first_server_block
        self._device_copies = device_copies
        self._classifier = classifier
        self._states, self._momentum = (
            _Mean(arrays) if robust is None else RobustAverager(arrays, robust)
            for arrays in (start.state, start.momentum)
        )

    def add_server(
        self,
        state: Mapping[str, np.ndarray],
        momentum: Mapping[str, np.ndarray],
        weight: float,
        *,
        shared: bool = False,
    ) -> None:
        """One server-side copy (of some blocks) that ``weight`` samples went through.

        ``shared`` says that they were those of several devices. Raises ``AveragingError`` if it
        cannot be averaged.
        """
        if weight:
            self._states.add(state, weight, shared=shared)
            self._momentum.add(momentum, weight, shared=shared)

    def add_device(self, state: Mapping[str, np.ndarray], weight: float) -> None:
        """One device's blocks and exit head, trained while ``weight`` samples of it were applied.

        Raises ``AveragingError`` if names, shapes or values cannot be averaged.
        """
        if not weight:
            return
        if not self._device_copies:
            state = {
                name: values
                for name, values in state.items()
                if (block := block_of(name)) in (None, self._classifier)
                or block < self._first_server_block
            }
        self._states.add(state, weight)

    def result(self) -> Model:
        """The merged model; what nobody trained stays as it was."""
        return Model(self._states.result(), self._momentum.result())


class _Mean(Averager):
    """A mean, to which it is all one whose a copy is."""

    def add(self, state: Arrays, weight: float, *, shared: bool = False) -> None:
        del shared
        super().add(state, weight)
