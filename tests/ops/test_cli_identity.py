"""``splitfleet fleet …`` as an operator uses it."""

from __future__ import annotations

import json
import tarfile
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from coordinator.identity.authority import common_name
from ops.cli import main

Command = Callable[..., str]


@pytest.fixture
def fleet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Command:
    """Runs a command in a new fleet's folder; what it prints, or its error with ``code``."""
    monkeypatch.setenv("SPLITFLEET_FLEET_DIR", str(tmp_path / "plant"))

    def run(*arguments: str, code: int = 0) -> str:
        with pytest.raises(SystemExit) as caught:
            main(["fleet", *arguments])
        printed = capsys.readouterr()
        assert caught.value.code == code, printed.err
        return printed.err if code else printed.out

    run("init", str(tmp_path / "plant"), "--fleet", "plant", "--broker-name", "broker.example")
    return run


def listed(fleet: Command) -> dict[str, Any]:
    return {device["name"]: device["certificate"] for device in json.loads(fleet("list", "--json"))}


def revoked(folder: Path, side: str) -> int:
    crl = x509.load_pem_x509_crl((folder / "plant" / "broker" / f"{side}-crl.pem").read_bytes())
    return len(crl)


def test_a_device_is_added_with_all_that_its_agent_needs(fleet: Command, tmp_path: Path) -> None:
    folder = Path(fleet("add", "cam-1").strip())
    assert {file.name for file in folder.iterdir()} == {
        "agent.toml",
        "device.pem",
        "fleet-ca.pem",
        "key.pem",
        "return.pem",
    }
    assert (folder / "key.pem").stat().st_mode & 0o777 == 0o600
    settings = tomllib.loads((folder / "agent.toml").read_text())
    assert settings["broker"]["url"] == "mqtts://broker.example:8883"
    assert settings["agent"]["device"] == "cam-1"
    assert Path(settings["agent"]["identity_dir"]) == folder
    assert listed(fleet) == {"cam-1": "valid"}
    assert "fleet reset cam-1" in fleet("add", "cam-1", code=2)


def test_a_token_is_one_file_for_its_owner(fleet: Command, tmp_path: Path) -> None:
    file = Path(fleet("token", "--uses", "50", "--expires", "7d").strip())
    assert file.stat().st_mode & 0o777 == 0o600
    ca, claim = x509.load_pem_x509_certificates(file.read_bytes())
    assert b"PRIVATE KEY" in file.read_bytes()
    assert common_name(claim) == file.stem
    assert ca == x509.load_pem_x509_certificate(
        (tmp_path / "plant" / "broker" / "fleet-ca.pem").read_bytes()
    )
    elsewhere = tmp_path / "usb" / "token.pem"
    fleet("token", "--out", str(elsewhere))
    tokens = {token["id"]: token for token in json.loads(fleet("status", "--json"))["tokens"]}
    assert len(tokens) == 2
    assert tokens[file.stem.removeprefix("claim.")]["uses"] == 50
    assert elsewhere.exists()


def test_who_is_revoked_is_on_both_lists_and_stays_out(fleet: Command, tmp_path: Path) -> None:
    fleet("add", "cam-1")
    fleet("revoke", "cam-1")
    assert listed(fleet) == {"cam-1": "revoked"}
    assert (revoked(tmp_path, "fleet"), revoked(tmp_path, "claims")) == (1, 1)
    token = Path(fleet("token").strip()).stem
    fleet("revoke", token)
    assert revoked(tmp_path, "claims") == 2
    assert "not on the roster" in fleet("revoke", "cam-9", code=2)


def test_reset_awaits_a_device_and_retire_forgets_it(fleet: Command) -> None:
    for name in ("cam-1", "cam-2"):
        fleet("add", name)
    fleet("reset", "cam-1")
    fleet("retire", "cam-2")
    assert listed(fleet) == {"cam-1": "awaited"}
    fleet("add", "cam-1")
    fleet("add", "cam-2")
    assert listed(fleet) == {"cam-1": "valid", "cam-2": "valid"}


def test_tables_say_the_same_to_people(fleet: Command) -> None:
    fleet("add", "cam-1")
    token = Path(fleet("token", "--uses", "3").strip()).stem
    assert "cam-1   valid" in fleet("list")
    said = fleet("status")
    assert "fleet plant at mqtts://broker.example:8883: 1 valid" in said
    assert f"token {token}, 0 of 3 used" in said
    assert "revocation list, fleet" in said
    assert "cam-1 added" in said


