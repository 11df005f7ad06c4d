"""A device's software is replaced over the air: real broker, processes and environments."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from coordinator.updates.book import Part, Reported, RolloutBook
from edge_agent.updates.bundle import BundleManifest, WheelFile
from edge_agent.updates.installing import VenvInstallation
from edge_agent.updates.slots import Slots
from edge_agent.updates.start import START
from ops import rollouts
from ops.bundles import make_bundle
from ops.files import to_toml
from ops.identity import FleetFolder, init_fleet
from tests.fleet_processes import wait_until
from tests.mosquitto_process import free_port
from tests.software_wheel import ROOT, link_dependencies, make_wheel

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1000)]

FLASHED = "0.1.0"
CRASHES = "raise RuntimeError('this version does not start')\n"
HANGS = """
import time


def serve_agent(*args: object, **kwargs: object) -> None:
    time.sleep(3600)
"""


class Device:
    """An agent that is started again whenever it ends, as systemd would."""

    def __init__(self, folder: Path, command: list[str], environment: Mapping[str, str]) -> None:
        self.log = folder / "log"
        self._command, self._environment = command, environment
        self._ending = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._ending.is_set():
            with self.log.open("ab") as log:
                self._process = subprocess.Popen(
                    self._command,
                    stdout=log,
                    stderr=log,
                    env=dict(self._environment),
                    start_new_session=True,
                )
            self._process.wait()
            _kill_group(self._process)
            self._ending.wait(0.2)

    def stop(self) -> None:
        self._ending.set()
        assert self._process is not None
        _kill_group(self._process)
        self._thread.join(30)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


class Lab:
    """A fleet of one device in a folder, its software flashed as version 0.1.0."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fleet: FleetFolder = init_fleet(
            folder / "plant",
            "plant",
            broker_names=["127.0.0.1"],
            port=free_port(),
            claims_port=free_port(),
        )
        folder.chmod(0o755)
        self.environment = os.environ | {
            "PYTHONPATH": str(link_dependencies(folder / "dependencies")),
            "OMP_NUM_THREADS": "1",
        }
        identity = self.fleet.add_device("cam-1")
        self.slots = Slots(folder / "updates")
        self.slots.folder.mkdir()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._flash(folder / "flashed")
        self._settings(identity)
        self.book = RolloutBook(self.fleet.fleet.roster, clock=time.time)
        self._start(str(self.fleet.broker_dir / "run.sh"), log="broker.log")
        config = str(self.fleet.coordinator_config)
        self._start(
            *(sys.executable, "-m", "ops.cli", "coordinator", "--config", config),
            *("--dataset", "fashion-mnist-small", "--set", "calibration_images=100"),
            *("--rounds", "1000", "--width", "4", "--set", "batches_per_round=4"),
            log="coordinator.log",
        )
        start = ["/bin/sh", str(START), str(self.slots.folder), str(folder / "flashed")]
        config = str(folder / "agent.toml")
        self.device = Device(folder, [*start, "agent", "--config", config], self.environment)

    def _flash(self, place: Path) -> None:
        wheel = make_wheel(self.folder / "flashed-wheel", FLASHED)
        manifest = BundleManifest(
            format=1,
            fleet="plant",
            version=FLASHED,
            signed=0,
            requirement="splitfleet[agent]",
            files=[WheelFile(name=wheel.name, sha256="0" * 64, size=1)],
        )
        before = os.environ.copy()
        os.environ.update(self.environment)
        try:
            installation = VenvInstallation(manifest, wheel.parent, place, clock=time.monotonic)
            wait_until(installation.poll, "the flashed version to be installed")
        finally:
            os.environ.clear()
            os.environ.update(before)

    def _settings(self, identity: Path) -> None:
        fleet = self.fleet.fleet.settings
        agent: dict[str, Any] = {
            "fleet": "plant",
            "device": "cam-1",
            "identity_dir": str(identity),
            "claims_port": fleet.claims_port,
            "state_dir": str(self.folder / "agent-state"),
            "updates_dir": str(self.slots.folder),
            "cut": 1,
            "shares": 100,
            "threads": 1,
        }
        broker = {"url": fleet.broker_url, "backoff_max_s": 2.0}
        text = to_toml({"broker": broker, "agent": agent})
        (self.folder / "agent.toml").write_text(text)

    def _start(self, *command: str, log: str) -> None:
        with (self.folder / log).open("ab") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True
            )
        self._processes.append(process)

    def stop(self) -> None:
        self.device.stop()
        for process in self._processes:
            _kill_group(process)
            process.wait(60)
        self.fleet.close()

    def roll_out(self, version: str, *, prove_s: float, **changes: str) -> str:
        """Roll a version out to everybody; the rollout's name."""
        files = {f"{name}.py".replace("__", "/"): text for name, text in changes.items()}
        make_wheel(self.folder / version, version, files)
        bundle = self.folder / f"{version}.tar"
        fleet = self.fleet.fleet
        signed = self.book.next_signed()
        make_bundle(self.folder / version, bundle, fleet.authority, signed=signed, extras=["agent"])
        made = rollouts.start(
            fleet,
            bundle,
            stages=["100%"],
            error_threshold="0%",
            prove_s=prove_s,
            patience_s=600,
        )
        return made.id

    def until(self, condition: Callable[[], object], what: str) -> None:
        try:
            wait_until(lambda: bool(condition()), what)
        except AssertionError:
            for log in ("log", "coordinator.log", "broker.log", "updates/install.log"):
                path = self.folder / log
                sys.stdout.write(f"== {log}\n{path.read_text()[-3000:] if path.exists() else ''}\n")
            raise

    def part(self, rollout: str) -> Part | None:
        return self.book.part(rollout, "cam-1")

    def progress(self, rollout: str) -> str | None:
        part = self.part(rollout)
        return None if part is None else part.progress

    @property
    def rollout_state(self) -> str:
        return self.book.rollouts()[0].state

    @property
    def says(self) -> Reported | None:
        return self.book.reported().get("cam-1")

    def runs(self, version: str) -> bool:
        return self.says is not None and self.says.version == version


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path)
    try:
        yield made
    finally:
        made.stop()


