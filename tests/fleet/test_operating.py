"""What a person on call does with a fleet of real processes: looks at it, reads its logs."""

from __future__ import annotations

import json
import signal
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from ops.cli import main
from tests.fleet_processes import Fleet
from tests.mosquitto_process import Mosquitto

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1000)]

PASSWORD = "hunter-twenty-two"


def page(fleet: Fleet, path: str) -> tuple[int, Any]:
    url = f"http://127.0.0.1:{fleet.metrics_port}{path}"
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as exc:
        return exc.code, json.loads(exc.read())
    except OSError:
        return 0, {}


def lines(fleet: Fleet, name: str) -> list[dict[str, Any]]:
    """Whole lines of a log; each must be one object."""
    text = fleet.log(name)
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def run(*arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 0


def test_a_fleet_is_looked_at_and_its_logs_are_turned_up_and_down(
    mosquitto: Mosquitto, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = {"log_format": "json", "precision": "fp32", "memory_format": "contiguous"}
    broker = {"username": "somebody", "password": PASSWORD, "keepalive_s": 5, "backoff_max_s": 2.0}
    with Fleet(
        tmp_path,
        mosquitto.url,
        coordinator={**common, "rounds": 1000, "batches_per_round": 8},
        agent={**common, "will_delay_s": 1},
        broker=broker,
    ) as fleet:
        fleet.start()
        fleet.reach_round(2)
        assert page(fleet, "/healthz")[0] == 200
        url = f"127.0.0.1:{fleet.metrics_port}"
        run("status", "--url", url, "--json")
        status = json.loads(capsys.readouterr().out)
        assert (status["phase"], status["online"], status["known"]) == ("training", 2, 2)
        assert {device["name"]: device["cut"] for device in status["devices"]} == {
            "device-0": 1,
            "device-1": 3,
        }
        assert all(device["samples"] for device in status["devices"])
        assert status["closed"]["number"] >= 1
        run("top", "--url", url, "--once", "--interval", "1")
        shown = capsys.readouterr().out
        assert "device-1" in shown
        assert "samples/s" in shown

        state = ("--state-dir", str(fleet.state))
        run("log-level", "debug", "--all-devices", *state)
        fleet.wait(
            lambda: all("log level debug" in fleet.log(name) for name in fleet.names), "their level"
        )
        assert "log level" not in fleet.log("coordinator")
        run("log-level", "error", "--device", "device-0", *state)
        run("log-level", "debug", *state)
        fleet.wait(lambda: "log level error" in fleet.log("device-0"), "its own level")
        fleet.wait(lambda: "log level debug" in fleet.log("coordinator"), "the coordinator's")

        fleet.kill("device-0")
        fleet.start_agent(0)
        fleet.wait(
            lambda: fleet.log("device-0").count("log level error") == 2, "its level after a restart"
        )

        mosquitto.signal(signal.SIGSTOP)
        fleet.wait(lambda: page(fleet, "/healthz")[0] == 503, "the broker to be missed")
        assert page(fleet, "/healthz")[1]["problem"] == "no connection to the broker"
        mosquitto.signal(signal.SIGCONT)
        fleet.wait(lambda: page(fleet, "/healthz")[0] == 200, "the broker to be back")

        for name in ("coordinator", *fleet.names):
            assert PASSWORD not in fleet.log(name)
            assert all(line["message"] and line["level"] for line in lines(fleet, name))
        away = [line for line in lines(fleet, "coordinator") if "no connection" in line["message"]]
        assert away[0]["run"] == status["run"]
        assert away[0]["round"] >= 2
        heard = [line for line in lines(fleet, "coordinator") if "joins" in line["message"]]
        assert {line["device"] for line in heard} == set(fleet.names)
        levels = [line for line in lines(fleet, "device-1") if "log level" in line["message"]]
        assert levels[0]["device"] == "device-1"
        assert levels[0]["run"] == status["run"]
