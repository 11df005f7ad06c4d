"""The coordinator's files after a kill, a power cut and a full disk at every single operation."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from coordinator.aggregation import Model
from coordinator.checkpoint import Checkpoint
from coordinator.errors import StoreError
from coordinator.store import Store
from tests.crashing_disk import Disk, Failure, Killed, full_at, killed_at, power_cuts, write_tree

Step = Callable[[Store], None]
Outcome = tuple[object, ...]
KEEP = 2
SCORES = {0: None, 1: 0.9, 2: 0.5, 3: 0.5, 4: 0.9, 5: 0.2}


def make_checkpoint(version: int) -> Checkpoint:
    weights = {"blocks.0.weight": np.full(4, version, np.float32)}
    return Checkpoint(
        version=version,
        round=version,
        model=Model(weights, {name: -values for name, values in weights.items()}),
        residual=weights if version % 2 else {},
        scheduler={"deadline": version / 3},
        score=SCORES[version],
    )


def create(run: str, version: int = 0) -> Step:
    return lambda store: store.create(run, {"name": run}, make_checkpoint(version))


def announce(round_number: int, attempt: int) -> Step:
    return lambda store: store.announce(round_number, attempt)


def save(version: int) -> Step:
    return lambda store: store.save(make_checkpoint(version))


def save_result(store: Store) -> None:
    store.save_result({"rounds": 4})


PROGRAM: Sequence[Step] = (
    create("first"),
    announce(1, 0),
    save(1),
    announce(2, 0),
    announce(2, 1),
    save(2),
    announce(3, 0),
    save(3),
    announce(4, 0),
    save(4),
    save(4),
    save_result,
    create("second", 3),
    announce(1, 0),
)
"""A run of four rounds, the last of them saved twice, and the start of another."""


def root_in(base: Path) -> Path:
    return base / "var" / "state"


def outcome(base: Path) -> Outcome:
    """All a new process finds; whatever has the name of a checkpoint is a whole one."""
    store = Store(root_in(base), keep=KEEP)
    current = store.current()
    if current is None:
        return (None,)
    for folder in (store.folder / "checkpoints").glob("[0-9]*"):
        digests = json.loads((folder / "manifest.json").read_bytes())["sha256"]
        for name, digest in digests.items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    latest, best = store.latest(), store.best()
    assert latest is not None
    result = store.folder / "result.json"
    return (
        current,
        meaning(latest),
        None if best is None else meaning(best),
        store.announced(),
        json.loads(result.read_bytes()) if result.exists() else None,
    )


def meaning(checkpoint: Checkpoint) -> tuple[int, float | None]:
    """Version and score of a checkpoint that is no mixture of several."""
    expected = make_checkpoint(checkpoint.version)
    assert checkpoint.round == expected.round
    assert checkpoint.scheduler == expected.scheduler
    assert checkpoint.score == expected.score
    for found, wanted in (
        (checkpoint.model.state, expected.model.state),
        (checkpoint.model.momentum, expected.model.momentum),
        (checkpoint.residual, expected.residual),
    ):
        assert found.keys() == wanted.keys()
        for name, values in wanted.items():
            np.testing.assert_array_equal(found[name], values)
    return checkpoint.version, checkpoint.score


def reopened(base: Path) -> Store:
    store = Store(root_in(base), keep=KEEP)
    if store.current() is not None:
        store.latest()
    return store


@dataclass(frozen=True)
class Calm:
    """An undisturbed run: what there is, and what a new process finds, before and after each step.

    The first entry is the one before the first step.
    """

    base: Path
    disk: Disk
    copies: Sequence[Path]
    outcomes: Sequence[Outcome]


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Calm:
    folder = tmp_path_factory.mktemp("calm")
    base, copies = folder / "base", [folder / f"{step}" for step in range(len(PROGRAM) + 1)]
    base.mkdir()
    shutil.copytree(base, copies[0])
    disk = Disk(base)
    outcomes: list[Outcome] = [(None,)]
    for number, step in enumerate(PROGRAM):
        with disk.watched():
            step(reopened(base))
            disk.done(number)
        shutil.copytree(base, copies[number + 1])
        outcomes.append(outcome(base))
    return Calm(base, disk, copies, outcomes)


def interrupted_steps(
    calm: Calm, base: Path, failure: Callable[[int], Failure]
) -> Iterator[BaseException | None]:
    """Does each step with a failure at its first operation, at its second, and so on.

    Afterwards it has happened or has not, and then it can be done. Yields what it raised.
    """
    for step, (before, after) in enumerate(itertools.pairwise(calm.outcomes)):
        for number in itertools.count():
            shutil.copytree(calm.copies[step], base)
            disk = Disk(base, failure(number))
            error = None
            try:
                with disk.watched():
                    PROGRAM[step](reopened(base))
            except (Killed, StoreError) as exc:
                error = exc
            found = outcome(base)
            assert found == after or (error is not None and found == before), (step, number)
            if found != after:
                PROGRAM[step](reopened(base))
                assert outcome(base) == after, (step, number)
            shutil.rmtree(base)
            if number >= disk.count:
                break
            yield error


def test_a_kill_at_any_operation_leaves_the_old_or_the_new(tmp_path: Path, calm: Calm) -> None:
    errors = list(interrupted_steps(calm, tmp_path / "disk", killed_at))
    assert all(isinstance(error, Killed) for error in errors)
    assert len(errors) == calm.disk.count


@pytest.mark.parametrize("for_good", [False, True])
def test_a_disk_that_is_full_at_any_operation_leaves_the_old_or_the_new(
    tmp_path: Path, calm: Calm, for_good: bool
) -> None:
    def failure(number: int) -> Failure:
        return full_at(number, for_good=for_good)

    errors = list(interrupted_steps(calm, tmp_path / "disk", failure))
    told = [error for error in errors if error is not None]
    assert len(told) > len(errors) / 2, "removing needs no space"
    for error in told:
        assert isinstance(error, StoreError)
        assert "No space left" in str(error)
        assert "free space" in str(error)


def test_a_power_cut_at_any_operation_leaves_the_old_or_the_new(tmp_path: Path, calm: Calm) -> None:
    base, states = tmp_path / "disk", 0
    for steps, tree in power_cuts(calm.base, calm.disk.operations):
        write_tree(base, tree)
        assert outcome(base) in calm.outcomes[steps : steps + 2], steps
        shutil.rmtree(base)
        states += 1
    assert states > len(calm.disk.operations)


def test_a_kill_while_recovering_from_a_kill(tmp_path: Path, calm: Calm) -> None:
    """At any operation of a save, and then at any of the next one; a third clears up."""
    tries = 0
    for once in killed_saves(calm.copies[6], tmp_path / "once"):
        for twice in killed_saves(once, tmp_path / "twice"):
            saved = save_next(twice)
            assert not list(twice.rglob(".*")), "nothing half-made remains"
            best = (4 if saved >= 4 else 1, 0.9)
            assert outcome(twice)[1:3] == ((saved, SCORES[saved]), best)
            tries += 1
    assert tries > 100


def killed_saves(before: Path, after: Path) -> Iterator[Path]:
    """What is left of ``before`` when saving is killed at its first operation, its second …"""
    for number in itertools.count():
        shutil.copytree(before, after)
        disk = Disk(after, killed_at(number))
        killed = False
        try:
            save_next(after, disk)
        except Killed:
            killed = True
        yield after
        shutil.rmtree(after)
        if not killed:
            return


def save_next(base: Path, disk: Disk | None = None) -> int:
    """What a coordinator saves that goes on from what is there."""
    store = reopened(base)
    found = store.latest()
    assert found is not None
    with contextlib.nullcontext() if disk is None else disk.watched():
        store.save(make_checkpoint(found.version + 1))
    return found.version + 1
