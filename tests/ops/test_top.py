from __future__ import annotations

import io
import json
import os
import pty
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from rich.console import Console
from rich.live import Live

from coordinator.status import FleetStatus
from ops import top as watching
from ops.cli import main
from ops.errors import CoordinatorSilent
from ops.fleet_order import Order
from ops.fleet_rates import Meter
from ops.http_status import serve_http
from tests.mosquitto_process import free_port
from tests.ops.fleet_statuses import make_device, make_status

STATUS = make_status(make_device("cam-1"))


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture
def url() -> Iterator[str]:
    """Of a coordinator whose page is ``STATUS``."""
    pages = {"/status": lambda: (True, STATUS.model_dump_json())}
    with serve_http(CollectorRegistry(), pages, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.port}"


def test_status_prints_the_fleet(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("status", "--url", url) == 0
    out = capsys.readouterr().out
    assert "fleet demo, run 20261121-201503-1a74" in out
    assert "cam-1" in out


def test_status_as_json_is_all_of_it(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("status", "--url", f"http://{url}/", "--json") == 0
    assert FleetStatus.model_validate(json.loads(capsys.readouterr().out)) == STATUS


def test_top_prints_one_table_where_there_is_no_terminal(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("top", "--url", url, "--interval", "0.1") == 0
    assert "samples/s" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["status", "top"])
def test_nobody_there_is_one_clear_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(command, "--url", f"127.0.0.1:{free_port()}") == 9
    error = capsys.readouterr().err
    assert "--metrics-port" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ((False, '{"ok": false, "problem": "it is starting"}'), "not ready: it is starting"),
        ((False, "[]"), "not ready: ask again later"),
        ((True, '{"fleet": "demo"}'), "something else than a status"),
        ((True, "<html>"), "something else than a status"),
    ],
)
def test_an_answer_that_is_no_status_is_said_plainly(
    page: tuple[bool, str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with serve_http(CollectorRegistry(), {"/status": lambda: page}, "127.0.0.1", 0) as server:
        assert call("status", "--url", f"127.0.0.1:{server.port}") == 9
    assert words in capsys.readouterr().err


def test_another_server_is_said_plainly(capsys: pytest.CaptureFixture[str]) -> None:
    with serve_http(CollectorRegistry(), {}, "127.0.0.1", 0) as server:
        assert call("status", "--url", f"127.0.0.1:{server.port}") == 9
    assert "status 404" in capsys.readouterr().err


@pytest.mark.parametrize(
    "url", ["ftp://x", "http://", "http://u:p@x", "x:99999", "a b:1", "x\n", "a" * 300]
)
def test_a_url_that_cannot_be_is_refused(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("status", "--url", url) == 2
    assert "--url" in capsys.readouterr().err


def test_a_coordinator_that_goes_away_is_shown_and_asked_on() -> None:
    file = io.StringIO()
    console = Console(file=file, width=80, height=30, force_terminal=True)
    answers: list[FleetStatus | None] = [STATUS, None, STATUS]
    pages: list[str] = []

    def read() -> FleetStatus:
        answer = answers.pop(0)
        if answer is None:
            raise CoordinatorSilent("nobody answers")
        return answer

    def pressed(seconds: float) -> bool:
        assert seconds == 2.0
        pages.append(file.getvalue())
        file.truncate(0)
        return not answers

    with Live(console=console, auto_refresh=False) as live:
        watching.watch(read, live, Meter(), order=Order.name, interval_s=2.0, pressed=pressed)
    assert ["nobody answers" in page for page in pages] == [False, True, False]
    assert all("cam-1" in page for page in pages), "what was known stays"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The other end of a terminal that is standard input."""
    here, there = pty.openpty()
    with os.fdopen(there, "r") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield here
    os.close(here)


def test_q_ends_it_and_the_terminal_is_as_before(terminal: int) -> None:
    import termios

    before = termios.tcgetattr(sys.stdin)
    with watching._keyboard() as pressed:
        assert not pressed(0.0)
        os.write(terminal, b"x")
        assert not pressed(0.01), "another key is not the end"
        os.write(terminal, b"yq")
        assert pressed(30.0)
        assert termios.tcgetattr(sys.stdin) != before
    assert termios.tcgetattr(sys.stdin) == before


def test_ctrl_c_is_a_good_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def read() -> FleetStatus:
        return STATUS

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watching, "watch", interrupt)
    console = Console(file=io.StringIO(), width=80, height=30, force_terminal=True)
    watching.top(read, order=Order.name, interval_s=2.0, once=False, console=console)
