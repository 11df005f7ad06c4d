from __future__ import annotations

import errno
import json
import math
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.aggregation import Model
from coordinator.checkpoint import Checkpoint
from coordinator.errors import StoreError
from coordinator.store import Store
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
        model=Model(
            state,
            {"blocks.0.weight": np.ones((2, 3), np.float32)},
            {"blocks.0.weight": np.full((2, 3), version, np.float32)},
        ),
        trained_cuts=[2, 5],
        history=[{"round": 1, "loss": 0.5}],
        registry=[{"name": "a", "cut": 2, "hello": None, "rounds": 1, "samples": 8}],
        traffic={"up/activation/a": 100},
        residual={"blocks.0.weight": np.full((2, 3), 0.1, np.float32).T.copy().T},
        scheduler={"deadline_s": {"2": 0.1}, "random": [3, [1, 2]]},
        score=0.25,
    )


def make_store(root: Path, *checkpoints: int | Checkpoint, keep: int = 3) -> Store:
    """A run with checkpoints, given whole or by their version."""
    store = Store(root, keep=keep)
    first, *others = [
        make_checkpoint(given) if isinstance(given, int) else given for given in checkpoints or (0,)
    ]
    store.create("run", {"seed": 0}, first)
    for checkpoint in others:
        store.save(checkpoint)
    return store


def enumerated(scores: list[float | None]) -> list[Checkpoint]:
    """Checkpoints of versions 0, 1, … with these scores."""
    made = [make_checkpoint(version) for version in range(len(scores))]
    for checkpoint, score in zip(made, scores, strict=True):
        checkpoint.score = score
    return made


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
    assert_same(found.model.velocity, expected.model.velocity)
    for name, values in expected.model.state.items():
        assert found.model.state[name].dtype == values.dtype
    for key in (
        *("version", "round", "trained_cuts", "history", "registry", "traffic"),
        *("scheduler", "score"),
    ):
        assert getattr(found, key) == getattr(expected, key)