def test_a_backup_brings_the_fleet_back(fleet: Command, tmp_path: Path) -> None:
    fleet("add", "cam-1")
    before = json.loads(fleet("status", "--json"))
    run = tmp_path / "plant" / "coordinator" / "state" / "run-1"
    run.mkdir()
    (run / "run.json").write_text("{}")
    (run / ".writing-000002").mkdir()
    archive = tmp_path / "backup.tar"
    fleet("backup", str(archive))
    assert archive.stat().st_mode & 0o777 == 0o600
    (tmp_path / "plant").rename(tmp_path / "lost")
    (tmp_path / "plant").mkdir()
    with tarfile.open(archive) as saved:
        saved.extractall(tmp_path / "plant", filter="data")
    fleet("repair")
    after = json.loads(fleet("status", "--json"))
    assert listed(fleet) == {"cam-1": "valid"}
    assert after["certificates"]["fleet-ca"] == before["certificates"]["fleet-ca"]
    assert (tmp_path / "plant" / "broker" / "run.sh").exists()
    assert [file.name for file in run.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["init", "x", "--broker-name", "mqtts://b"], "neither a host name"),
        (["init", "x", "--broker-name", "b", "--fleet", "a/b"], "fleet name"),
        (["init", "x", "--broker-name", "b", "--port", "0"], "fleet.port"),
        (["init", "x", "--broker-name", "b", "--device-days", "0"], "0.01"),
        (["add", "coordinator"], "reserved"),
        (["add", "x" * 60], "59 characters"),
        (["token", "--expires", "7"], "write 7d"),
        (["token", "--expires", "0d"], "write 7d"),
        (["token", "--expires", f"1{'0' * 400}d"], "write 7d"),
        (["token", "--uses", "9" * 30], "1000000"),
        (["list", "--folder", "/nowhere"], "splitfleet fleet init"),
        (["list", "--folder", "/dev/null"], "splitfleet fleet init"),
    ],
)
def test_what_an_operator_got_wrong_is_one_clear_line(
    fleet: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in fleet(*arguments, code=2)
    assert not (tmp_path / "x").exists(), "nothing was made"


@pytest.mark.parametrize("command", [["token", "--out"], ["backup"]])
def test_nothing_of_the_system_is_replaced(
    fleet: Command, tmp_path: Path, command: list[str]
) -> None:
    link = tmp_path / "stdout"
    link.symlink_to("/proc/self/fd/1")
    for place in (link, tmp_path):
        assert "name a file" in fleet(*command, str(place), code=2)
    assert link.is_symlink()
    assert json.loads(fleet("status", "--json"))["tokens"] == []


def test_a_port_is_for_one_listener(fleet: Command, tmp_path: Path) -> None:
    other = str(tmp_path / "other")
    for port in ("--claims-port", "--loopback-port"):
        said = fleet("init", other, "--broker-name", "b", port, "8883", code=2)
        assert "must be different" in said
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("left", ["registry.sqlite3", "authority/fleet-ca.pem"])
def test_a_fleet_is_not_made_over_what_is_left_of_another(
    fleet: Command, tmp_path: Path, left: str
) -> None:
    folder = tmp_path / "other"
    file = folder / "coordinator" / "state" / left
    file.parent.mkdir(parents=True)
    file.touch()
    said = fleet("init", str(folder), "--broker-name", "b", code=2)
    assert f"has coordinator/state/{left} of a fleet, but no fleet.toml" in said
    assert [path for path in folder.rglob("*") if path.is_file()] == [file]


def test_settings_that_do_not_lead_to_the_broker_are_named(fleet: Command, tmp_path: Path) -> None:
    fleet("add", "cam-1")
    fleet("add", "cam-2")
    assert fleet("repair") == ""
    plant = tmp_path / "plant"
    settings = plant / "fleet.toml"
    changed = settings.read_text().replace('"broker.example"', '"broker.example", "10.0.0.9"')
    settings.write_text(changed)
    assert fleet("repair") == "", "the old name is still one of the broker's"
    changed = changed.replace('"broker.example", ', "")
    settings.write_text(changed.replace("claims_port = 8884", "claims_port = 9999"))
    agent = plant / "devices" / "cam-2" / "agent.toml"
    agent.write_text("[agent")
    said = fleet("repair").splitlines()
    assert "mqtts://10.0.0.9:8883, for those who enrol at port 9999" in said[0]
    old, cam_1 = "mqtts://broker.example:8883", plant / "devices" / "cam-1" / "agent.toml"
    assert said[2:5] == [
        f"  {plant / 'coordinator' / 'coordinator.toml'}: broker.url = {old}",
        f"  {cam_1}: broker.url = {old}",
        f"  {cam_1}: agent.claims_port = 8884",
    ]
    assert "not valid TOML" in said[5]


def test_a_passphrase_that_is_too_long_is_said(
    fleet: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPLITFLEET_CA_PASSPHRASE", "x" * 1024)
    said = fleet("init", str(tmp_path / "other"), "--broker-name", "b", code=2)
    assert "at most 1023 bytes" in said


def test_a_fleet_is_not_made_twice(fleet: Command, tmp_path: Path) -> None:
    assert "already" in fleet("init", str(tmp_path / "plant"), "--broker-name", "b", code=2)


def test_keys_of_the_authorities_are_encrypted_if_there_is_a_passphrase(
    fleet: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPLITFLEET_CA_PASSPHRASE", "seven words")
    other = tmp_path / "other"
    fleet("init", str(other), "--broker-name", "b")
    key = other / "coordinator" / "state" / "authority" / "fleet-ca-key.pem"
    assert b"ENCRYPTED" in key.read_bytes()
    fleet("add", "cam-1", "--folder", str(other))
    monkeypatch.delenv("SPLITFLEET_CA_PASSPHRASE")
    assert "SPLITFLEET_CA_PASSPHRASE" in fleet("list", "--folder", str(other), code=2)
