"""A fleet of real processes on a real broker, to be killed, frozen and looked at."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from coordinator.aggregation import Model
from coordinator.store import Store
from tests.fleet_listener import Listener
from tests.mosquitto_process import free_port

LIMIT_S = 240.0
FLEET = "test"
QUOTA = 40
BATCH_SIZE = 16
CUTS = (1, 3)
DEEPEST_COUNTER = "blocks.8.bn2.num_batches_tracked"
"""Of a block that no device holds: grows by one with every batch the server trains on."""

NETWORK: Mapping[str, object] = {"width": 4, "channels": 1, "size": 28, "classes": 10}
COORDINATOR: Mapping[str, object] = {
    "network": NETWORK,
    "rounds": 3,
    "batches_per_round": QUOTA,
    "batch_size": BATCH_SIZE,
    "deadline_mads": 1000,  # no round ends because the machine was busy
    "inference": False,
    "threads": 1,
}
AGENT: Mapping[str, object] = {"threads": 1, "exit_when_finished": True}
BROKER: Mapping[str, object] = {"backoff_max_s": 2.0}


def wait_until(condition: Callable[[], bool], what: str, limit_s: float = LIMIT_S) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {limit_s:.0f} s for {what}"
        time.sleep(0.01)


class Fleet:
    """A coordinator and ``device-0`` …, each a process; their state and logs lie in ``folder``.

    ``coordinator``, ``agent`` and ``broker`` are settings beyond those of this module.
    """

    def __init__(
        self,
        folder: Path,
        url: str,
        *,
        cuts: tuple[int, ...] = CUTS,
        coordinator: Mapping[str, object] | None = None,
        agent: Mapping[str, object] | None = None,
        broker: Mapping[str, object] | None = None,
    ) -> None:
        self.folder = folder
        self.cuts = cuts
        self.names = [f"device-{number}" for number in range(len(cuts))]
        self.url = url
        self.state = folder / "coordinator"
        self.metrics_port = free_port()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._leaving: set[str] = set()
        self.hears = Listener(url, FLEET)
        self._settings = folder / "fleet.toml"
        common = {"fleet": FLEET, "metrics_port": self.metrics_port, "min_devices": len(cuts)}
        self._settings.write_text(
            _toml("broker", {"url": url, **BROKER, **(broker or {})})
            + _toml("agent", {"fleet": FLEET, "shares": len(cuts), **AGENT, **(agent or {})})
            + _toml("coordinator", {**common, **COORDINATOR, **(coordinator or {})})
        )

    # -- processes --------------------------------------------------------------------------------

    def start(self) -> None:
        """The coordinator and every device."""
        self.start_coordinator()
        for number in range(len(self.cuts)):
            self.start_agent(number)

    def start_coordinator(self) -> subprocess.Popen[bytes]:
        return self._start("coordinator", "coordinator")

    def start_agent(
        self, number: int, url: str | None = None, flags: Sequence[str] = ()
    ) -> subprocess.Popen[bytes]:
        name = self.names[number]
        return self._start(
            name,
            "agent",
            *("--device", name, "--cut", str(self.cuts[number]), "--share", str(number)),
            *(() if url is None else ("--broker", url)),
            *flags,
        )

    def kill(self, name: str) -> None:
        """As the kernel does it: at once, and without a word."""
        process = self.processes.pop(name)
        process.kill()
        process.wait(LIMIT_S)
        _close_input(process)

    def freeze(self, name: str) -> None:
        self.processes[name].send_signal(signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        self.processes[name].send_signal(signal.SIGCONT)

    def _start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        state = ("--state-dir", str(self.folder / name), "--config", str(self._settings))
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "ops.cli", *command, *state, "--until-eof"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        self.processes[name] = process
        return process

    def __enter__(self) -> Self:
        self.hears.__enter__()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.hears.__exit__(exc_type, exc, traceback)
        for name in list(self.processes):
            self.kill(name)
        if exc is not None:
            for log in sorted(self.folder.glob("*.log")):
                exc.add_note(f"== {log.name}\n{log.read_text()[-3000:]}")

    # -- waiting ----------------------------------------------------------------------------------

    def wait(self, condition: Callable[[], bool], what: str, limit_s: float = LIMIT_S) -> None:
        """Until the condition holds; fails when a process dies that nobody killed."""

        def holds() -> bool:
            died = {n: p.poll() for n, p in self.processes.items() if n not in self._leaving}
            died = {name: code for name, code in died.items() if code}
            assert not died, f"died while waiting for {what}: {died}"
            return condition()

        wait_until(holds, what, limit_s)

    def reach(self, number: int, batches: int = 10, devices: list[str] | None = None) -> None:
        """Until each of the devices is so many batches into this round."""
        heard, names = self.hears.batches, devices or self.names
        self.wait(
            lambda: all(heard[name, number] >= batches for name in names),
            f"{batches} batches of round {number}",
        )

    def reach_round(self, number: int) -> None:
        """Until this round (or a later one) is announced."""
        hears = self.hears
        self.wait(
            lambda: hears.round is not None and hears.round.round >= number, f"round {number}"
        )

    def finish(self) -> None:
        """Until every process that is left has ended well."""
        for name in list(self.processes):
            assert self.end_of(name) == 0, name

    def end_of(self, name: str) -> int:
        """Until this process ends by itself; its exit code."""
        process = self.processes[name]
        self._leaving.add(name)
        self.wait(lambda: process.poll() is not None, f"the end of {name}")
        self._leaving.remove(name)
        _close_input(self.processes.pop(name))
        return process.returncode

    # -- looking ----------------------------------------------------------------------------------

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def metric(self, pattern: str) -> float:
        """Sum of the samples whose line matches; 0 while there is no answer."""
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=30
            ) as answer:
                text = answer.read().decode()
        except OSError:
            return 0.0
        return sum(
            float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if re.match(pattern, line)
        )

    def result(self) -> dict[str, Any]:
        run = (self.state / "current").read_text().strip()
        result: dict[str, Any] = json.loads((self.state / run / "result.json").read_text())
        return result

    def final_model(self) -> Model:
        store = Store(self.state)
        assert store.current() is not None
        checkpoint = store.latest()
        assert checkpoint is not None
        return checkpoint.model


def check_books(fleet: Fleet) -> list[dict[str, Any]]:
    """The history of the run, after looking whether both sides' accounts of every batch agree."""
    history: list[dict[str, Any]] = fleet.result()["history"]
    rounds = fleet.result()["settings"]["rounds"]
    assert [record["round"] for record in history] == list(range(1, rounds + 1))
    # A coordinator that is killed, or has ended, has no ears for the last reports.
    heard = {(name, *report.stamp[1:]): report.model_dump() for name, report in fleet.hears.reports}
    for record in history:
        for name, device in record["devices"].items():
            stamp = name, record["round"], record["attempt"]
            ours, theirs = device["account"], device.get("reported") or heard.get(stamp)
            _assert_balanced(ours, stamp)
            assert device["samples"] == BATCH_SIZE * ours["applied"], stamp
            if device["finished"]:
                assert theirs is not None, f"{stamp}: no report"
                assert {key: theirs[key] for key in ours} == ours, stamp
            elif theirs is not None:  # it knows what it made, the coordinator what it took
                assert theirs["produced"] >= ours["produced"], stamp
                assert theirs["applied"] <= ours["applied"], stamp
            device["reported"] = theirs
    for stamp, report in heard.items():  # of attempts that came to nothing, too
        _assert_balanced(report, stamp)
    _check_model(fleet.final_model(), fleet.result())
    return history


