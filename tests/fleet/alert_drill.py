"""A fleet of real processes that a real Prometheus watches, thirty times as fast as in production.

The rules and Alertmanager's configuration are those of ``ops/``, with every duration divided.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.alertmanager_process import Receiver, alertmanager
from tests.fleet_processes import Fleet
from tests.mosquitto_process import Mosquitto
from tests.prometheus_process import Prometheus

ROOT = Path(__file__).parents[2]
FASTER = 30
FIRE_S = 300.0
"""The longest that an alert may take to fire or to resolve, here."""

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_DURATION = re.compile(r"(\[|for: |group_wait: |group_interval: |repeat_interval: )(\d+)([smhd])\b")


def hasten(text: str) -> str:
    """The same rules or routes with all their durations divided by :data:`FASTER`."""

    def divided(found: re.Match[str]) -> str:
        milliseconds = 1000 * int(found[2]) * _SECONDS[found[3]] // FASTER
        return f"{found[1]}{milliseconds}ms"

    return _DURATION.sub(divided, text)


class Drill:
    """A fleet, who watches it, and who is told. Alerts are written ``name/severity``."""

    def __init__(self, fleet: Fleet, broker: Mosquitto, watch: Prometheus, told: Receiver) -> None:
        self.fleet = fleet
        self.broker = broker
        self.prometheus = watch
        self.told = told

    def calm(self) -> None:
        """Until all devices are online, a round is on its way and no alert is pending."""
        everybody = len(self.fleet.names)

        def is_calm() -> bool:
            return (
                self.value('splitfleet_devices{state="online"}') == everybody
                and self.value('splitfleet_run_phase{phase="training"}') == 1
                and not self.prometheus.query('ALERTS{alertname=~"Splitfleet.+"}')
                and not self.told.firing
            )

        self.wait(is_calm, "the fleet to be well")

    def fires(self, alert: str) -> None:
        """Until the receiver is told that it fires."""
        self.wait(lambda: alert in self.told.firing, f"{alert} to fire")

    def resolves(self, alert: str) -> None:
        """Until the receiver is told that it is over."""
        self.wait(lambda: alert not in self.told.firing, f"{alert} to resolve")

    def value(self, expression: str) -> float | None:
        """Of a query with one sample; None without."""
        found = self.prometheus.query(expression)
        return float(found[0]["value"][1]) if len(found) == 1 else None

    @contextlib.contextmanager
    def only(self, *alerts: str) -> Iterator[None]:
        """Within, the receiver is told of these alerts and of no other."""
        self.calm()
        before = len(self.told.told)
        yield
        assert {name for name, _ in self.told.told[before:]} == set(alerts)

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """As the fleet's, for what is asked over HTTP or does something itself."""

        def look() -> bool:
            time.sleep(0.3)
            return condition()

        self.fleet.wait(look, what, FIRE_S)


@contextlib.contextmanager
def start_drill(folder: Path, **settings: Any) -> Iterator[Drill]:
    """A running fleet with everything around it; ``settings`` are those of :class:`Fleet`."""
    rules = folder / "rules.yml"
    rules.write_text(hasten((ROOT / "ops/prometheus/rules/alerts.yml").read_text()))
    routes = yaml.safe_load(hasten((ROOT / "ops/alertmanager/alertmanager.yml").read_text()))
    with contextlib.ExitStack() as stack:
        told = stack.enter_context(Receiver())
        for receiver in routes["receivers"]:
            receiver["webhook_configs"] = [{"url": told.url}]
        router = stack.enter_context(alertmanager(folder / "alertmanager", yaml.safe_dump(routes)))
        alerting = {"alertmanagers": [{"static_configs": [{"targets": [router]}]}]}
        broker = stack.enter_context(Mosquitto("allow_anonymous true"))
        fleet = stack.enter_context(Fleet(folder, broker.url, **settings))
        fleet.start()
        fleet.reach(1, 1)
        watch = Prometheus(
            folder / "prometheus",
            {"splitfleet-coordinator": f"127.0.0.1:{fleet.metrics_port}"},
            configuration=yaml.safe_dump({"rule_files": [str(rules)], "alerting": alerting}),
        )
        yield Drill(fleet, broker, stack.enter_context(watch), told)
