from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coordinator.serving_choice import ServingChoice, read_choice
from coordinator.store import Store
from ops import checkpoints, models
from ops.cli import main
from tests.serving_state import make_state, make_version

Output = pytest.CaptureFixture[str]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Versions 0 to 3, of which 2 is the best."""
    return make_state(tmp_path / "state")


def splitfleet(store: Store, *arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["model", *arguments, "--state-dir", str(store.folder.parent)])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def listed(store: Store, capsys: Output) -> dict[str, Any]:
    capsys.readouterr()
    assert splitfleet(store, "list", "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def marks(store: Store, capsys: Output) -> dict[int, list[str]]:
    return {row["version"]: row["marks"] for row in listed(store, capsys)["versions"]}


def test_list_says_which_version_serves(store: Store, capsys: Output) -> None:
    assert marks(store, capsys) == {0: [], 1: [], 2: ["best"], 3: ["serves", "latest"]}
    assert splitfleet(store, "promote", "1") == 0
    assert "version 1 serves" in capsys.readouterr().out
    assert marks(store, capsys) == {
        0: [],
        1: ["serves", "pinned"],
        2: ["best"],
        3: ["latest"],
    }
    found = listed(store, capsys)
    assert (found["serving"], found["pinned"], found["previous"]) == (1, 1, [None])
    row = found["versions"][2]
    assert (row["round"], row["score"], row["trained_cuts"]) == (2, 0.9, [2, 3])
    assert row["exit_accuracy"] == pytest.approx({"2": 0.7, "3": 0.6})
    assert row["bytes"] > 10_000


def test_the_table_fits_people(store: Store, capsys: Output) -> None:
    assert splitfleet(store, "list") == 0
    out = capsys.readouterr().out
    assert "2:70.0% 3:60.0%" in out
    assert "the last closed round serves: version 3" in out


def test_promote_and_rollback_are_seen_by_the_coordinator(store: Store, capsys: Output) -> None:
    for version, chosen in (("best", 2), ("1", 1), ("latest", None)):
        assert splitfleet(store, "promote", version) == 0
        assert read_choice(store.folder).version == chosen
    for chosen in (1, 2, None):
        assert splitfleet(store, "rollback") == 0
        assert read_choice(store.folder).version == chosen
    assert splitfleet(store, "rollback") == 2
    assert "splitfleet model promote 2" in capsys.readouterr().err


@pytest.mark.parametrize("version", ["7", "x", "1.0", "²", "9" * 30, ""])
def test_an_unknown_version_is_refused_and_changes_nothing(
    store: Store, version: str, capsys: Output
) -> None:
    assert splitfleet(store, "promote", version) == 2
    assert splitfleet(store, "show", version) == 2
    error = capsys.readouterr().err
    assert f"version {version}: " in error
    assert "Traceback" not in error
    assert read_choice(store.folder) == ServingChoice()


def test_a_damaged_version_is_not_promoted(store: Store, capsys: Output) -> None:
    weights = store.folder / "checkpoints" / "000001" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert splitfleet(store, "promote", "1") == 5
    assert "damaged" in capsys.readouterr().err
    assert read_choice(store.folder) == ServingChoice()


def test_a_damaged_version_is_not_gone_back_to(store: Store, capsys: Output) -> None:
    assert splitfleet(store, "promote", "1") == 0
    assert splitfleet(store, "promote", "2") == 0
    (store.folder / "checkpoints" / "000001" / "model.safetensors").unlink()
    assert splitfleet(store, "rollback") == 5
    assert read_choice(store.folder).version == 2


@pytest.mark.parametrize("version", ["1", "latest"])
def test_a_damaged_choice_is_replaced_by_the_next(
    store: Store, version: str, capsys: Output
) -> None:
    (store.folder / "serving.json").write_text('{"version": ')
    assert splitfleet(store, "list") == 5
    assert "splitfleet model promote" in capsys.readouterr().err
    assert splitfleet(store, "promote", version) == 0
    chosen = None if version == "latest" else 1
    assert read_choice(store.folder).version == chosen


def test_a_damaged_manifest_is_listed_as_such(store: Store, capsys: Output) -> None:
    (store.folder / "checkpoints" / "000001" / "manifest.json").write_text("{")
    assert splitfleet(store, "list") == 0
    assert "damaged" in capsys.readouterr().out
    assert [row["problem"] is None for row in listed(store, capsys)["versions"]] == [
        True,
        False,
        True,
        True,
    ]


def test_a_chosen_version_that_somebody_removed_is_missed(store: Store, capsys: Output) -> None:
    assert splitfleet(store, "promote", "1") == 0
    for file in (store.folder / "checkpoints" / "000001").iterdir():
        file.unlink()
    assert splitfleet(store, "list") == 0
    assert "it is not here any more" in capsys.readouterr().out


def test_a_version_removed_while_it_is_promoted_is_not_served(
    store: Store, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overtaken(*arguments: Any) -> Any:
        found = checkpoints.load_checkpoint(*arguments)
        training = Store(store.folder.parent, keep=2)  # the coordinator closes rounds meanwhile
        assert training.current() is not None
        for version in (4, 5):
            training.save(make_version(version))
        return found

    monkeypatch.setattr(models, "load_checkpoint", overtaken)
    assert splitfleet(store, "promote", "1") == 5
    assert "removed in this moment" in capsys.readouterr().err
    assert read_choice(store.folder) == ServingChoice()


def test_show_tells_the_version_that_serves(store: Store, capsys: Output) -> None:
    assert splitfleet(store, "promote", "2") == 0
    capsys.readouterr()
    assert splitfleet(store, "show", "--json") == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["version"], row["marks"]) == (2, ["serves", "pinned", "best"])
    assert row["devices"] == ["cam-1", "cam-2"]
    assert row["parameters"] == sum(v.size for v in make_version(2).model.state.values())
    assert splitfleet(store, "show", "3") == 0
    out = capsys.readouterr().out
    assert "3 latest" in out
    assert "2: 50.0 %  3: 40.0 %" in out


def test_a_folder_without_a_run_is_said_and_left_alone(tmp_path: Path, capsys: Output) -> None:
    for command in (["list"], ["show"], ["promote", "1"], ["rollback"]):
        with pytest.raises(SystemExit) as ended:
            main(["model", *command, "--state-dir", str(tmp_path / "nothing")])
        assert ended.value.code == 2
        assert "holds no run" in capsys.readouterr().err
    assert not (tmp_path / "nothing").exists()
