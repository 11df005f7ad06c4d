from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from ops.agent_metrics import AgentMetrics
from ops.metrics_document import document, filled
from tests.reporters import counted_reporter

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"


def test_the_document_is_that_of_the_code() -> None:
    """Else: python -m ops.metrics_document > docs/metrics.md."""
    assert DOCUMENT.read_text("utf-8") == document()


def test_every_family_is_written_with_its_labels() -> None:
    for family in filled().registry.collect():
        assert family.samples, family.name
        assert family.documentation, family.name


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
@pytest.mark.parametrize("whose", ["coordinator", "agent"])
def test_promtool_has_nothing_to_say(whose: str) -> None:
    metrics = filled() if whose == "coordinator" else AgentMetrics(counted_reporter())
    said = subprocess.run(
        ["promtool", "check", "metrics"],
        input=generate_latest(metrics.registry),
        capture_output=True,
        timeout=250,
        check=False,
    )
    assert (said.returncode, said.stdout.decode(), said.stderr.decode()) == (0, "", "")


def test_an_agent_shows_its_own_counts() -> None:
    text = generate_latest(AgentMetrics(counted_reporter()).registry).decode()
    lines = text.splitlines()
    assert 'splitfleet_predictions_total{answered_by="exit"} 2.0' in lines
    assert 'splitfleet_predictions_total{answered_by="server"} 0.0' in lines
    assert "splitfleet_round_trip_seconds_count 1.0" in lines
    assert "splitfleet_exit_threshold 0.7" in lines
    assert "_created" not in text
