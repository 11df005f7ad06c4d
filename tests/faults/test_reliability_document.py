"""docs/reliability.md says what the tests assert, and names what exists."""

from __future__ import annotations

import re
from pathlib import Path

from coordinator.traffic import Traffic
from ops.metrics import Metrics
from tests.faults.figures import matrix, summary
from tests.faults.test_soak import LONG

ROOT = Path(__file__).parents[2]
VARIABLE = (
    r"device-\d|\d+(?: %)?|…(?:/checkpoints: No space left on device)?|\(.*?\)|mqtt://|: \w+$"
)
"""What stands in a line for a name or a number, or comes from elsewhere."""
DOCUMENT = (ROOT / "docs" / "reliability.md").read_text("utf-8")


def test_the_matrix_is_that_of_the_tests() -> None:
    """Else: python -m tests.faults.figures."""
    assert "\n".join(matrix()) in DOCUMENT
    assert summary() in DOCUMENT


def test_every_long_soak_has_its_figures() -> None:
    rows = re.findall(r"^\| (\w+) \| (\d+) \|", DOCUMENT, re.MULTILINE)
    assert rows == [(mode, str(seed)) for mode, seed in LONG]


def test_metrics_exist() -> None:
    metrics = Metrics(Traffic(lambda reason: None))
    families = {family.name for family in metrics.registry.collect()}
    known = {family.removeprefix("splitfleet_") for family in families}
    named = set(re.findall(r"splitfleet_(\w+)", DOCUMENT) + re.findall(r"`(\w+)\{", DOCUMENT))
    named = {name.removeprefix("splitfleet_").removesuffix("_total") for name in named - {""}}
    assert "late_samples" in named
    assert named - known == set()


def test_log_lines_exist() -> None:
    """Every line quoted from a log is in the sources, where it does not have a name or number."""
    quoted = re.findall(r"`((?!python)[a-z][^`]*(?: [^`]+){3,})`", DOCUMENT)
    sources = "\n".join(
        re.sub(r"\"\s*\n\s*f?\"", "", path.read_text("utf-8"))
        for package in ("broker", "coordinator", "edge_agent")
        for path in sorted((ROOT / package).glob("*.py"))
    )
    assert quoted
    for line in quoted:
        words = re.split(VARIABLE, line.partition(" | ")[0])  # behind it, what is known beside
        for part in (word.strip(" :;,/") for word in words):
            assert part in sources, f"{line!r}: {part!r}"
