"""What each package shows to the outside."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

PACKAGES = ["broker", "coordinator", "edge_agent", "ops", "tensors"]


@pytest.mark.parametrize("name", PACKAGES)
def test_names_are_sorted_and_exist(name: str) -> None:
    package = importlib.import_module(name)
    assert list(package.__all__) == sorted(package.__all__)
    for public in package.__all__:
        assert getattr(package, public) is not None


@pytest.mark.parametrize(
    "module",
    [
        "broker.drive",
        "broker.embedded",
        "broker.mosquitto",
        "broker.mqtt",
        "edge_agent.answers",
        "edge_agent.core",
        "edge_agent.data",
        "edge_agent.edge",
        "edge_agent.holding",
        "edge_agent.http_api",
        "edge_agent.http_server",
        "edge_agent.identity.keeper",
        "edge_agent.pictures",
        "edge_agent.predictor",
        "edge_agent.serving",
        "edge_agent.settings",
        "edge_agent.snapshots",
        "ops.cli",
        "ops.identity_table",
        "ops.fleet_status",
        "ops.log_level",
        "ops.predict_agent",
        "tensors.codecs",
        "tensors.deltas",
        "tensors.parameters",
    ],
)
def test_a_device_without_torch_can_import(module: str) -> None:
    code = f"import sys, {module}; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=250)


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("tensors", ("broker", "edge_agent", "coordinator", "ops")),
        ("broker", ("tensors", "edge_agent", "coordinator", "ops")),
        ("edge_agent", ("coordinator", "ops")),
        ("coordinator", ("edge_agent", "ops")),
    ],
)
def test_imports_follow_the_layout(package: str, forbidden: tuple[str, ...]) -> None:
    import ast
    from pathlib import Path

    root = Path(__file__).parent.parent / package
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            for name in names:
                assert name.split(".")[0] not in forbidden, f"{path} imports {name}"
