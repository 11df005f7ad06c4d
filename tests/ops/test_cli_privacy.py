from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edge_agent.privacy_account import PrivacyAccount
from ops.cli import app
from tensors.privacy import epsilon_of


def test_an_account_is_shown_with_what_it_does_not_cover(tmp_path: Path) -> None:
    account = PrivacyAccount(tmp_path)
    account.charge([b"a", b"b", b"b"], 0.5)
    done = CliRunner().invoke(app, ["privacy", str(tmp_path), "--delta", "1e-6"])
    assert done.exit_code == 0
    assert "3 releases of 2 images" in done.output
    assert f"ρ = 1, ε = {epsilon_of(1.0, 1e-6):.6g} at δ = 1e-06" in done.output
    assert "labels" in done.output
    assert "parameters are not covered" in done.output


def test_for_programs(tmp_path: Path) -> None:
    account = PrivacyAccount(tmp_path)
    account.charge([b"a", b"b"], 0.5)
    done = CliRunner().invoke(app, ["privacy", str(tmp_path), "--json"])
    found = json.loads(done.output)
    assert (found["images"], found["rho_max"], found["delta"]) == (2, 0.5, 1e-5)
    assert found["epsilon_max"] == pytest.approx(epsilon_of(0.5, 1e-5))
    account.charge([b"a"], math.inf)
    done = CliRunner().invoke(app, ["privacy", str(tmp_path), "--json"])
    assert json.loads(done.output)["rho_max"] is None
    assert "1 images were released without noise" in (
        CliRunner().invoke(app, ["privacy", str(tmp_path)]).output
    )
