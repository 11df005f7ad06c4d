"""docker-compose.yml as it is, its images built from ops/docker/Dockerfile, as containers.

``scripts/compose`` makes the images that would come from a registry; the first time takes long.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.mosquitto_process import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

COMPOSE = Path(__file__).parents[2] / "scripts" / "compose"
AGENTS, BATCHES = 8, 10
BUILD_S, ROUND_S, DOWN_S, COMMAND_S = 1500.0, 900.0, 400.0, 180.0


class Containers:
    """The project under a name and on ports of its own."""

    def __init__(self) -> None:
        self.prometheus = free_port()
        self._environment = {
            **os.environ,
            "COMPOSE_PROJECT_NAME": "splitfleet-test",
            "MQTT_PORT": str(free_port()),
            "MQTT_CLAIMS_PORT": str(free_port()),
            "PROMETHEUS_PORT": str(self.prometheus),
            "ALERTMANAGER_PORT": str(free_port()),
            "SPLITFLEET_COORDINATOR_BATCHES_PER_ROUND": str(BATCHES),
            "SPLITFLEET_COORDINATOR_ROUNDS": "1",
            "SPLITFLEET_COORDINATOR_MIN_DEVICES": str(AGENTS),
        }

    def compose(self, *arguments: str, limit_s: float = COMMAND_S) -> str:
        done = self.call(*arguments, limit_s=limit_s)
        assert done.returncode == 0, f"{done.args}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
        return done.stdout

    def call(self, *arguments: str, limit_s: float = COMMAND_S) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["timeout", "--kill-after=10", f"{limit_s}", COMPOSE, *arguments],  # with its children
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    def of(self, service: str) -> list[str]:
        """The names of a service's containers."""
        labels = ("project=splitfleet-test", f"service={service}")
        filters = [f"--filter=label=com.docker.compose.{label}" for label in labels]
        return self.compose("podman", "ps", *filters, "--format={{.Names}}").split()

    def inspect(self, name: str) -> dict[str, Any]:
        found: list[dict[str, Any]] = json.loads(self.compose("podman", "inspect", name))
        return found[0]

    def ask(self, path: str) -> Any:
        """What Prometheus' HTTP API answers."""
        address = f"http://127.0.0.1:{self.prometheus}/api/v1/{path}"
        with urllib.request.urlopen(address, timeout=60) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> dict[str, float]:
        """An instant query: values by their only label."""
        found = self.ask(f"query?query={urllib.parse.quote(expression)}")["result"]
        return {next(iter(r["metric"].values()), ""): float(r["value"][1]) for r in found}

    def rules(self) -> list[str]:
        """How every rule fares."""
        groups = self.ask("rules")["groups"]
        return [rule["health"] for group in groups for rule in group["rules"]]

    def wait(self, condition: Callable[[], bool], what: str, limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            try:
                if condition():
                    return
            except OSError:
                pass  # not up yet
            time.sleep(1)
        pytest.fail(f"{what} did not come in {limit_s:.0f} s\n{self.logs()}")

    def log(self, name: str) -> str:
        """What a container has said."""
        done = self.call("podman", "logs", name)
        return done.stdout + done.stderr

    def logs(self) -> str:
        parts = []
        for service in ("init", "mosquitto", "coordinator", "agent", "prometheus", "alertmanager"):
            done = self.call("logs", service)
            parts.append(f"== {service}\n{(done.stdout + done.stderr)[-2000:]}")
        return "\n".join(parts)


@pytest.fixture(scope="module")
def containers() -> Iterator[Containers]:
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        pytest.skip("podman and Debian's packages are missing: they need root and apt-get")
    fleet = Containers()
    fleet.compose("down", "--volumes", limit_s=DOWN_S)  # what a run that was killed has left
    fleet.compose("build", limit_s=BUILD_S)
    try:
        fleet.compose("up", "--detach", "--scale", f"agent={AGENTS}")
        yield fleet
    finally:
        fleet.compose("down", "--volumes", limit_s=DOWN_S)


def test_eight_agents_train_a_round_and_prometheus_sees_them(containers: Containers) -> None:
    containers.wait(
        lambda: containers.query('sum(splitfleet_rounds_total{outcome="closed"})') == {"": 1},
        "the first round",
        ROUND_S,
    )
    assert containers.query('sum(splitfleet_devices{state="online"})') == {"": AGENTS}
    assert containers.query("sum by (job) (up)") == {
        "alertmanager": 1,
        "prometheus": 1,
        "splitfleet-coordinator": 1,
    }
    samples = containers.query("sum by (cut) (splitfleet_samples_applied_total)")
    assert samples == dict.fromkeys(("2", "3", "4", "5"), 2 * BATCHES * 32)
    assert len(containers.ask("alertmanagers")["activeAlertmanagers"]) == 1
    containers.wait(lambda: set(containers.rules()) == {"ok"}, "alerts that work", COMMAND_S)


@pytest.mark.parametrize(
    "service", ["mosquitto", "coordinator", "agent", "prometheus", "alertmanager"]
)
def test_every_container_is_healthy_and_confined(containers: Containers, service: str) -> None:
    names = containers.of(service)
    assert len(names) == (AGENTS if service == "agent" else 1)
    for name in names:
        containers.compose("podman", "healthcheck", "run", name)
        about = containers.inspect(name)
        assert about["HostConfig"]["ReadonlyRootfs"]
        assert about["HostConfig"]["Memory"] > 0
        assert not about["EffectiveCaps"]
        user = containers.compose("podman", "exec", name, "id", "-u").strip()
        assert user != "0"


def test_a_revoked_agent_stays_out_and_others_come_back(containers: Containers) -> None:
    *others, bad = containers.of("agent")
    name = containers.compose(
        "podman", "exec", bad, "sh", "-c", "grep -l $(hostname) /fleet/devices/*/lock"
    ).split("/")[3]
    (coordinator,) = containers.of("coordinator")
    containers.compose("podman", "exec", coordinator, "splitfleet", "fleet", "revoke", name)
    containers.wait(
        lambda: "certificate: it is revoked" in containers.log(bad), "the refusal", COMMAND_S
    )
    for other in others:
        assert "certificate: it is revoked" not in containers.log(other)


def test_agents_that_start_again_are_who_they_were(containers: Containers) -> None:
    agents = containers.of("agent")

    def places() -> str:
        return containers.compose(
            "podman", "exec", agents[0], "sh", "-c", "grep . /fleet/devices/*/lock"
        )

    before = places()
    assert len(before.splitlines()) == AGENTS
    containers.compose("podman", "stop", *agents)
    containers.compose("podman", "start", *reversed(agents))
    containers.wait(lambda: len(places().splitlines()) == AGENTS, "agents", COMMAND_S)
    assert places() == before
