"""The faults that matter most, with real processes on a real Mosquitto.

Every run must end, with every batch in exactly one account on both sides: see ``check_books``.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import resource
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.fleet_processes import LIMIT_S, QUOTA, Fleet, check_books
from tests.fleet_rubbish import throw_rubbish
from tests.mosquitto_process import Mosquitto
from tests.tcp_proxy import Proxy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1000)]

ANONYMOUS = "allow_anonymous true"
NOTICED_SOON: Mapping[str, object] = {"keepalive_s": 5, "connect_timeout_s": 3}
"""Who says nothing for 7.5 s is taken for dead."""


def attempts(history: list[dict[str, Any]]) -> list[int]:
    return [record["attempt"] for record in history]


def assert_all_applied(record: dict[str, Any], devices: list[str]) -> None:
    """These devices took part, and whatever they made was trained on."""
    assert sorted(record["devices"]) == sorted(devices)
    for name, device in record["devices"].items():
        account = device["account"]
        assert device["finished"], name
        assert account["applied"] == account["produced"] == QUOTA, (name, account)


def test_killed_agent_comes_back_and_goes_on_where_it_was(
    mosquitto: Mosquitto, tmp_path: Path
) -> None:
    with Fleet(tmp_path, mosquitto.url) as fleet:
        fleet.start()
        fleet.reach(1)
        fleet.kill("device-1")
        fleet.start_agent(1)
        fleet.finish()
        history = check_books(fleet)
    assert attempts(history) == [0, 0, 0]
    for record in history:
        assert_all_applied(record, fleet.names)


def test_round_closes_without_an_agent_that_never_comes_back(
    mosquitto: Mosquitto, tmp_path: Path
) -> None:
    with Fleet(
        tmp_path,
        mosquitto.url,
        coordinator={"round_deadline_s": 20},
        agent={"will_delay_s": 1},
    ) as fleet:
        fleet.start()
        fleet.reach(1)
        fleet.kill("device-1")
        fleet.finish()
        history = check_books(fleet)
    first = history[0]["devices"]
    assert first["device-0"]["account"]["applied"] == QUOTA
    assert not first["device-1"]["finished"]
    assert 0 < first["device-1"]["account"]["applied"] < QUOTA
    for record in history[1:]:
        assert_all_applied(record, ["device-0"])


def test_killed_coordinator_tries_the_round_again(mosquitto: Mosquitto, tmp_path: Path) -> None:
    with Fleet(tmp_path, mosquitto.url) as fleet:
        fleet.start()
        fleet.reach(2)
        fleet.kill("coordinator")
        fleet.start_coordinator()
        fleet.finish()
        history = check_books(fleet)
        interrupted = {name for name, report in fleet.hears.reports if report.stamp[1:] == (2, 0)}
    assert attempts(history) == [0, 1, 0]
    assert interrupted == set(fleet.names), "the void attempt has its accounts too"
    for record in history:
        assert_all_applied(record, fleet.names)


def test_coordinator_killed_while_it_writes_checkpoints(
    mosquitto: Mosquitto, tmp_path: Path
) -> None:
    tried_again: dict[int, bool] = {}
    with Fleet(tmp_path, mosquitto.url, coordinator={"rounds": 5}) as fleet:
        fleet.start()
        number = 1
        for _ in range(2):
            fleet.reach(number + 1)
            number, whole = _kill_while_writing(fleet)
            tried_again[number] = not whole
            fleet.start_coordinator()
        fleet.finish()
        history = check_books(fleet)
        leftovers = list(fleet.state.glob("*/checkpoints/.writing-*"))
    assert any(tried_again.values()), "killed in the middle of it"
    assert leftovers == []
    assert attempts(history) == [tried_again.get(number, False) for number in range(1, 6)]
    for record in history:
        assert_all_applied(record, fleet.names)


def _kill_while_writing(fleet: Fleet) -> tuple[int, bool]:
    """Kill the coordinator at its next checkpoint: of which round, and whether it is whole."""
    run = fleet.state / (fleet.state / "current").read_text().strip()
    folder, prefix = run / "checkpoints", ".writing-"
    deadline = time.monotonic() + LIMIT_S
    while not (writing := [path.name for path in folder.iterdir() if path.name[:9] == prefix]):
        assert time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.0005)
    fleet.kill("coordinator")
    return int(writing[0].removeprefix(prefix)), not (folder / writing[0]).exists()


def test_killed_broker_comes_back_without_memory(mosquitto: Mosquitto, tmp_path: Path) -> None:
    with Fleet(tmp_path, mosquitto.url) as fleet:
        fleet.start()
        fleet.reach(2)
        mosquitto.stop()
        mosquitto.start()
        fleet.finish()
        history = check_books(fleet)
    assert attempts(history) == [0, 0, 0]
    for record in history:
        assert_all_applied(record, fleet.names)


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder for the broker, who, started by root, becomes another user."""
    with tempfile.TemporaryDirectory(prefix="splitfleet-mosquitto-") as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


