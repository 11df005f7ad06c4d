"""The life of a device's identity, on a real broker with real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from coordinator.identity.registration import Lifetimes
from edge_agent.identity.folder import IdentityFolder
from ops.files import to_toml
from ops.identity import FleetFolder, init_fleet
from tests.fleet_processes import wait_until
from tests.mosquitto_process import Mosquitto, free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1000)]

LIFE_S = 30.0
NETWORK = {"width": 4, "channels": 1, "size": 28, "classes": 10}
COMMAND = (sys.executable, "-m", "ops.cli")


class Place(Mosquitto):
    """A fleet whose devices' certificates live for less than a minute, its broker and processes."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._logs = folder
        self.metrics_port = free_port()
        self.fleet: FleetFolder = init_fleet(
            self.folder / "fleet",
            "test",
            broker_names=[self.host],
            port=self.port,
            claims_port=free_port(),
            lifetimes=Lifetimes(device_days=LIFE_S / 86_400),
        )
        self.processes = ExitStack()

    def command(self) -> list[str]:
        return [str(self.fleet.broker_dir / "run.sh")]

    def process(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        with (self._logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [*COMMAND, *command, "--until-eof"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        self.processes.callback(end, process)
        return process

    def said(self, name: str) -> str:
        return (self._logs / f"{name}.log").read_text()

    def applied(self) -> int:
        """How many batches the coordinator has trained on; asked for a few times a second."""
        time.sleep(0.2)
        url = f"http://127.0.0.1:{self.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=60) as answer:
            text = answer.read().decode()
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        return int(
            sum(float(line.split()[-1]) for line in lines if "batches_applied_total" in line)
        )


def end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
    process.wait(60)
    assert process.stdin is not None
    process.stdin.close()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with Place(tmp_path) as running, running.fleet, running.processes:
        yield running


def agent_settings(place: Place, folder: Path) -> Path:
    settings = place.fleet.fleet.settings
    file = folder / "agent.toml"
    agent = {
        "fleet": "test",
        "device": "auto",
        "device_prefix": "pi-",
        "identity_dir": str(folder / "identity"),
        "claims_port": settings.claims_port,
        "state_dir": str(folder / "state"),
        "cut": 1,
        "threads": 1,
        "heartbeat_s": 2.0,
    }
    broker = {"url": settings.broker_url, "backoff_max_s": 2.0}
    file.write_text(to_toml({"broker": broker, "agent": agent}))
    return file


def test_from_a_token_to_a_revoked_device(place: Place, tmp_path: Path) -> None:
    identity = IdentityFolder(tmp_path / "identity")
    settings = agent_settings(place, tmp_path)
    network = to_toml({"coordinator": {"network": NETWORK}}).removeprefix("[coordinator]\n")
    config = tmp_path / "coordinator.toml"
    config.write_text(place.fleet.coordinator_config.read_text() + network)
    place.process(
        "coordinator",
        *("coordinator", "--config", str(config)),
        *("--metrics-port", str(place.metrics_port)),
        *("--rounds", "100000", "--min-devices", "1"),
        *("--set", "batches_per_round=40", "--set", "batch_size=16", "--set", "threads=1"),
    )

    wait_until(lambda: "connected to" in place.said("coordinator"), "the coordinator")
    identity.put_token(place.fleet.token(uses=1, days=1.0))

    def certificate() -> bytes:
        return identity.device_file.read_bytes()

    agent = place.process("agent", "agent", "--config", str(settings))
    wait_until(lambda: identity.enrolled, "enrolment")
    first = certificate()
    wait_until(lambda: not identity.claim_file.exists(), "the claim to be wiped")
    name = identity.for_fleet().name
    assert name.startswith("pi-")
    wait_until(lambda: place.applied() > 0, "training")

    wait_until(lambda: "renewed until" in place.said("agent"), "renewal")
    assert certificate() != first
    trained = place.applied()
    wait_until(lambda: place.applied() > trained, "training with the next certificate")
    assert "enrol" not in place.said("agent").partition("renewed until")[2]

    end(agent)
    ended = certificate()
    wait_until(lambda: has_ended(identity), "the certificate's end")
    agent = place.process("agent", "agent", "--config", str(settings))
    wait_until(lambda: certificate() != ended, "the way back")
    trained = place.applied()
    wait_until(lambda: place.applied() > trained, "training after the way back")

    place.fleet.revoke(name)
    wait_until(lambda: "refuse" in place.said("agent").rpartition("connected to")[2], "the cut")
    trained, kept = place.applied(), certificate()
    wait_until(lambda: place.said("agent").count("not enrolled yet") > 0, "the second door")
    assert (place.applied(), certificate()) == (trained, kept)


def has_ended(identity: IdentityFolder) -> bool:
    facts = subprocess.run(
        (*COMMAND, "device", "show", "--json", "--identity", str(identity.folder)),
        check=True,
        capture_output=True,
        timeout=60,
    )
    return bool(json.loads(facts.stdout)["ended"])
