from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.aggregation import Model
from coordinator.errors import StoreError
from coordinator.store import Checkpoint, Store
from tests.tiny import assert_same


def make_checkpoint(version: int) -> Checkpoint:
    state = {
        "blocks.0.weight": np.full((2, 3), version, np.float32),
        "blocks.0.num_batches_tracked": np.array(version),
        "blocks.1.weight": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    }
    return Checkpoint(
        version=version,
        round=version + 1,
        model=Model(state, {"blocks.0.weight": np.ones((2, 3), np.float32)}),
        trained_cuts=[2, 5],
        history=[{"round": 1, "loss": 0.5}],
        registry=[{"name": "a", "cut": 2, "hello": None, "rounds": 1, "samples": 8}],
        traffic={"up/activation/a": 100},
        residual={"blocks.0.weight": np.full((2, 3), 0.1, np.float32).T.copy().T},
    )


def make_store(root: Path, *versions: int, keep: int = 3) -> Store:
    store = Store(root, keep=keep)
    store.create("run", {"seed": 0})
    for version in versions:
        store.save(make_checkpoint(version))
    return store


def reopened(root: Path) -> Store:
    store = Store(root)
    assert store.current() is not None
    return store


def folders(store: Store) -> list[str]:
    return sorted(path.name for path in (store.folder / "checkpoints").iterdir())


def full_disk(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_checkpoint_comes_back_whole(tmp_path: Path) -> None:
    make_store(tmp_path, 0, 1)
    found, expected = reopened(tmp_path).latest(), make_checkpoint(1)
    assert found is not None
    assert_same(found.model.state, expected.model.state)
    assert_same(found.model.momentum, expected.model.momentum)
    assert_same(found.residual, expected.residual)
    for name, values in expected.model.state.items():
        assert found.model.state[name].dtype == values.dtype
    for key in ("version", "round", "trained_cuts", "history", "registry", "traffic"):
        assert getattr(found, key) == getattr(expected, key)


def test_a_checkpoint_of_a_run_whose_parameters_go_whole_has_no_residual(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(0)
    checkpoint.residual = {}
    store = make_store(tmp_path)
    store.save(checkpoint)
    assert not list((store.folder / "checkpoints").glob("*/residual*"))
    found = reopened(tmp_path).latest()
    assert found is not None
    assert found.residual == {}


def test_the_run_to_resume(tmp_path: Path) -> None:
    assert Store(tmp_path / "new").current() is None
    make_store(tmp_path)
    assert Store(tmp_path).current() == ("run", {"seed": 0})
    second = Store(tmp_path)
    second.create("second", {"seed": 1})
    assert Store(tmp_path).current() == ("second", {"seed": 1})
    assert (tmp_path / "run" / "run.json").exists(), "earlier runs stay"


def test_the_last_few_are_kept(tmp_path: Path) -> None:
    store = make_store(tmp_path, *range(12), keep=3)
    assert folders(store) == ["000009", "000010", "000011"]


def test_what_a_killed_writer_left_is_passed_over_and_removed(tmp_path: Path) -> None:
    store = make_store(tmp_path, 0)
    leftover = store.folder / "checkpoints" / ".writing-xyz"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    found = reopened(tmp_path).latest()
    assert found is not None
    assert found.version == 0
    store.save(make_checkpoint(1))
    assert folders(store) == ["000000", "000001"]


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def remove(path: Path) -> None:
    path.unlink()


def without_its_fields(path: Path) -> None:
    path.write_text('{"format": 1}')


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *[
            (name, damage)
            for name in ("model.safetensors", "momentum.safetensors", "residual.safetensors")
            for damage in (cut_short, empty, flip_a_bit, remove)
        ],
        *[("manifest.json", damage) for damage in (cut_short, empty, remove, without_its_fields)],
    ],
)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    store = make_store(tmp_path, 0, 1, 2)
    before = reopened(tmp_path).latest()
    assert before is not None
    damage(store.folder / "checkpoints" / "000002" / name)
    found = reopened(tmp_path).latest()
    assert found is not None
    assert found.round == before.round - 1
    # A device may hold the damaged version 2, so that number never means other weights.
    assert found.version == 3


def test_a_damaged_checkpoint_is_replaced_by_its_repetition(tmp_path: Path) -> None:
    store = make_store(tmp_path, 0, 1)
    empty(store.folder / "checkpoints" / "000001" / "model.safetensors")
    store.save(make_checkpoint(1))
    found = reopened(tmp_path).latest()
    assert found is not None
    assert found.version == 1


def test_when_no_checkpoint_is_whole_the_run_is_not_silently_started_over(tmp_path: Path) -> None:
    store = make_store(tmp_path, 0, 1)
    for folder in ("000000", "000001"):
        empty(store.folder / "checkpoints" / folder / "model.safetensors")
    with pytest.raises(StoreError, match="--fresh"):
        reopened(tmp_path).latest()


def test_a_run_that_was_killed_before_its_first_checkpoint_has_none(tmp_path: Path) -> None:
    make_store(tmp_path)
    assert reopened(tmp_path).latest() is None


def test_a_format_of_the_future_is_not_read(tmp_path: Path) -> None:
    store = make_store(tmp_path, 0)
    path = store.folder / "checkpoints" / "000000" / "manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(StoreError):
        reopened(tmp_path).latest()


@pytest.mark.parametrize("where", ["fsync", "rename"])
def test_a_full_disk_says_what_to_do_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    store = make_store(tmp_path, 0)
    with monkeypatch.context() as broken:
        if where == "fsync":
            broken.setattr(os, "fsync", full_disk)
        else:
            broken.setattr(Path, "rename", full_disk)
        with pytest.raises(StoreError, match=r"No space left.*free space"):
            store.save(make_checkpoint(1))
    assert folders(store) == ["000000"], "and no half-written folder"
    found = reopened(tmp_path).latest()
    assert found is not None
    assert found.version == 0


def test_an_attempt_is_remembered(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    assert store.announced() == (0, 0)
    store.announce(3, 2)
    assert reopened(tmp_path).announced() == (3, 2)


def test_a_full_disk_keeps_the_attempt_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path)
    store.announce(3, 2)
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full_disk)
        with pytest.raises(StoreError):
            store.announce(3, 3)
    assert reopened(tmp_path).announced() == (3, 2)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"round": "x", "attempt": 1}', "{}"])
def test_a_damaged_attempt_is_named(tmp_path: Path, content: str) -> None:
    store = make_store(tmp_path)
    (store.folder / "attempt.json").write_text(content)
    with pytest.raises(StoreError, match=r"attempt\.json"):
        reopened(tmp_path).announced()


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_damaged_settings_are_named(tmp_path: Path, content: str) -> None:
    store = make_store(tmp_path)
    (store.folder / "run.json").write_text(content)
    with pytest.raises(StoreError, match=r"run\.json"):
        Store(tmp_path).current()


def test_a_pointer_to_a_run_that_is_gone(tmp_path: Path) -> None:
    make_store(tmp_path)
    (tmp_path / "current").write_text("gone")
    with pytest.raises(StoreError, match="gone"):
        Store(tmp_path).current()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="choose another folder"):
        Store(tmp_path / "file" / "state")