def test_good_versions_stay_and_bad_ones_are_taken_back(lab: Lab) -> None:
    lab.until(lambda: lab.runs(FLASHED), "the flashed version to come online")

    good = lab.roll_out("0.2.0", prove_s=120)
    lab.until(lambda: lab.progress(good) == "done", "0.2.0 to prove itself")
    lab.until(lambda: lab.rollout_state == "done", "the rollout to be over")
    assert (lab.slots.current, lab.slots.on_trial) == ("0.2.0", False)

    crashing = lab.roll_out("0.3.0", prove_s=120, edge_agent__service=CRASHES)
    lab.until(lambda: lab.progress(crashing) == "failed", "0.3.0 to be taken back")
    lab.until(lambda: lab.runs("0.2.0"), "0.2.0 to be back")
    lab.until(lambda: lab.rollout_state == "stopped", "the rollout to stop")
    assert lab.slots.current == "0.2.0"

    hanging = lab.roll_out("0.4.0", prove_s=5, ops__services=HANGS)
    lab.until(lambda: lab.progress(hanging) == "failed", "0.4.0 to be taken back")
    lab.until(lambda: lab.runs("0.2.0"), "0.2.0 to be back again")
    lab.until(lambda: lab.rollout_state == "stopped", "the rollout to stop")
    part = lab.part(hanging)
    assert part is not None
    assert "did not prove itself" in part.detail

    unusable = lab.roll_out("0.5.0", prove_s=120, ops__cli=CRASHES)
    lab.until(lambda: lab.progress(unusable) == "failed", "0.5.0 to be refused")
    part = lab.part(unusable)
    assert part is not None
    assert "this version does not start" in part.detail
    assert lab.slots.current == "0.2.0"
