from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from coordinator.aggregation import Model
from coordinator.checkpoint import Checkpoint
from coordinator.errors import ResumeError, StoreError
from coordinator.service import open_run
from coordinator.settings import CoordinatorSettings
from coordinator.store import Store
from tests.crashing_disk import Disk, Killed, killed_at
from tests.tiny import NETWORK


def opened(
    root: Path, name: str, *, fresh: bool = False, strategy: str = "averaging"
) -> tuple[str, Checkpoint]:
    """What a new process goes on with; a run that it starts itself gets this name."""
    settings = CoordinatorSettings.model_validate(
        {"state_dir": root, "network": NETWORK, "strategy": strategy}
    )
    model = Model(model_of(name), {})
    return open_run(settings, Store(root), lambda: model, fresh=fresh, name=lambda: name)


def model_of(name: str) -> dict[str, np.ndarray]:
    return {"blocks.0.weight": np.frombuffer(name.encode(), np.uint8)}


def test_a_new_run_starts_at_version_0_and_is_gone_on_with(tmp_path: Path) -> None:
    for name in ("first", "other"):
        run, found = opened(tmp_path, name)
        assert run == "first"
        assert (found.version, found.round) == (0, 0)
        np.testing.assert_equal(found.model.state, model_of("first"))


def test_the_settings_of_a_run_are_kept(tmp_path: Path) -> None:
    opened(tmp_path, "first")
    with pytest.raises(ResumeError, match=r"averaging.*sequential.*--fresh"):
        opened(tmp_path, "other", strategy="sequential")
    assert opened(tmp_path, "other", strategy="sequential", fresh=True)[0] == "other"


def test_a_run_from_before_a_setting_existed_had_its_default(tmp_path: Path) -> None:
    opened(tmp_path, "first")
    file = tmp_path / "first" / "run.json"
    identity = json.loads(file.read_bytes())
    del identity["label_skew"], identity["network"]["norm"]
    file.write_text(json.dumps(identity))
    assert opened(tmp_path, "other")[0] == "first"
    file.write_text(json.dumps(identity | {"label_skew": "calibrated"}))
    with pytest.raises(ResumeError, match="label_skew = 'calibrated', now it is 'none'"):
        opened(tmp_path, "other")


def no_folder(root: Path, run: str) -> None:
    shutil.rmtree(root / run)


def a_file_instead(root: Path, run: str) -> None:
    shutil.rmtree(root / run)
    (root / run).write_text("")


def empty_pointer(root: Path, run: str) -> None:
    (root / "current").write_text("")


def no_settings(root: Path, run: str) -> None:
    (root / run / "run.json").unlink()


def empty_settings(root: Path, run: str) -> None:
    (root / run / "run.json").write_text("")


def no_whole_checkpoint(root: Path, run: str) -> None:
    (root / run / "checkpoints" / "000000" / "manifest.json").write_text("")


@pytest.mark.parametrize(
    "damage",
    [no_folder, a_file_instead, empty_pointer, no_settings, empty_settings, no_whole_checkpoint],
)
def test_a_damaged_run_is_not_silently_started_over(
    tmp_path: Path, damage: Callable[[Path, str], None]
) -> None:
    opened(tmp_path, "first")
    damage(tmp_path, "first")
    for _ in range(2):
        with pytest.raises(StoreError, match=r"--fresh"):
            opened(tmp_path, "second")
    assert opened(tmp_path, "third", fresh=True)[0] == "third"
    assert opened(tmp_path, "fourth")[0] == "third"


def test_a_run_that_never_had_a_checkpoint_has_nothing_to_lose(tmp_path: Path) -> None:
    opened(tmp_path, "first")
    shutil.rmtree(tmp_path / "first" / "checkpoints")
    run, found = opened(tmp_path, "second")
    assert run == "second"
    assert found.version == 0


def test_a_half_made_run_that_nothing_points_to_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "half" / "checkpoints").mkdir(parents=True)
    assert opened(tmp_path, "first")[0] == "first"
    assert opened(tmp_path, "second")[0] == "first"


@pytest.mark.parametrize("fresh", [False, True])
def test_a_kill_while_a_run_is_started_leaves_the_one_before_or_the_new_one(
    tmp_path: Path, fresh: bool
) -> None:
    """At any operation; without a run before, the next start makes one."""
    number, killed = 0, True
    while killed:
        root = tmp_path / f"{number}" / "state"
        root.parent.mkdir()
        if fresh:
            opened(root, "before")
        killed = False
        try:
            with Disk(root.parent, killed_at(number)).watched():
                opened(root, "new", fresh=fresh)
        except Killed:
            killed = True
        run, found = opened(root, "next")
        assert run == "new" if not killed else run in ("new", "before" if fresh else "next")
        np.testing.assert_equal(found.model.state, model_of(run))
        number += 1
    assert number > 20
