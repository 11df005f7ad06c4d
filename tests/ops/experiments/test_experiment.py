"""``splitfleet experiment`` as it is called: several processes, stopped, gone on with."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.ops.experiments.test_spec import GOOD


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "ops.cli", "experiment", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(*arguments: str) -> tuple[int, str, str]:
    with start(*arguments) as process:
        try:
            out, err = process.communicate(timeout=600)
        finally:
            process.kill()
    return process.returncode, out, err


def rounds(out: Path) -> dict[str, int]:
    return {
        str(path.parent.relative_to(out / "arms")): len(json.loads(path.read_bytes())["rounds"])
        for path in out.glob("arms/*/*/history.json")
    }


@pytest.mark.slow
def test_it_goes_on_after_a_kill_and_ends_with_tables(tmp_path: Path) -> None:
    file, out = tmp_path / "try.toml", tmp_path / "out"
    file.write_text(GOOD.replace("rounds = 2", "rounds = 4").replace("[3, 4]", "[3]"))
    arguments = [str(file), "--out", str(out), "--jobs", "2"]
    with start(*arguments) as process:
        deadline = time.monotonic() + 600
        while not rounds(out) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=100)
    before = rounds(out)
    assert before, "no round was closed in time"
    code, table, log = finish(*arguments)
    assert code == 0, log
    assert rounds(out) == {"a/seed-3": 4, "b/seed-3": 4}
    for folder, number in before.items():
        arm, seed = folder.split("/seed-")
        assert f"{arm} seed {seed} round {number}/4" not in log, "made twice"
    assert table == (out / "table.md").read_text()
    assert table.splitlines()[2].startswith("| a | 1 |")
    lines = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    assert {(line["arm"], line["network"], line["cut"]) for line in lines} == {
        ("a", "full", "2"),
        ("a", "full", "3"),
        ("a", "exit", "2"),
        ("a", "exit", "3"),
        ("b", "full", "5"),
        ("b", "exit", "5"),
    }
    assert (out / "plots" / "exit-5.svg").read_text().startswith("<svg")
    assert len(json.loads((out / "environment.json").read_bytes())["calls"]) == 2
    code, again, _ = finish(*arguments)
    assert (code, again) == (0, table)


def test_it_stops_when_its_minutes_are_over_and_says_how_to_go_on(tmp_path: Path) -> None:
    file, out = tmp_path / "try.toml", tmp_path / "out"
    file.write_text(GOOD.replace("rounds = 2", "rounds = 50"))
    code, _, log = finish(
        str(file), "--out", str(out), "--minutes", "0.001", "--arms", "a", "--seeds", "4"
    )
    assert code == 75
    assert rounds(out) == {"a/seed-4": 1}, "each call gets on by a round"
    assert "the same command goes on" in log


def test_mistakes_end_it_at_once(tmp_path: Path) -> None:
    file = tmp_path / "try.toml"
    file.write_text(GOOD)
    for arguments, words in (
        (["--arms", "c"], "the file has a, b"),
        (["--seeds", "x"], "whole numbers"),
        (["--jobs", "0"], "at least 1"),
        (["--minutes", "nan"], "above 0"),
    ):
        code, _, log = finish(str(file), "--out", str(tmp_path / "out"), *arguments)
        assert code == 2
        assert words in log
    assert not (tmp_path / "out").exists()


def test_a_folder_is_one_calls_at_a_time(tmp_path: Path) -> None:
    file, out = tmp_path / "try.toml", tmp_path / "out"
    file.write_text(GOOD)
    out.mkdir()
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, log = finish(str(file), "--out", str(out))
    assert code == 2
    assert "another call is at work" in log


@pytest.mark.slow
def test_what_is_taken_in_pieces_has_one_table_and_one_file(tmp_path: Path) -> None:
    file, out = tmp_path / "try.toml", tmp_path / "out"
    text = GOOD.replace("[3, 4]", "[3]")
    file.write_text(text)
    code, table, log = finish(str(file), "--out", str(out), "--arms", "a")
    assert code == 0, log
    assert "| b |" not in table
    code, table, log = finish(str(file), "--out", str(out), "--arms", "b")
    assert code == 0, log
    assert "a seed 3" not in log
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:4]] == ["a", "b"]
    file.write_text(text.replace("rounds = 2", "rounds = 3"))
    before = (out / "experiment.json").read_bytes()
    code, table, log = finish(str(file), "--out", str(out))
    assert code == 2, "what is finished is of another training than the file's"
    assert "another rounds" in log
    assert (out / "experiment.json").read_bytes() == before


@pytest.mark.slow
def test_an_arm_that_fails_keeps_no_other_from_its_end(tmp_path: Path) -> None:
    file, out = tmp_path / "try.toml", tmp_path / "out"
    failing = 'name = "a"\nkind = "distributed"\ntraining = { learning_rate = 1e30 }\n'
    file.write_text(GOOD.replace("[3, 4]", "[3]").replace('name = "a"\n', failing))
    code, _, log = finish(str(file), "--out", str(out))
    assert code not in (0, 2), log
    assert "the loss is nan" in log
    assert "| b | 1 |" in (out / "table.md").read_text()
