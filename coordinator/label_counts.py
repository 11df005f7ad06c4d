"""How many images of each class the coordinator has seen of a device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Counts = np.ndarray


class LabelCounts:
    """Counts the labels of the batches that were trained on; never what a device claims.

    ``counts`` are those so far, one for each of the network's classes.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        self._counts = np.array(counts, np.int64)

    def add(self, labels: Sequence[int]) -> None:
        """A batch with these labels was trained on."""
        self._counts = self.with_batch(labels)

    def with_batch(self, labels: Sequence[int]) -> Counts:
        """What the counts (int64, K) will be after a batch with these labels."""
        return self._counts + np.bincount(labels, minlength=len(self._counts))

    def dump(self) -> list[int]:
        """For a checkpoint."""
        counts: list[int] = self._counts.tolist()
        return counts