def _assert_balanced(account: Mapping[str, Any], stamp: tuple[str, int, int]) -> None:
    produced, applied, expired = account["produced"], account["applied"], account["expired"]
    assert expired >= 0, (stamp, account)
    assert produced == applied + sum(account["discarded"].values()) + expired, (stamp, account)


def _check_model(model: Model, result: Mapping[str, Any]) -> None:
    """All finite, and in the model is what is in the books: no batch twice, none besides."""
    for name, values in {**model.state, **model.momentum}.items():
        assert np.isfinite(values).all(), name
    folded = {device["device"]: device["samples"] for device in result["devices"]}
    applied: Counter[str] = Counter()
    finished = True
    for record in result["history"]:
        for name, device in record["devices"].items():
            applied[name] += device["samples"]
            finished = finished and device["finished"]
    assert int(model.state[DEEPEST_COUNTER]) * BATCH_SIZE == sum(folded.values())
    assert all(samples <= applied[name] for name, samples in folded.items())
    assert folded == applied or not finished, "nothing is left out of what everybody brought"


def _close_input(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()


def _toml(section: str, settings: Mapping[str, object]) -> str:
    """Simple values as lines, a mapping as a section of its own."""
    tables = {key: value for key, value in settings.items() if isinstance(value, Mapping)}
    lines = [f"{k} = {json.dumps(v)}" for k, v in settings.items() if k not in tables]
    text = "\n".join([f"[{section}]", *lines, ""])
    return text + "".join(_toml(f"{section}.{key}", table) for key, table in tables.items())
