"""``splitfleet device show``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ops.cli import main
from tests.device_identity import Issuer


@pytest.fixture
def issuer(tmp_path: Path) -> Issuer:
    return Issuer(tmp_path / "authority")


def show(folder: Path, capsys: pytest.CaptureFixture[str], *, code: int = 0) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["device", "show", "--identity", str(folder), "--json"])
    printed = capsys.readouterr()
    assert ended.value.code == code
    return printed.err if code else printed.out


def test_a_device_says_who_it_is(
    tmp_path: Path, issuer: Issuer, capsys: pytest.CaptureFixture[str]
) -> None:
    issuer.enrolled(tmp_path / "d", "garden-3")
    facts = json.loads(show(tmp_path / "d", capsys))
    assert (facts["device"], facts["enrolled"], facts["ended"]) == ("garden-3", True, False)


def test_a_missing_way_back_is_said(
    tmp_path: Path, issuer: Issuer, capsys: pytest.CaptureFixture[str]
) -> None:
    identity = issuer.enrolled(tmp_path / "d", "garden-3")
    identity.return_file.unlink()
    assert f"{identity.return_file} is missing" in show(tmp_path / "d", capsys, code=2)


def test_an_authority_that_is_missing_or_foreign_is_said(
    tmp_path: Path, issuer: Issuer, capsys: pytest.CaptureFixture[str]
) -> None:
    identity = issuer.enrolled(tmp_path / "d", "garden-3")
    other = Issuer(tmp_path / "other").enrolled(tmp_path / "e", "garden-3")
    shutil.copy(other.ca_file, identity.ca_file)
    assert "is not signed by the authority in" in show(tmp_path / "d", capsys, code=2)
    identity.ca_file.unlink()
    assert f"cannot read {identity.ca_file}" in show(tmp_path / "d", capsys, code=2)
