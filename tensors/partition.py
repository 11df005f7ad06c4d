"""Splitting a training set over devices."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tensors.errors import DataError

MINIMUM = 10
RETRIES = 100
_ALLOWED = "allowed are iid, dirichlet:ALPHA and lists:FILE"


def partition(
    labels: NDArray[np.integer], devices: int, how: str, seed: int
) -> list[NDArray[np.int64]]:
    """Split the samples with these labels (N,) over devices: one sorted index array per device.

    how: `iid`: random, sizes differ by at most one. `dirichlet:ALPHA`: every class is spread by
    shares drawn from Dirichlet(ALPHA) (small ALPHA: a device sees few classes), so that each
    device gets at least 10 samples; as in "Federated Learning on Non-IID Data Silos"
    (arXiv 2102.02079). Both give every sample to exactly one device. `lists:FILE`: JSON, one list
    of indices per device; disjoint, but samples may be left out. The same arguments give the same
    split on every machine that has the same version of numpy.

    Raises DataError when `how` is none of these, the file does not fit, or there are too few
    samples.
    """
    if devices < 1:
        raise DataError(f"devices {devices}: must be at least 1")
    method, _, argument = how.partition(":")
    if method == "lists" and argument:
        return _lists(Path(argument).expanduser(), len(labels), devices)
    if seed < 0:
        raise DataError(f"seed {seed}: must be at least 0")
    rng = np.random.default_rng(seed)
    if how == "iid":
        _require(len(labels), devices, 1)
        return [np.sort(part) for part in np.array_split(rng.permutation(len(labels)), devices)]
    if method == "dirichlet":
        alpha = _alpha(how, argument)
        _require(len(labels), devices, MINIMUM)
        return _dirichlet(labels, devices, alpha, rng)
    raise DataError(f"partition {how!r}: {_ALLOWED}")


def _require(samples: int, devices: int, each: int) -> None:
    if samples < devices * each:
        raise DataError(
            f"{samples} samples are too few for {devices} devices of at least {each}: "
            "use fewer devices or more data"
        )


def _alpha(how: str, argument: str) -> float:
    try:
        alpha = float(argument)
    except ValueError:
        alpha = math.nan
    if not 1e-3 <= alpha <= 1e6:  # beyond, the draw loses all precision; and 1e6 is iid already
        raise DataError(f"partition {how!r}: ALPHA must be a number from 0.001 to 1000000")
    return alpha


def _dirichlet(
    labels: NDArray[np.integer], devices: int, alpha: float, rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    for _ in range(RETRIES):
        owner = _draw_owners(labels, devices, alpha, rng)
        if np.bincount(owner, minlength=devices).min() >= MINIMUM:
            break
    else:
        _repair(owner, devices, rng)
    return [np.flatnonzero(owner == device) for device in range(devices)]


def _draw_owners(
    labels: NDArray[np.integer], devices: int, alpha: float, rng: np.random.Generator
) -> NDArray[np.int64]:
    owner = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        shares = np.cumsum(rng.dirichlet(np.full(devices, alpha)))[:-1]
        bounds = np.rint(shares * len(rows)).astype(np.int64)
        for device, part in enumerate(np.split(rows, bounds)):
            owner[part] = device
    return owner


def _repair(owner: NDArray[np.int64], devices: int, rng: np.random.Generator) -> None:
    """Give each device that has too few what it lacks, from whichever has the most."""
    for device in range(devices):
        counts = np.bincount(owner, minlength=devices)
        while counts[device] < MINIMUM:
            richest = int(counts.argmax())
            owner[rng.choice(np.flatnonzero(owner == richest))] = device
            counts = np.bincount(owner, minlength=devices)


def _lists(path: Path, samples: int, devices: int) -> list[NDArray[np.int64]]:
    try:
        lists = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise DataError(f"{path} cannot be read as JSON (nested too deeply)") from None
    except (OSError, ValueError) as exc:
        raise DataError(f"{path} cannot be read as JSON ({exc})") from exc
    if not isinstance(lists, list) or not all(isinstance(part, list) for part in lists):
        raise DataError(f"{path}: must be a list of lists of indices, one per device")
    if len(lists) != devices:
        raise DataError(f"{path} has {len(lists)} lists: {devices} devices need one each")
    seen: set[int] = set()
    for device, part in enumerate(lists):
        if not part:
            raise DataError(f"{path}: list {device} is empty; give every device some samples")
        _check_indices(path, device, part, samples, seen)
    return [np.sort(np.array(part, np.int64)) for part in lists]


def _check_indices(
    path: Path, device: int, part: Sequence[object], samples: int, seen: set[int]
) -> None:
    for index in part:
        if type(index) is not int or not 0 <= index < samples:
            raise DataError(
                f"{path}: list {device} holds {index!r}; allowed are whole numbers "
                f"from 0 to {samples - 1}"
            )
        if index in seen:
            raise DataError(f"{path}: list {device} holds {index}, which is already taken")
        seen.add(index)
