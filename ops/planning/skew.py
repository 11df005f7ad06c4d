"""How unevenly labels are spread over devices.

The measure is the mean over devices of the total variation distance ½ Σ|p − q| between a device's
shares of labels p and those of all devices together q: 0 for equal shares, towards 1 for devices of
one label each among many. Twice that is what Zhao et al. (*Federated Learning with Non-IID Data*,
arXiv 1806.00582) call earth mover's distance, by which they explain the loss of accuracy.

Small shares differ by chance alone; that part is taken off as it adds, in squares. The bounds are
what ``tensors.partition`` makes of balanced labels (docs/planning.md): Dirichlet 1 has 0.31 to
0.37, Dirichlet 0.5 has 0.42 to 0.48, Dirichlet 0.1 has 0.60 to 0.75.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ops.errors import SettingsWrong

NOTICEABLE = 0.3
STRONG = 0.5
MOST_IMAGES = 1e12
FORM = 'write {"device": {"label": images}}'

Level = Literal["even", "noticeable", "strong"]


@dataclass(frozen=True, slots=True)
class Skew:
    """``distance``: the measure; ``by_chance``: what of it shares of this size have anyway."""

    distance: float
    by_chance: float

    @property
    def beyond_chance(self) -> float:
        """What the bounds are for."""
        return math.sqrt(max(0.0, self.distance**2 - self.by_chance**2))

    @property
    def level(self) -> Level:
        """In a word."""
        if self.beyond_chance < NOTICEABLE:
            return "even"
        return "noticeable" if self.beyond_chance < STRONG else "strong"


def skew_of(counts: NDArray[np.float64]) -> Skew:
    """Of images by device and label (N, K), each device with at least one."""
    sizes = counts.sum(axis=1)
    pooled = counts.sum(axis=0) / counts.sum()
    distance = float((np.abs(counts / sizes[:, None] - pooled).sum(axis=1) / 2).mean())
    # Mean deviation of a binomial share, by the normal distribution: √(2 q (1 − q) / (π n)).
    noise = np.sqrt(2 * pooled * (1 - pooled) / (np.pi * sizes[:, None]))
    return Skew(distance, float(np.minimum(1, noise.sum(axis=1) / 2).mean()))


def read_counts(path: Path) -> NDArray[np.float64]:
    """Images by device and label (N, K), from JSON: device or class → label → images.

    Instead of a mapping from labels there may be a list with the images of label 0, 1, ….

    Raises :class:`SettingsWrong`, naming the entry.
    """
    try:
        data = json.loads(path.read_text("utf-8"))
    except RecursionError:
        raise SettingsWrong(f"--labels {path}: it is nested too deeply; {FORM}") from None
    except (OSError, ValueError) as exc:
        raise SettingsWrong(f"--labels {path}: it cannot be read as JSON ({exc})") from exc
    if not isinstance(data, Mapping) or not data:
        raise SettingsWrong(f"--labels {path}: {FORM}")
    rows = {str(name): _row(path, str(name), entry) for name, entry in data.items()}
    labels = sorted({label for row in rows.values() for label in row})
    return np.array([[row.get(label, 0.0) for label in labels] for row in rows.values()])


def _row(path: Path, name: str, entry: object) -> dict[str, float]:
    if isinstance(entry, Sequence) and not isinstance(entry, str):
        entry = {str(label): images for label, images in enumerate(entry)}
    if not isinstance(entry, Mapping):
        raise SettingsWrong(
            f"--labels {path}: {name} = {reprlib.repr(entry)}: give images by label"
        )
    for label, images in entry.items():
        if type(images) not in (int, float) or not 0 <= images <= MOST_IMAGES:
            raise SettingsWrong(
                f"--labels {path}: {name}.{label} = {reprlib.repr(images)}: it must be a number "
                f"from 0 to {MOST_IMAGES:g}"
            )
    if not sum(entry.values()):
        raise SettingsWrong(f"--labels {path}: {name} has no images")
    return {str(label): float(images) for label, images in entry.items()}