@pytest.mark.parametrize("kept", ["all", "a round ago"])
def test_broker_comes_back_with_its_memory(tmp_path: Path, memory: Path, kept: str) -> None:
    """Of the last moment, or, killed, of the last time that it saved: an old round's topics."""
    persistence = ("persistence true", f"persistence_location {memory}/", "autosave_interval 1800")
    with Mosquitto(ANONYMOUS, *persistence) as mosquitto, Fleet(tmp_path, mosquitto.url) as fleet:
        fleet.start()
        fleet.reach(1)
        if kept == "all":
            fleet.reach(2)
            mosquitto.end()
        else:
            mosquitto.signal(signal.SIGUSR1)  # save now
            fleet.wait((memory / "mosquitto.db").exists, "the broker's file")
            fleet.reach(2)
            mosquitto.stop()
        mosquitto.start()
        fleet.finish()
        history = check_books(fleet)
    assert attempts(history) == [0, 0, 0]
    for record in history:
        assert_all_applied(record, fleet.names)


def test_agent_frozen_beyond_the_deadline_brings_late_what_it_has(
    mosquitto: Mosquitto, tmp_path: Path
) -> None:
    with Fleet(tmp_path, mosquitto.url, coordinator={"round_deadline_s": 20}) as fleet:
        fleet.start()
        fleet.reach(1)
        fleet.freeze("device-1")
        fleet.reach_round(2)
        fleet.thaw("device-1")
        fleet.finish()
        history = check_books(fleet)
    assert attempts(history) == [0, 0, 0]
    brought = history[0]["devices"]["device-1"]
    assert 0 < brought["account"]["applied"] < QUOTA
    late = {"device": "device-1", "version": 0, "staleness": 1, "samples": brought["samples"]}
    assert history[1]["late"] == [late]
    for record in history[1:]:
        assert_all_applied(record, fleet.names)


@pytest.mark.parametrize("noticed", [False, True])
def test_frozen_coordinator(mosquitto: Mosquitto, tmp_path: Path, noticed: bool) -> None:
    """The devices go on as far as they may, or wait, if the broker takes it for dead."""
    with Fleet(
        tmp_path,
        mosquitto.url,
        coordinator={"gradient_timeout_s": 5},
        broker=NOTICED_SOON if noticed else {},
    ) as fleet:
        fleet.start()
        fleet.reach(2)
        thaw_at = time.monotonic() + 20
        fleet.freeze("coordinator")
        if noticed:
            fleet.wait(lambda: _coordinator_is(fleet, "offline"), "its last will")
        fleet.wait(lambda: time.monotonic() >= thaw_at, "20 s")
        fleet.thaw("coordinator")
        fleet.finish()
        history = check_books(fleet)
    assert attempts(history) == [0, 0, 0]
    for record in history:
        assert_all_applied(record, fleet.names)
    for device in history[1]["devices"].values():
        assert device["reported"]["timeouts"] > 0
        assert noticed or device["reported"]["late_gradients"] > 0


def _coordinator_is(fleet: Fleet, state: str) -> bool:
    said = fleet.hears.coordinator
    return said is not None and said.state == state


def test_frozen_broker(mosquitto: Mosquitto, tmp_path: Path) -> None:
    with Fleet(tmp_path, mosquitto.url, broker=NOTICED_SOON) as fleet:
        fleet.start()
        fleet.reach(2)
        thaw_at = time.monotonic() + 15
        mosquitto.signal(signal.SIGSTOP)
        fleet.wait(
            lambda: "no connection to the broker" in fleet.log("coordinator"), "it to be missed"
        )
        fleet.wait(lambda: time.monotonic() >= thaw_at, "15 s")
        mosquitto.signal(signal.SIGCONT)
        fleet.finish()
        history = check_books(fleet)
    assert attempts(history) == [0, 0, 0]
    for record in history:
        assert_all_applied(record, fleet.names)


