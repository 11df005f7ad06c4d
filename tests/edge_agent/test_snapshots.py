from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from edge_agent.errors import StateError
from edge_agent.learner import TorchLearner
from edge_agent.snapshots import DiskSnapshots, Snapshot
from edge_agent.trainer import DeviceTrainer
from tensors.networks import build_network
from tests.crashing_disk import Disk, Failure, Killed, full_at, killed_at, power_cuts, write_tree
from tests.tiny import CPU, SPEC, assert_same, make_batch

SNAPSHOT = Snapshot(
    {"blocks.0.weight": np.arange(6, dtype=np.float32), "blocks.0.count": np.array(3)},
    {"blocks.0.weight": np.ones(6, np.float32)},
    {"blocks.0.weight": np.full(6, 0.5, np.float32)},
)


def full_disk(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def make_learner(seed: int) -> TorchLearner:
    half = build_network(SPEC, seed=seed).device_half(2)
    trainer = DeviceTrainer(
        half, CPU, exit_weight=1.0, feedback_weight=1.0, momentum=0.9, weight_decay=0.0
    )
    trainer.set_learning_rate(0.1)
    return TorchLearner(half, CPU, trainer)


def learn(learner: TorchLearner, *batches: int) -> None:
    for batch in batches:
        learner.forward(batch, *make_batch(seed=batch))
        learner.backward(batch, None)


def test_what_was_saved_is_there_after_a_restart(tmp_path: Path) -> None:
    DiskSnapshots(tmp_path / "new" / "folder").save("run", 2, 5, SNAPSHOT)
    found = DiskSnapshots(tmp_path / "new" / "folder").load("run", 2)
    assert found is not None
    version, snapshot = found
    assert version == 5
    assert_same(snapshot.state, SNAPSHOT.state)
    assert_same(snapshot.momentum, SNAPSHOT.momentum)
    assert_same(snapshot.residual, SNAPSHOT.residual)


def test_a_returning_device_learns_on_as_if_it_had_not_been_away(tmp_path: Path) -> None:
    """The momentum is kept too: without it the next steps would be others."""
    stayed, store = make_learner(0), DiskSnapshots(tmp_path)
    learn(stayed, 0, 1)
    stayed.load(stayed.state())
    store.save("run", 2, 1, stayed.start)
    returned = make_learner(9)
    found = store.load("run", 2)
    assert found is not None
    returned.restore(found[1])
    for learner in (stayed, returned):
        learner.set_learning_rate(0.1)
        learn(learner, 2, 3)
    assert_same(returned.state(), stayed.state())


def test_rewinding_returns_to_the_parameters_last_loaded(tmp_path: Path) -> None:
    learner = make_learner(0)
    learn(learner, 0)
    learner.load(learner.state())
    start = learner.state()
    learn(learner, 1)
    first = learner.state()
    learner.forward(5, *make_batch())
    learner.rewind()
    assert_same(learner.state(), start)
    learn(learner, 1)
    assert_same(learner.state(), first)


def test_offloads_are_answered_with_the_parameters_of_the_last_closed_round() -> None:
    learner = make_learner(0)
    images, _ = make_batch()
    before, _ = learner.predictor().predict(images)
    learn(learner, 0, 1)
    after, _ = learner.predictor().predict(images)
    np.testing.assert_array_equal(after.numpy(), before.numpy())


def test_nothing_was_saved(tmp_path: Path) -> None:
    assert DiskSnapshots(tmp_path).load("run", 2) is None


def test_the_snapshot_of_another_run_or_cut_is_not_taken(tmp_path: Path) -> None:
    store = DiskSnapshots(tmp_path)
    store.save("run", 2, 5, SNAPSHOT)
    assert store.load("other", 2) is None
    assert store.load("run", 3) is None


@pytest.mark.parametrize("keep", [0, 7, 40])
def test_a_damaged_file_is_told_apart_from_none(tmp_path: Path, keep: int) -> None:
    store = DiskSnapshots(tmp_path)
    store.save("run", 2, 5, SNAPSHOT)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(StateError, match="snapshot"):
        store.load("run", 2)


def test_a_full_disk_leaves_the_last_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DiskSnapshots(tmp_path)
    store.save("run", 2, 5, SNAPSHOT)
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(StateError, match="free some space"):
        store.save("run", 2, 6, SNAPSHOT)
    monkeypatch.undo()
    found = store.load("run", 2)
    assert found is not None
    assert found[0] == 5


def make_snapshot(version: int) -> Snapshot:
    values = {"blocks.0.weight": np.full(6, version, np.float32)}
    return Snapshot(values, values, values if version % 2 else {})


def kept_version(base: Path) -> int | None:
    """The version a restarted device finds, with the values that belong to it."""
    found = DiskSnapshots(base / "var" / "agent").load("run", 2)
    if found is None:
        return None
    version, snapshot = found
    expected = make_snapshot(version)
    assert_same(snapshot.state, expected.state)
    assert_same(snapshot.momentum, expected.momentum)
    assert_same(snapshot.residual, expected.residual)
    return version


def save_versions(base: Path, versions: range, disk: Disk) -> None:
    with disk.watched():
        store = DiskSnapshots(base / "var" / "agent")
        for version in versions:
            store.save("run", 2, version, make_snapshot(version))
            disk.done(version)


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (killed_at, Killed),
        (partial(full_at, for_good=False), StateError),
        (partial(full_at, for_good=True), StateError),
    ],
)
def test_a_kill_or_a_full_disk_at_any_operation_leaves_the_old_or_the_new(
    tmp_path: Path, failure: Callable[[int], Failure], error: type[BaseException]
) -> None:
    for number in itertools.count():
        base = tmp_path / f"{number}"
        base.mkdir()
        disk = Disk(base, failure(number))
        try:
            save_versions(base, range(3), disk)
        except error:
            done = sum(operation.kind == "done" for operation in disk.operations)
            assert kept_version(base) in [None, 0, 1, 2][done : done + 2]
        else:
            break
        save_versions(base, range(3, 4), Disk(base))
        assert kept_version(base) == 3
        assert [path.name for path in base.rglob("*.*")] == ["snapshot.safetensors"]
    assert number == disk.count


