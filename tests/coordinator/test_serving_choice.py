from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator import serving_choice
from coordinator.errors import StoreError
from coordinator.serving_choice import REMEMBERED, ServingChoice, read_choice, write_choice
from coordinator.store import Store
from tests.serving_state import make_state, make_version

VERSIONS = st.none() | st.integers(0, 9)


def test_nothing_was_chosen_before_somebody_chooses(tmp_path: Path) -> None:
    assert read_choice(tmp_path) == ServingChoice(None, ())


def test_a_choice_comes_back(tmp_path: Path) -> None:
    choice = ServingChoice().promote(3).promote(5)
    write_choice(tmp_path, choice)
    assert read_choice(tmp_path) == choice == ServingChoice(5, (None, 3))
    assert json.loads((tmp_path / "serving.json").read_bytes()) == {
        "version": 5,
        "previous": [None, 3],
    }
    assert [path.name for path in tmp_path.iterdir()] == ["serving.json"]


@given(st.lists(VERSIONS, max_size=40))
def test_rollbacks_undo_promotions_one_by_one(versions: list[int | None]) -> None:
    choices = [ServingChoice()]
    for version in versions:
        after = choices[-1].promote(version)
        if version == choices[-1].version:
            assert after == choices[-1]
        else:
            choices.append(after)
        assert len(after.previous) <= REMEMBERED
    choice = choices.pop()
    for _ in range(min(len(choices), REMEMBERED)):
        choice = choice.rollback()
        assert choice.version == choices.pop().version
    assert not choice.previous


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"version": "3"}',
        '{"version": true}',
        '{"version": -1}',
        '{"version": 1.5}',
        '{"version": 1, "previous": 2}',
        '{"version": 1, "previous": ["x"]}',
        "[" * 3000,
        '{"version": 1}' + " " * 5000 + "x",
    ],
)
def test_a_damaged_file_says_what_to_do(tmp_path: Path, content: str) -> None:
    (tmp_path / "serving.json").write_text(content)
    with pytest.raises(StoreError, match=r"serving\.json .*splitfleet model promote"):
        read_choice(tmp_path)


def test_a_full_disk_leaves_the_choice_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_choice(tmp_path, ServingChoice(3))

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(serving_choice, "write_file", full)
    with pytest.raises(StoreError, match="No space left"):
        write_choice(tmp_path, ServingChoice(4))
    assert read_choice(tmp_path).version == 3


class TestStore:
    def test_what_was_chosen_is_never_removed(self, tmp_path: Path) -> None:
        make_state(tmp_path, (0.1, 0.9))
        store = Store(tmp_path, keep=2)
        assert store.current() is not None
        write_choice(store.folder, ServingChoice().promote(0).promote(1))
        for version in range(3, 9):
            store.save(make_version(version, score=0.2))
        # 1 serves, 0 is what a rollback returns to, 2 is the best, 7 and 8 are the last two.
        assert store.versions() == [0, 1, 2, 7, 8]
        write_choice(store.folder, ServingChoice())
        store.save(make_version(9, score=0.2))
        assert store.versions() == [2, 8, 9]

    def test_where_the_choice_cannot_be_read_nothing_is_removed(self, tmp_path: Path) -> None:
        store = make_state(tmp_path, (0.1,), keep=2)
        (store.folder / "serving.json").write_text("{")
        for version in range(2, 6):
            store.save(make_version(version))
        assert store.versions() == [0, 1, 2, 3, 4, 5]
        (store.folder / "serving.json").unlink()
        store.save(make_version(6))
        assert store.versions() == [1, 5, 6]

    def test_lists_what_it_keeps_and_what_is_damaged(self, tmp_path: Path) -> None:
        store = make_state(tmp_path, (0.5, 0.6))
        (store.folder / "checkpoints" / "000001" / "manifest.json").write_text("{}")
        kept = store.kept()
        assert [entry.manifest.get("version") for entry in kept] == [0, None, 2]
        assert [entry.problem is None for entry in kept] == [True, False, True]
        assert kept[2].size == sum(path.stat().st_size for path in kept[2].folder.iterdir())
        reopened = Store(tmp_path)
        assert reopened.current() is not None
        assert reopened.kept() == kept
