"""Answering offloaded features with the server blocks of their version, several at a time."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from tensors.exit_rules import softmax
from tensors.networks import CutNetwork, State, write_state
from tensors.training import Compute


class Responder:
    """Server blocks of the last ``versions`` versions that were asked for, in evaluation mode.

    Every version has a copy of the blocks of its own, so that a change of version costs nothing. To
    be used in one thread. Without ``classifier`` it answers with the last features, which that
    would take.
    """

    def __init__(
        self,
        network: CutNetwork,
        compute: Compute,
        *,
        versions: int = 3,
        classifier: bool = True,
    ) -> None:
        self._template = network.server_half(1, classifier=classifier)
        self._classifier = classifier
        self._compute = compute
        self._limit = versions
        self._networks: OrderedDict[int, CutNetwork] = OrderedDict()

    def holds(self, version: int) -> bool:
        """Whether :meth:`answer` can be called for it."""
        return version in self._networks

    def load(self, version: int, state: State) -> None:
        """Take these parameters; the version that was not asked for the longest makes room."""
        network = self._networks.pop(version, None)
        if network is None and len(self._networks) >= self._limit:
            _, network = self._networks.popitem(last=False)
        if network is None:
            network = copy.deepcopy(self._template).eval()
            self._compute.place(network)
        write_state(network, {name: state[name] for name in network.state_dict()})
        self._networks[version] = network

    def answer(self, version: int, questions: Sequence[tuple[int, Tensor]]) -> list[np.ndarray]:
        """Cuts and features (N×…) → probabilities (float32, N×K) of each, in their order.

        Without a classifier last features (float32, N×…).
        One forward pass: it begins at the lowest cut, the others join at theirs. Raises whatever
        torch does if that cannot be computed.
        """
        network = self._networks[version]
        self._networks.move_to_end(version)
        order = sorted(range(len(questions)), key=lambda index: questions[index][0])
        entering: dict[int, list[Tensor]] = {}
        for index in order:
            cut, features = questions[index]
            entering.setdefault(cut, []).append(self._compute.tensor(features))
        flow: list[Tensor] = []
        with torch.inference_mode(), self._compute.arithmetic():
            for start, stop in pairwise([*entering, network.stop]):
                joined = [*flow, *entering[start]]
                flow = [network(_cat(joined), start=start, stop=stop)]
        answers = flow[0].float().cpu().numpy()
        if self._classifier:
            with np.errstate(invalid="ignore"):  # one question's infinities are its own NaNs
                answers = softmax(answers).astype(np.float32)
        sizes = [len(questions[index][1]) for index in order]
        parts = np.split(answers, np.cumsum(sizes)[:-1])
        return [part for _, part in sorted(zip(order, parts, strict=True), key=lambda p: p[0])]


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
