from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from ops.dashboards import FOLDER, dashboards, text_of, write
from ops.metrics_document import filled
from tests.prometheus_process import need

FILES = sorted(FOLDER.glob("*.json"))
Json = dict[str, Any]

each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


@pytest.fixture(scope="module")
def exposed() -> dict[str, set[str]]:
    """Names that a coordinator exposes, with their labels, once everything has happened."""
    found: dict[str, set[str]] = {"up": {"instance"}}
    for family in text_string_to_metric_families(generate_latest(filled().registry).decode()):
        for sample in family.samples:
            found.setdefault(sample.name, {"instance"}).update(sample.labels)
    return found


def read(file: Path) -> Json:
    made: Json = json.loads(file.read_text("utf-8"))
    return made


def panels(dashboard: Json) -> list[Json]:
    """Panels that show something."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def expressions(dashboard: Json) -> Iterator[tuple[str, str]]:
    """Panel's title and expression, of all queries."""
    for panel in panels(dashboard):
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


def substituted(expression: str) -> str:
    """With something for each variable, as Prometheus takes it."""
    expression = expression.replace("$__rate_interval", "1m")
    return re.sub(r"\$\w+", "x", expression)


def test_the_files_are_what_the_code_makes() -> None:
    made = {f"{name}.json": text_of(dashboard) for name, dashboard in dashboards().items()}
    assert made == {file.name: file.read_text("utf-8") for file in FILES}, (
        "the dashboards were changed: python -m ops.dashboards writes their files"
    )


def test_writing_changes_only_what_has_changed_and_takes_away_the_rest(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("{}")
    assert {path.name for path in write(tmp_path)} == {"old.json", *(file.name for file in FILES)}
    assert {path.name for path in tmp_path.iterdir()} == {file.name for file in FILES}
    (tmp_path / "fleet.json").write_text("{}")
    assert write(tmp_path) == [tmp_path / "fleet.json"]
    assert write(tmp_path) == []


def test_dashboards_lead_to_each_other() -> None:
    made = [read(file) for file in FILES]
    uids = [dashboard["uid"] for dashboard in made]
    assert len(set(uids)) == len(uids) == 5
    for dashboard in made:
        assert dashboard["schemaVersion"] == 42
        [link] = dashboard["links"]
        assert set(link["tags"]) <= set(dashboard["tags"])
        assert link["includeVars"]
        assert link["keepTime"]
        for uid in re.findall(r"/d/([\w-]+)", json.dumps(dashboard)):
            assert uid in uids


@each_file
def test_every_panel_says_what_it_shows(file: Path) -> None:
    dashboard = read(file)
    titles = [panel["title"] for panel in panels(dashboard)]
    assert len(set(titles)) == len(titles)
    for panel in panels(dashboard):
        assert panel["description"].endswith("."), panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}", panel["title"]
        assert panel["targets"], panel["title"]
        by_column = panel["fieldConfig"]["overrides"]
        assert panel["fieldConfig"]["defaults"].get("unit") or by_column, panel["title"]


@each_file
def test_a_panel_that_may_be_empty_says_why(file: Path) -> None:
    for panel in panels(read(file)):
        may_be_empty = "empty where" in panel["description"].lower()
        assert may_be_empty == ("noValue" in panel["fieldConfig"]["defaults"]), panel["title"]


@each_file
def test_panels_fill_the_grid_without_overlap(file: Path) -> None:
    taken: dict[tuple[int, int], str] = {}
    ids = set()
    for panel in read(file)["panels"]:
        place = panel["gridPos"]
        ids.add(panel["id"])
        assert place["x"] + place["w"] <= 24, panel["title"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, f"{panel['title']} is on {taken[x, y]}"
                taken[x, y] = panel["title"]
    assert len(ids) == len(read(file)["panels"])
    assert len(taken) == 24 * (1 + max(y for _, y in taken)), "a row is not full"


@each_file
def test_queries_ask_for_one_fleet_and_for_what_is_chosen(file: Path) -> None:
    dashboard = read(file)
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard["panels"])))
    assert variables <= used
    for title, expression in expressions(dashboard):
        assert set(re.findall(r"\$(\w+)", expression)) <= {*variables, "__rate_interval"}, title
        assert expression.count("{") == expression.count('{instance="$coordinator"'), title
        # What is not there must be seen: an expression is never filled up with zeros.
        assert "vector(" not in expression, title


@each_file
def test_what_is_asked_for_is_exposed(file: Path, exposed: dict[str, set[str]]) -> None:
    for panel in panels(read(file)):
        for target in panel["targets"]:
            expression, where = target["expr"], f"{panel['title']}: {target['expr']}"
            selected = dict(re.findall(r"(\w+)\{([^}]*)\}", expression))
            assert selected, where
            for name, matchers in selected.items():
                assert name in exposed, where
                assert set(re.findall(r"(\w+)[=!]", matchers)) <= exposed[name], where
            shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            for by in re.findall(r"by \(([^)]*)\)", expression):
                shown.update(by.split(", "))
            known = set().union(*(exposed[name] for name in selected))
            assert shown <= known, where


def test_prometheus_understands_every_query(tmp_path: Path) -> None:
    promtool = need("promtool")
    found = [query for file in FILES for query in expressions(read(file))]
    rules = [
        {"record": "x", "expr": substituted(query), "labels": {"n": f"{n} {title}"}}
        for n, (title, query) in enumerate(found)
    ]
    file = tmp_path / "rules.yml"
    file.write_text(json.dumps({"groups": [{"name": "dashboards", "rules": rules}]}))
    checked = subprocess.run(
        [promtool, "check", "rules", "--lint=none", str(file)],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr
    assert f"{len(found)} rules found" in checked.stdout