def test_partitioned_device_comes_back(mosquitto: Mosquitto, tmp_path: Path) -> None:
    with (
        Proxy(mosquitto.port) as network,
        Fleet(tmp_path, mosquitto.url, agent={"will_delay_s": 1}, broker=NOTICED_SOON) as fleet,
    ):
        fleet.start_coordinator()
        fleet.start_agent(0)
        fleet.start_agent(1, network.url)
        fleet.reach(2)
        network.cut()
        fleet.wait(lambda: fleet.hears.state_of("device-1") == "offline", "its last will")
        fleet.wait(lambda: "no connection to the broker" in fleet.log("device-1"), "its notice")
        network.heal()
        fleet.finish()
        history = check_books(fleet)
    assert attempts(history) == [0, 0, 0]
    for record in history:
        assert_all_applied(record, fleet.names)


def test_slow_link_slows_only_the_round(mosquitto: Mosquitto, tmp_path: Path) -> None:
    with (
        Proxy(mosquitto.port, bytes_per_s=100_000, latency_s=0.1) as network,
        Fleet(tmp_path, mosquitto.url) as fleet,
    ):
        fleet.start_coordinator()
        fleet.start_agent(0)
        fleet.start_agent(1, network.url)
        fleet.finish()
        history = check_books(fleet)
    assert attempts(history) == [0, 0, 0]
    for record in history:
        assert_all_applied(record, fleet.names)
        reported = {name: device["reported"] for name, device in record["devices"].items()}
        assert all(report["timeouts"] == 0 for report in reported.values()), reported


def test_coordinator_resumes_when_its_full_disk_has_room_again(
    mosquitto: Mosquitto, tmp_path: Path
) -> None:
    with Fleet(tmp_path, mosquitto.url) as fleet, small_disk(fleet) as (fill, empty):
        fleet.start()
        fleet.reach(2)
        fill()
        assert fleet.end_of("coordinator") == 5
        last_line = fleet.log("coordinator").splitlines()[-1]
        fleet.wait(lambda: _coordinator_is(fleet, "offline"), "its last will")
        empty()
        fleet.start_coordinator()
        fleet.finish()
        history = check_books(fleet)
        leftovers = list(fleet.state.glob("*/checkpoints/.writing-*"))
    assert "cannot write" in last_line
    assert "free space or choose another folder" in last_line
    assert leftovers == []
    assert attempts(history) == [0, 1, 0]
    for record in history:
        assert_all_applied(record, fleet.names)


@contextlib.contextmanager
def small_disk(fleet: Fleet) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """Functions that leave the coordinator no room on its disk, and that give it back.

    With a small file system where this process may mount one, else with a limit on file sizes.
    """
    fleet.state.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(fleet.state)]
    ballast = fleet.state / "ballast"

    def fill() -> None:
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass

    def limit() -> None:
        pid = fleet.processes["coordinator"].pid
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (64 << 10, 64 << 10))

    if os.geteuid() == 0 and subprocess.run(mount, check=False).returncode == 0:
        try:
            yield fill, ballast.unlink
        finally:
            subprocess.run(["umount", "--lazy", str(fleet.state)], check=True)
    else:
        yield limit, lambda: None


def test_rubbish_on_a_devices_topics_is_counted_and_dropped(
    mosquitto: Mosquitto, tmp_path: Path, rng: random.Random
) -> None:
    with Fleet(tmp_path, mosquitto.url, coordinator={"quarantine_s": 0}) as fleet:
        fleet.start()
        fleet.reach(1)
        wanted = throw_rubbish(fleet.hears, "device-1", rng)
        for name, count in wanted.items():
            fleet.wait(partial(_counted, fleet, name, count), f"{count} {name}")
        fleet.finish()
        history = check_books(fleet)
    assert attempts(history) == [0, 0, 0]
    account = history[0]["devices"]["device-1"]["account"]
    assert account["discarded"] == {"bad_labels": 1, "not_finite": 1, "wrong_shape": 1}
    assert account["applied"] == QUOTA - 3
    assert history[0]["devices"]["device-0"]["account"]["applied"] == QUOTA
    for record in history[1:]:
        assert_all_applied(record, fleet.names)


def _counted(fleet: Fleet, name: str, count: int) -> bool:
    return fleet.metric(re.escape(name)) >= count
