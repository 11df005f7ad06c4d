from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.log_levels import FILE, MOST_DEVICES, LogLevels, read_log_levels, write_log_levels
from ops.cli import main


def call(folder: Path, *arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["log-level", *arguments, "--state-dir", str(folder)])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_levels_are_chosen_shown_and_taken_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(tmp_path, "debug") == 0
    assert call(tmp_path, "error", "--all-devices") == 0
    assert call(tmp_path, "debug", "--device", "cam-1") == 0
    capsys.readouterr()
    assert call(tmp_path) == 0
    assert capsys.readouterr().out.splitlines() == [
        "coordinator: debug",
        "devices: error",
        "device cam-1: debug",
    ]
    assert read_log_levels(tmp_path) == LogLevels("debug", "error", {"cam-1": "debug"})
    assert call(tmp_path, "default", "--all-devices") == 0
    assert call(tmp_path, "default") == 0
    assert read_log_levels(tmp_path) == LogLevels()
    assert "as its settings say" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["loud"], 2, "debug, info, warning, error, or default"),
        (["info", "--device", "a/b"], 2, "--device"),
        (["info", "--device", "coordinator"], 2, "reserved"),
        (["info", "--device", "a", "--all-devices"], 2, "one of them"),
    ],
)
def test_what_a_user_got_wrong_is_one_clear_line(
    arguments: list[str],
    code: int,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(tmp_path, *arguments) == code
    assert words in capsys.readouterr().err
    assert not (tmp_path / FILE).exists()


def test_a_folder_that_is_not_there_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(tmp_path / "nothing", "info") == 2
    assert "--state-dir" in capsys.readouterr().err
    assert call(tmp_path / "nothing") == 2
    assert "--state-dir" in capsys.readouterr().err


def test_a_damaged_file_is_said_and_left_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / FILE).write_text("rubbish")
    assert call(tmp_path, "info") == 5
    assert "remove it" in capsys.readouterr().err
    assert (tmp_path / FILE).read_text() == "rubbish"


def test_not_every_device_can_have_a_level_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = LogLevels(devices={f"d{number}": "debug" for number in range(MOST_DEVICES)})
    write_log_levels(tmp_path, full)
    assert call(tmp_path, "info", "--device", "d0") == 0
    assert call(tmp_path, "info", "--device", "one-more") == 2
    assert "--all-devices" in capsys.readouterr().err
