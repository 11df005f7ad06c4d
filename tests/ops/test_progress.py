from __future__ import annotations

import io
import logging
import sys

import pytest

from ops.progress import Silence, progress_observer

RECORD: dict[str, object] = {
    "seconds": 10.0,
    "server_accuracy": 0.8125,
    "exit_accuracy": {"2": 0.65, "5": 0.7},
    "devices": {"d0": {"samples": 300}, "d1": {"samples": 100}},
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


def a_round(progress: Silence, number: int, outcome: str = "closed") -> None:
    progress.round_opened(number, 6, 0, 8)
    progress.batch_applied(2, 32, 1.25, 0.1)
    progress.round_ended(number, outcome, RECORD if outcome == "closed" else {})


def test_a_quiet_run_shows_nothing(terminal: Terminal) -> None:
    with progress_observer(quiet=True, file=terminal) as progress:
        a_round(progress, 1)
        progress.phase("finished")
    assert terminal.getvalue() == ""


def test_without_a_terminal_each_closed_round_is_one_line() -> None:
    file = io.StringIO()
    with progress_observer(file=file) as progress:
        progress.devices({"waiting": 2})
        a_round(progress, 1)
        a_round(progress, 2)
        progress.phase("inference")
        progress.features_answered(2, 40, None)
    assert file.getvalue().splitlines() == [
        f"round {n}/6: full network 81.2%, exits 2:65.0% 5:70.0%, 40 samples/s, 10 s"
        for n in (1, 2)
    ]


def test_a_round_that_failed_has_its_line_too() -> None:
    file = io.StringIO()
    with progress_observer(file=file) as progress:
        a_round(progress, 3, "abandoned")
    assert file.getvalue() == "round 3/6: abandoned\n"


def test_it_can_be_part_of_the_log(caplog: pytest.LogCaptureFixture, terminal: Terminal) -> None:
    caplog.set_level(logging.INFO, "splitfleet")
    with progress_observer(logged=True, file=terminal) as progress:
        a_round(progress, 3, "abandoned")
    assert caplog.messages == ["round 3/6: abandoned"]
    assert terminal.getvalue() == ""


def test_a_run_without_evaluation_still_says_its_speed() -> None:
    file = io.StringIO()
    record: dict[str, object] = {"seconds": 10.0, "devices": RECORD["devices"]}
    with progress_observer(file=file) as progress:
        progress.round_opened(1, 2, 0, 8)
        progress.round_ended(1, "closed", record)
    assert file.getvalue() == "round 1/2: 40 samples/s, 10 s\n"


def test_a_terminal_shows_rounds_batches_speed_and_losses(terminal: Terminal) -> None:
    clock = Clock()
    with progress_observer(file=terminal, clock=clock) as progress:
        progress.devices({"waiting": 2, "offline": 1})
        progress.round_opened(2, 6, 1, 8)
        clock.now = 0.5
        progress.batch_applied(2, 32, 1.25, 0.1)
        progress.batch_applied(5, 32, 2.5, 0.1)
    shown = terminal.getvalue()
    assert "1/6" in shown
    assert "round 2, attempt 2" in shown
    assert "2/8" in shown
    assert "128 samples/s" in shown
    assert "2:1.25 5:2.50" in shown


def test_a_terminal_shows_the_devices_it_waits_for(terminal: Terminal) -> None:
    with progress_observer(file=terminal) as progress:
        progress.devices({"waiting": 2, "offline": 1})
    assert "waiting for devices" in terminal.getvalue()
    assert "2 online" in terminal.getvalue()


def test_log_lines_do_not_tear_the_bars(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal)
    handler = logging.StreamHandler(terminal)
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        with progress_observer(file=terminal) as progress:
            progress.round_opened(1, 6, 0, 8)
            during = handler.stream
            root.warning("a device went away")
        assert during is not terminal
        assert handler.stream is terminal
    finally:
        root.removeHandler(handler)
    assert "a device went away" in terminal.getvalue()