def test_a_power_cut_at_any_operation_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    base = tmp_path / "calm"
    base.mkdir()
    disk = Disk(base)
    save_versions(base, range(4), disk)
    for number, (done, tree) in enumerate(power_cuts(base, disk.operations)):
        write_tree(tmp_path / f"{number}", tree)
        assert kept_version(tmp_path / f"{number}") in [None, 0, 1, 2, 3][done : done + 2]
    assert number > 15


def test_every_byte_is_verified(tmp_path: Path) -> None:
    store = DiskSnapshots(tmp_path)
    store.save("run", 2, 5, make_snapshot(5))
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        try:
            found = store.load("run", 2)
        except StateError:
            continue
        if found is not None:
            version, snapshot = found
            assert version == 5
            assert_same(snapshot.state, make_snapshot(5).state)
            assert_same(snapshot.momentum, make_snapshot(5).momentum)
            assert_same(snapshot.residual, make_snapshot(5).residual)


def test_a_snapshot_of_an_older_version_still_loads(tmp_path: Path) -> None:
    """Without a checksum."""
    tensors = {"state/a": np.ones(2, np.float32), "momentum/a": np.zeros(2, np.float32)}
    metadata = {"run": "run", "cut": "2", "version": "7"}
    (tmp_path / "snapshot.safetensors").write_bytes(save(tensors, metadata))
    found = DiskSnapshots(tmp_path).load("run", 2)
    assert found is not None
    version, snapshot = found
    assert version == 7
    assert_same(snapshot.state, {"a": tensors["state/a"]})


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="state folder"):
        DiskSnapshots(tmp_path / "file" / "folder")
