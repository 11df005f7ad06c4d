from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from edge_agent.data import load_device_data
from edge_agent.settings import AgentSettings
from tensors.batches import normalise
from tensors.errors import DataError
from tensors.image_packs import write_packed
from tests.tiny import make_assignment, make_dataset, make_device_data


def settings(share: int = 0, shares: int = 3, **changes: object) -> AgentSettings:
    fields: dict[str, object] = {"device": f"d{share}", "share": share, "shares": shares}
    return AgentSettings.model_validate(fields | changes)


def test_the_shares_of_all_devices_are_the_whole_data_set() -> None:
    devices = [load_device_data(settings(share)) for share in range(3)]
    train, test = devices[0].train, devices[0].test
    assert test is not None
    for rows, whole in (
        (np.concatenate([d.train_rows for d in devices]), train),
        (np.concatenate([d.test_rows for d in devices]), test),
    ):
        np.testing.assert_array_equal(np.sort(rows), np.arange(len(whole)))
    assert devices[0].image == (1, 28, 28)


def test_another_partition_seed_is_another_partition() -> None:
    one, other = (load_device_data(settings(partition_seed=seed)) for seed in (0, 1))
    assert not np.array_equal(one.train_rows, other.train_rows)


def test_a_folder_without_a_test_split_is_enough(tmp_path: Path) -> None:
    write_packed(
        tmp_path / "cifar10-train.npz",
        np.zeros((30, 32, 32, 3), np.uint8),
        np.arange(30, dtype=np.int64) % 10,
        tuple("abcdefghij"),
        images_per_strip=30,
    )
    data = load_device_data(settings(dataset="cifar10", data_root=tmp_path))
    assert len(data.train_rows) == 10
    assert data.test is None
    assert data.test_batches(4) == []


def test_no_data_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="download"):
        load_device_data(settings(dataset="cifar10", data_root=tmp_path))


def test_training_batches_are_those_of_the_assignment() -> None:
    data = make_device_data(20)
    stream = data.stream(make_assignment(batch_size=5, seed=3), "d1")
    images, labels = stream.batch(2)
    assert images.shape == (5, 1, 8, 8)
    assert labels.shape == (5,)
    again, _ = data.stream(make_assignment(batch_size=5, seed=3), "d1").batch(2)
    np.testing.assert_array_equal(images, again)
    for seed, device in ((4, "d1"), (3, "d2")):
        other, _ = data.stream(make_assignment(batch_size=5, seed=seed), device).batch(2)
        assert not np.array_equal(images, other)


def test_test_batches_are_every_test_image_once_and_normalised() -> None:
    data = make_device_data(tests=10)
    assert data.test is not None
    batches = data.test_batches(4)
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    expected = make_dataset(10, seed=1000)
    np.testing.assert_array_equal(
        np.concatenate([images for images, _ in batches]),
        normalise(expected.images, expected.mean, expected.std),
    )
    np.testing.assert_array_equal(np.concatenate([ls for _, ls in batches]), expected.labels)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"device": "coordinator"}, "reserved"),
        ({"device": "a/b"}, "not allowed"),
        ({"share": 3}, "share 3 of 3"),
        ({"cut": 0}, "cut"),
        ({"cut": "deep"}, "auto"),
        ({"partitoin": "iid"}, "partitoin"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        settings(**changes)  # type: ignore[arg-type]
