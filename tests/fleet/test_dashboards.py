"""Every query of every dashboard has an answer: a real Prometheus that has scraped a real fleet."""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from edge_agent.readings import THERMAL, hottest
from ops.dashboards import FOLDER
from ops.identity import init_fleet
from tensors.datasets import BUNDLED
from tests.fleet_processes import FLEET, NETWORK, Fleet
from tests.http_agent import picture, post
from tests.mosquitto_process import Mosquitto, free_port
from tests.prometheus_process import BadQuery, Prometheus

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CUTS = (1, 1, 2, 2, 3, 3, 4, 4)
COORDINATOR = {
    "precision": "fp32",
    "memory_format": "contiguous",
    "dataset": BUNDLED,
    "rounds": 2,
    "batches_per_round": 6,
    "exit_policy": "offload:0.5",
    "calibration_images": 200,
    "audit_share": 0.3,
    "inference": True,
    "stay": True,
    "broker_figures": True,
    "clip_norm": 30.0,
    "noise_std": 0.2,
    "network": {**NETWORK, "norm": "group"},
}
AGENT = {
    "precision": "fp32",
    "memory_format": "contiguous",
    "exit_when_finished": False,
    "heartbeat_s": 2.0,
    "telemetry_s": 1.0,
    "device_class": "raspberry-pi-4",
    "radio": "wifi",
}
SENSORLESS = hottest(THERMAL.glob("thermal_zone*/temp")) is None
SCRAPED_S = 1.0
WINDOW = "30s"
"""In the place of ``$__rate_interval``."""
RUN_S = 600.0
SETTLED_S = 60.0
"""How long after the last thing that is waited for it may take to be in Prometheus."""


@contextmanager
def asking(address: str) -> Iterator[None]:
    """Somebody posts pictures to a device, one after another."""
    enough = threading.Event()

    def ask() -> None:
        while not enough.wait(0.2):
            post(address, picture(size=28))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        enough.set()
        thread.join()


def queries() -> Iterator[tuple[str, dict[str, Any], str, str]]:
    """File, variables, panel and expression; the marks of alerts need no answer."""
    for file in sorted(FOLDER.glob("*.json")):
        dashboard = json.loads(file.read_text("utf-8"))
        variables = {one["name"]: one for one in dashboard["templating"]["list"]}
        for panel in dashboard["panels"]:
            for target in panel.get("targets", []):
                yield file.stem, variables, panel["title"], target["expr"]


def fill(expression: str, variables: dict[str, Any], prometheus: Prometheus) -> str:
    """With what Grafana would find for each variable: the first value, or all of them."""

    def value(found: re.Match[str]) -> str:
        name = found[1]
        if name == "__rate_interval":
            return WINDOW
        asked = re.fullmatch(r"label_values\((.+), (\w+)\)", variables[name]["definition"])
        assert asked is not None, name
        values = prometheus.label_values(fill(asked[1], variables, prometheus), asked[2])
        assert values, f"${name} has no values"
        return f"({'|'.join(values)})" if variables[name]["multi"] else values[0]

    return re.sub(r"\$(\w+)", value, expression)


def unanswered(prometheus: Prometheus, start: float) -> list[str]:
    """Queries without a finite number since ``start``, and those that are refused."""
    end = time.time()
    found = []
    for file, variables, panel, expression in queries():
        if SENSORLESS and "splitfleet_temperature_celsius" in expression:
            continue
        try:
            asked = fill(expression, variables, prometheus)
            series = prometheus.query_range(asked, start, end, 2 * SCRAPED_S)
        except (BadQuery, AssertionError) as exc:
            found.append(f"{file}: {panel}: {exc}: {expression}")
            continue
        if not any(math.isfinite(float(value)) for one in series for _, value in one["values"]):
            found.append(f"{file}: {panel}: nothing: {asked}")
    return found


def test_every_panel_of_every_dashboard_shows_something(
    mosquitto: Mosquitto, tmp_path: Path
) -> None:
    http = f"127.0.0.1:{free_port()}"
    start = time.time()
    init_fleet(tmp_path / "identity", FLEET, broker_names=["localhost"]).close()
    coordinator = COORDINATOR | {"fleet_dir": str(tmp_path / "identity")}
    with Fleet(tmp_path, mosquitto.url, cuts=CUTS, coordinator=coordinator, agent=AGENT) as fleet:
        jobs = {"splitfleet-coordinator": f"127.0.0.1:{fleet.metrics_port}"}
        with Prometheus(tmp_path / "prometheus", jobs, interval_s=SCRAPED_S) as prometheus:
            fleet.start_coordinator()
            fleet.start_agent(0, flags=["--http", http])
            for number in range(1, len(CUTS)):
                fleet.start_agent(number)
            with asking(http):
                finished = r'splitfleet_run_phase\{phase="finished"\} '
                fleet.wait(lambda: fleet.metric(finished) == 1, "the end of the run", RUN_S)
                end = time.monotonic() + SETTLED_S
                while (empty := unanswered(prometheus, start)) and time.monotonic() < end:
                    time.sleep(SCRAPED_S)
    assert not empty, "\n".join(empty)