def test_a_checkpoint_of_a_run_whose_parameters_go_whole_has_no_residual(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(1)
    checkpoint.residual = {}
    store = make_store(tmp_path)
    store.save(checkpoint)
    assert not list((store.folder / "checkpoints" / "000001").glob("residual*"))
    found = reopened(tmp_path).latest()
    assert found is not None
    assert found.residual == {}


def test_the_run_to_resume(tmp_path: Path) -> None:
    assert Store(tmp_path / "new").current() is None
    make_store(tmp_path)
    assert Store(tmp_path).current() == ("run", {"seed": 0})
    second = Store(tmp_path)
    second.create("second", {"seed": 1}, make_checkpoint(0))
    assert Store(tmp_path).current() == ("second", {"seed": 1})
    assert (tmp_path / "run" / "run.json").exists(), "earlier runs stay"


def test_a_checkpoint_by_its_version(tmp_path: Path) -> None:
    store = make_store(tmp_path, *range(6), keep=3)
    assert store.versions() == [3, 4, 5]
    found = store.at(4)
    assert found is not None
    assert found.version == 4
    assert_same(found.model.state, make_checkpoint(4).model.state)
    assert store.at(2) is None


def test_a_damaged_version_is_said_and_one_without_manifest_not_offered(tmp_path: Path) -> None:
    store = make_store(tmp_path, *range(3))
    parent = store.folder / "checkpoints"
    (parent / "000000" / "manifest.json").write_bytes(b"rubbish")
    (parent / "000001" / "model.safetensors").write_bytes(b"rubbish")
    assert store.versions() == [1, 2]
    assert store.at(0) is None
    with pytest.raises(StoreError, match="checksum"):
        store.at(1)


def test_the_last_few_are_kept(tmp_path: Path) -> None:
    store = make_store(tmp_path, *range(12), keep=3)
    assert folders(store) == ["000009", "000010", "000011"]


@pytest.mark.parametrize(
    ("scores", "best", "kept"),
    [
        ([0.1, 0.9, 0.5, 0.6, 0.7], 1, [1, 3, 4]),
        ([0.1, 0.9, 0.5, 0.9, 0.7, 0.8], 3, [3, 4, 5]),
        ([0.1, 0.9, None, 0.9, None], 3, [3, 4]),
        ([0.1, math.nan, math.inf, 0.05, None], 0, [0, 3, 4]),
        ([None, None, None, None], None, [2, 3]),
    ],
)
def test_the_last_few_and_the_best_are_kept(
    tmp_path: Path, scores: list[float | None], best: int | None, kept: list[int]
) -> None:
    """Of equals the newest is the best; what is no number is no score."""
    store = make_store(tmp_path, *enumerated(scores), keep=2)
    for found in (store.best(), reopened(tmp_path).best()):
        assert (None if found is None else found.version) == best
    assert folders(store) == [f"{version:06d}" for version in kept]


def test_when_the_best_is_damaged_the_next_best_is_taken(tmp_path: Path) -> None:
    store = make_store(tmp_path, *enumerated([0.3, 0.9, 0.5]))
    empty(store.folder / "checkpoints" / "000001" / "momentum.safetensors")
    found = reopened(tmp_path).best()
    assert found is not None
    assert (found.version, found.score) == (2, 0.5)


def test_checkpoints_are_told_apart_by_number_not_by_name(tmp_path: Path) -> None:
    store = make_store(tmp_path, 999_998, 999_999, 1_000_000, keep=2)
    assert folders(store) == ["1000000", "999999"]
    found = reopened(tmp_path).latest()
    assert found is not None
    assert found.version == 1_000_000


def test_what_a_person_put_beside_the_checkpoints_is_left_alone(tmp_path: Path) -> None:
    store = make_store(tmp_path, 0)
    shutil.copytree(store.folder / "checkpoints" / "000000", store.folder / "checkpoints" / "0-old")
    for version in range(1, 5):
        store.save(make_checkpoint(version))
    assert folders(store) == ["0-old", "000002", "000003", "000004"]


def test_a_checkpoint_of_an_older_version_still_loads(tmp_path: Path) -> None:
    """Without a score, a scheduler's state and a checksum of the manifest."""
    store = make_store(tmp_path, 0)
    path = store.folder / "checkpoints" / "000000" / "manifest.json"
    manifest = json.loads(path.read_bytes())
    for key in ("score", "scheduler", "checksum"):
        del manifest[key]
    path.write_text(json.dumps(manifest, indent=1))
    store = reopened(tmp_path)
    found = store.latest()
    assert found is not None
    assert (found.version, found.round, found.scheduler, found.score) == (0, 1, {}, None)
    assert store.best() is None
    store.save(make_checkpoint(1))
    assert folders(store) == ["000000", "000001"]


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
            for name in (
                *("model.safetensors", "momentum.safetensors"),
                *("residual.safetensors", "velocity.safetensors"),
            )
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


def test_a_damaged_checkpoint_gives_way_to_its_repetition(tmp_path: Path) -> None:
    store = make_store(tmp_path, 0, 1)
    empty(store.folder / "checkpoints" / "000001" / "model.safetensors")
    store.save(make_checkpoint(1))
    found = reopened(tmp_path).latest()
    assert found is not None
    assert found.version == 1


def test_damaged_checkpoints_do_not_count_among_those_kept(tmp_path: Path) -> None:
    store = make_store(tmp_path, 0, 1, 2, 3, keep=3)
    for folder in ("000002", "000003"):
        empty(store.folder / "checkpoints" / folder / "model.safetensors")
    store = reopened(tmp_path)
    assert store.latest() is not None
    store.save(make_checkpoint(5))
    assert folders(store) == ["000001", "000005"]


def test_every_byte_of_a_manifest_is_verified(tmp_path: Path) -> None:
    store = make_store(tmp_path, 0, 1)
    path = store.folder / "checkpoints" / "000001" / "manifest.json"
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        found = reopened(tmp_path).latest()
        assert found is not None
        as_saved = found.version == 1
        assert found.round == 1 + as_saved
        assert as_saved or found.version == 2, "the fallback has a number of its own"
        assert found.history == [{"round": 1, "loss": 0.5}]


def test_when_no_checkpoint_is_whole_the_run_is_not_silently_started_over(tmp_path: Path) -> None:
    store = make_store(tmp_path, 0, 1)
    for folder in ("000000", "000001"):
        empty(store.folder / "checkpoints" / folder / "model.safetensors")
    with pytest.raises(StoreError, match="--fresh"):
        reopened(tmp_path).latest()


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    shutil.rmtree(store.folder / "checkpoints")
    assert reopened(tmp_path).latest() is None
    assert reopened(tmp_path).best() is None


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
    with pytest.raises(StoreError, match=r"attempt\.json.*--fresh"):
        reopened(tmp_path).announced()


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_damaged_settings_are_named(tmp_path: Path, content: str) -> None:
    store = make_store(tmp_path)
    (store.folder / "run.json").write_text(content)
    with pytest.raises(StoreError, match=r"run\.json.*--fresh"):
        Store(tmp_path).current()


@pytest.mark.parametrize("content", [b"gone", b"", b"\n", b"\xff\xfe", b"current", b"a\0b"])
def test_a_pointer_to_a_run_that_is_not_there(tmp_path: Path, content: bytes) -> None:
    make_store(tmp_path)
    (tmp_path / "current").write_bytes(content)
    with pytest.raises(StoreError, match=r"current.*--fresh"):
        Store(tmp_path).current()


def test_a_file_system_that_cannot_sync_folders_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    make_store(tmp_path / "new", 0, 1)
    found = reopened(tmp_path / "new").latest()
    assert found is not None
    assert found.version == 1


def test_old_checkpoints_that_cannot_be_removed_do_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path, 0, 1, keep=2)
    with monkeypatch.context() as broken:
        broken.setattr(os, "rmdir", full_disk)
        store.save(make_checkpoint(2))
    store.save(make_checkpoint(3))
    assert folders(store) == ["000002", "000003"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="choose another folder"):
        Store(tmp_path / "file" / "state")
