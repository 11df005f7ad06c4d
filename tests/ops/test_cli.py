from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ops.cli import main
from tests.mosquitto_process import free_port


def splitfleet(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ops.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["agent", "--bogus"], 2, "No such option"),
        (["agent"], 2, "agent.device is missing"),
        (["agent", "--device", "coordinator"], 2, "is reserved"),
        (["agent", "--device", "a", "--set", "precision=fp8"], 2, "precision"),
        (["agent", "--device", "a", "--broker", "http://x"], 2, "mqtt://HOST"),
        (["agent", "--device", "a", "--log-format", "xml"], 2, "'human' or 'json'"),
        (["coordinator", "--log-level", "loud"], 2, "'debug', 'info', 'warning' or 'error'"),
        (["coordinator", "--set", "nonsense=1"], 2, "is not a setting"),
        (["coordinator", "--set", "no equals sign"], 2, "key=value"),
        (["coordinator", "--codec", "int9"], 2, "int8"),
        (
            ["coordinator", "--codec", "fp32", "--bytes-per-sample", "99"],
            2,
            "codec = fp32 has none",
        ),
        (["demo", "--codec", "fp16", "--follow-link"], 2, "follow_link needs"),
        (["demo", "--bytes-per-sample", "0"], 2, "greater than 0"),
        (["coordinator", "--config", "/does/not/exist.toml"], 2, "cannot read"),
        (["agent", "--device", "a", "--dataset", "nope"], 4, "allowed are"),
        (["coordinator", "--dataset", "cifar10", "--data-root", "/nowhere"], 4, "cifar10"),
        (["coordinator", "--state-dir", "/proc/nothing"], 5, "free space"),
        (["demo", "--strategy", "best"], 2, "averaging"),
        (["demo", "--cuts", "2,x"], 2, "no cut layer"),
        (["demo", "--cuts", "2,12"], 2, "cuts 1 to 9"),
        (["demo", "--broker", "mqtt://127.0.0.1:1"], 3, "start it"),
        (["demo", "--dataset", "cifar100", "--data-root", "/nowhere"], 4, "--download"),
    ],
)
def test_what_a_user_got_wrong_is_one_clear_line_and_an_exit_code(
    arguments: list[str], code: int, words: str, tmp_path: Path
) -> None:
    more = ["--out", str(tmp_path / "run")] if arguments[0] == "demo" else []
    done = splitfleet(*arguments, *more)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists(), "nothing was started"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["coordinator", "--set", "rounds="], "coordinator.rounds = ''"),
        (["coordinator", "--set", "rounds=3", "--rounds", "4"], "leave one of them out"),
        (["agent", "--device", "a", "--set", "share=-1"], "agent.share = '-1'"),
        (["simulate", "--set", "rounds=0"], "coordinator.rounds = '0'"),
    ],
)
def test_a_setting_with_a_flag_of_its_own_may_be_set_too(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_a_taken_port_is_said_plainly() -> None:
    port = str(free_port())
    running = subprocess.Popen(
        [sys.executable, "-m", "ops.cli", "broker", "--port", port, "--until-eof"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert running.stderr is not None
        assert "listening" in running.stderr.readline()
        second = splitfleet("broker", "--port", port)
        assert second.returncode == 6
        assert port in second.stderr
    finally:
        running.communicate("", timeout=100)  # the end of its input ends it
    assert running.returncode == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_coordinator_that_is_told_to_stop_ends_well(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "ops.cli", "coordinator", "--width", "2", "--quiet"]
    command += ["--broker", f"mqtt://127.0.0.1:{free_port()}", "--state-dir", str(tmp_path)]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert running.stderr is not None
        assert any("no connection to the broker" in line for line in running.stderr)
        running.send_signal(number)
        running.communicate(timeout=100)
    finally:
        running.kill()
    assert running.returncode == code


def test_flags_beat_the_environment_which_beats_the_file(tmp_path: Path) -> None:
    file = tmp_path / "fleet.toml"
    file.write_text('[coordinator]\nwindow = "from the file"\nrounds = "from the file"\n')
    # The key that is wrong is reported with its value, and so shows who won.
    from_file = splitfleet("coordinator", "--config", str(file))
    assert "from the file" in from_file.stderr
    environment = {"SPLITFLEET_COORDINATOR_ROUNDS": "from the environment"}
    from_environment = splitfleet(
        "coordinator", "--config", str(file), "--window", "2", **environment
    )
    assert "coordinator.rounds = 'from the environment'" in from_environment.stderr
    from_flag = splitfleet(
        "coordinator", "--config", str(file), "--window", "0", "--rounds", "2", **environment
    )
    assert "coordinator.window = 0 (from the flag --window)" in from_flag.stderr
    assert "coordinator.rounds" not in from_flag.stderr


def test_doctor_says_what_is_wrong_and_what_to_do() -> None:
    done = splitfleet("doctor", "--broker", "mqtt://127.0.0.1:1", "--json")
    assert done.returncode == 1
    findings = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    failed = [check for check in findings.values() if check["state"] == "failed"]
    assert failed
    assert all(check["advice"] for check in failed)


def test_a_run_is_not_resumed_with_other_settings_nor_spoilt_by_the_attempt(tmp_path: Path) -> None:
    remembered = tmp_path / "demo.json"
    remembered.write_text(json.dumps({"strategy": "averaging", "rounds": 2}))
    done = splitfleet("demo", "--out", str(tmp_path), "--strategy", "sequential")
    assert done.returncode == 2
    assert "averaging" in done.stderr
    assert json.loads(remembered.read_text()) == {"strategy": "averaging", "rounds": 2}
