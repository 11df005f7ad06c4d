"""The alerts: sound rules, each tested at its real times and explained in the runbook."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.prometheus_process import need

ROOT = Path(__file__).parents[2]
RULES = sorted((ROOT / "ops/prometheus/rules").glob("*.yml"))
CASES = sorted((ROOT / "tests/ops/alerts").glob("*.yml"))
RUNBOOK = ROOT / "docs/runbook.md"
METRICS = ROOT / "docs/metrics.md"
"""Lists all; a test of its own holds it to the code."""


def alerts() -> list[dict[str, Any]]:
    groups = [group for file in RULES for group in yaml.safe_load(file.read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"] if "alert" in rule]


def outcomes() -> dict[str, list[bool]]:
    """Alert → for each test that asks for it, whether it ever fires there."""
    found: dict[str, list[bool]] = {}
    for file in CASES:
        for test in yaml.safe_load(file.read_text())["tests"]:
            asked: dict[str, bool] = {}
            for at in test["alert_rule_test"]:
                name = at["alertname"]
                asked[name] = asked.get(name, False) or bool(at["exp_alerts"])
            for name, fires in asked.items():
                found.setdefault(name, []).append(fires)
    return found


ALERTS = alerts()
NAMES = sorted({alert["alert"] for alert in ALERTS})


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run(
        [need("promtool"), *arguments], check=False, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_rules_are_sound() -> None:
    promtool("check", "rules", *RULES)


@pytest.mark.parametrize("cases", CASES, ids=lambda path: path.stem)
def test_alerts_fire_and_resolve_at_their_times(cases: Path) -> None:
    promtool("test", "rules", cases)


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    found = outcomes()
    assert sorted(found) == NAMES
    for name, fires in found.items():
        assert set(fires) == {True, False}, name


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_alert_says_what_is_wrong_and_where_to_read_on(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in {"warning", "critical"}
    assert alert["for"]
    said = alert["annotations"]
    assert said.keys() == {"summary", "description", "runbook"}
    assert said["runbook"] == f"docs/runbook.md#{alert['alert'].lower()}"


def test_runbook_has_a_section_for_each_alert_and_no_other() -> None:
    sections = re.findall(r"^## (Splitfleet\w+)$", RUNBOOK.read_text(), re.MULTILINE)
    assert sections == sorted(sections)
    assert sections == NAMES


@pytest.mark.parametrize("file", [*RULES, *CASES, RUNBOOK], ids=lambda path: path.stem)
def test_metrics_exist(file: Path) -> None:
    known = set(re.findall(r"^\| `(splitfleet_\w+)`", METRICS.read_text(), re.MULTILINE))
    named = set(re.findall(r"splitfleet_\w+", file.read_text()))
    assert named
    assert named - known == set()
