from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tensors.errors import DataError
from tensors.partition import MINIMUM, partition

LABELS = np.arange(2000) % 10


def shares(parts: list[NDArray[np.int64]]) -> NDArray[np.float64]:
    """Each device's distribution over the classes: (devices, 10)."""
    counts = np.array([np.bincount(LABELS[part], minlength=10) for part in parts])
    total: NDArray[np.float64] = counts.sum(axis=1, keepdims=True, dtype=np.float64)
    return counts / total


@given(
    devices=st.integers(1, 20),
    how=st.sampled_from(["iid", "dirichlet:0.01", "dirichlet:0.5", "dirichlet:1000"]),
    seed=st.integers(0, 2**64),
)
def test_every_sample_has_exactly_one_device(devices: int, how: str, seed: int) -> None:
    parts = partition(LABELS, devices, how, seed)
    assert len(parts) == devices
    assert sorted(np.concatenate(parts)) == list(range(len(LABELS)))
    assert all((np.diff(part) > 0).all() for part in parts)
    assert all(part.dtype == np.int64 for part in parts)


def test_iid_sizes_differ_by_at_most_one() -> None:
    sizes = [len(part) for part in partition(LABELS, 7, "iid", 0)]
    assert max(sizes) - min(sizes) <= 1


def test_iid_gives_every_device_every_class() -> None:
    assert shares(partition(LABELS, 4, "iid", 0)).min() > 0.04


@given(seed=st.integers(0, 1000))
def test_dirichlet_gives_every_device_enough_even_where_it_must_be_repaired(seed: int) -> None:
    parts = partition(LABELS[: 20 * MINIMUM], 20, "dirichlet:0.01", seed)
    assert [len(part) for part in parts] == [MINIMUM] * 20


def test_smaller_alpha_is_more_uneven() -> None:
    spread = [
        shares(partition(LABELS, 8, f"dirichlet:{alpha}", 1)).std(axis=0).mean()
        for alpha in (0.1, 1, 100)
    ]
    assert spread[0] > 1.5 * spread[1] > 3 * spread[2]


@pytest.mark.parametrize("how", ["iid", "dirichlet:0.5"])
def test_seed_decides(how: str) -> None:
    first, again, other = (partition(LABELS, 3, how, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_lists_are_taken_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "lists.json"
    file.write_text("[[3, 1], [1999], [0, 7]]")
    parts = partition(LABELS, 3, f"lists:{file}", 0)
    assert [part.tolist() for part in parts] == [[1, 3], [1999], [0, 7]]


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ([[1], [2], [3]], "has 3 lists: 2 devices"),
        ([[1], []], "list 1 is empty"),
        ([[1], [2000]], "list 1 holds 2000; allowed are whole numbers from 0 to 1999"),
        ([[1], [-1]], "list 1 holds -1"),
        ([[1], [2.0]], r"list 1 holds 2\.0"),
        ([[1], [True]], "list 1 holds True"),
        ([[1], [2, 1]], "list 1 holds 1, which is already taken"),
        ([[1], 2], "must be a list of lists"),
        ({"a": [1]}, "must be a list of lists"),
    ],
)
def test_lists_that_do_not_fit_are_refused(tmp_path: Path, lists: object, message: str) -> None:
    file = tmp_path / "lists.json"
    file.write_text(json.dumps(lists))
    with pytest.raises(DataError, match=message):
        partition(LABELS, 2, f"lists:{file}", 0)


@pytest.mark.parametrize("content", [None, "[[1], [2", "\udcff", 99_999 * "["])
def test_a_list_file_that_cannot_be_read_is_named(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "lists.json"
    if content is not None:
        file.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=r"lists\.json cannot be read as JSON"):
        partition(LABELS, 2, f"lists:{file}", 0)


@pytest.mark.parametrize("how", ["", "IID", "iid:3", "lists", "lists:", "shards:2"])
def test_unknown_methods_are_refused(how: str) -> None:
    with pytest.raises(DataError, match="allowed are iid, dirichlet:ALPHA and lists:FILE"):
        partition(LABELS, 2, how, 0)


@pytest.mark.parametrize("alpha", ["", "x", "0", "-1", "nan", "inf", "1e-300"])
def test_alpha_must_be_a_sensible_number(alpha: str) -> None:
    with pytest.raises(DataError, match="ALPHA must be a number"):
        partition(LABELS, 2, f"dirichlet:{alpha}", 0)


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(DataError, match="39 samples are too few for 4 devices of at least 10"):
        partition(LABELS[:39], 4, "dirichlet:1", 0)
    with pytest.raises(DataError, match="3 samples are too few for 4 devices"):
        partition(LABELS[:3], 4, "iid", 0)


def test_impossible_numbers_are_refused() -> None:
    with pytest.raises(DataError, match="devices 0"):
        partition(LABELS, 0, "iid", 0)
    with pytest.raises(DataError, match="seed -1"):
        partition(LABELS, 2, "iid", -1)
