from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.identity.fleet import authority_dir
from coordinator.identity.keys import new_key
from coordinator.identity.registration import DAY_S, Applicant
from ops.cli import main
from ops.errors import SettingsWrong
from ops.flash.identity import identity_files
from ops.identity import FleetFolder, init_fleet


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[FleetFolder]:
    """A fleet with the device cam-1."""
    with init_fleet(tmp_path / "fleet", "lab", broker_names=["localhost"]) as made:
        made.add_device("cam-1")
        yield made


@pytest.fixture
def token(fleet: FleetFolder) -> Path:
    """For one device."""
    return fleet.write_token(uses=1, days=7)


def claim_of(token: Path) -> str:
    return token.stem.removeprefix("claim.")


def enrol(fleet: FleetFolder, token: Path, name: str) -> None:
    applicant = Applicant(name, new_key().public_key())
    fleet.fleet.registration.enrol(claim_of(token), applicant)


def test_a_token_that_is_good_is_taken(fleet: FleetFolder, token: Path) -> None:
    names = [file.path.rpartition("/")[2] for file in identity_files(fleet.folder, None, token)]
    assert names == ["fleet-ca.pem", "claim.pem", "claim-key.pem"]


def test_a_token_that_has_ended_is_refused(fleet: FleetFolder, token: Path) -> None:
    later = time.time() + 8 * DAY_S
    with pytest.raises(SettingsWrong, match=r"has ended, on .*fleet token"):
        identity_files(fleet.folder, None, token, clock=lambda: later)


def test_a_token_that_is_used_up_or_revoked_is_refused(fleet: FleetFolder, token: Path) -> None:
    enrol(fleet, token, "cam-2")
    with pytest.raises(SettingsWrong, match="is used: make another"):
        identity_files(fleet.folder, None, token)
    other = fleet.write_token(uses=2, days=7)
    enrol(fleet, other, "cam-3")
    identity_files(fleet.folder, None, other)
    fleet.revoke(other.stem)
    with pytest.raises(SettingsWrong, match="has been revoked: make another"):
        identity_files(fleet.folder, None, other)


def test_a_token_that_the_roster_has_forgotten_is_refused(fleet: FleetFolder, token: Path) -> None:
    with fleet.fleet.roster.change():
        fleet.fleet.roster.execute("DELETE FROM claims")
    with pytest.raises(SettingsWrong, match="is not on the roster"):
        identity_files(fleet.folder, None, token)


def test_what_is_of_another_fleet_is_refused(
    fleet: FleetFolder, token: Path, tmp_path: Path
) -> None:
    with init_fleet(tmp_path / "other", "lab", broker_names=["localhost"]) as other:
        foreign = other.write_token(uses=1, days=7)
        shutil.copytree(other.add_device("cam-2"), fleet.device_dir("cam-2"))
    for device, file in ((None, foreign), ("cam-2", None)):
        with pytest.raises(SettingsWrong, match="is of another fleet than"):
            identity_files(fleet.folder, device, file)


def test_a_machine_that_only_flashes_checks_what_it_can(
    fleet: FleetFolder, token: Path, tmp_path: Path
) -> None:
    there = tmp_path / "flashing"
    there.mkdir()
    shutil.copy(fleet.folder / "fleet.toml", there)
    assert identity_files(there, None, token)
    later = time.time() + 8 * DAY_S
    with pytest.raises(SettingsWrong, match="has ended"):
        identity_files(there, None, token, clock=lambda: later)
    with init_fleet(tmp_path / "other", "lab", broker_names=["localhost"]) as other:
        shutil.copytree(authority_dir(other.folder), authority_dir(there))
    with pytest.raises(SettingsWrong, match="is of another fleet than"):
        identity_files(there, None, token)


def test_a_device_has_the_identity_that_is_on_the_roster(fleet: FleetFolder) -> None:
    fleet.revoke("cam-1")
    with pytest.raises(SettingsWrong, match=r"one that is revoked.*fleet reset cam-1.*fleet add"):
        identity_files(fleet.folder, "cam-1", None)
    fleet.reset("cam-1")
    with pytest.raises(SettingsWrong, match="has none for it: `splitfleet fleet add cam-1`"):
        identity_files(fleet.folder, "cam-1", None)
    enrol(fleet, fleet.write_token(uses=1, days=7), "cam-1")
    with pytest.raises(SettingsWrong, match=r"has another one.*fleet reset cam-1"):
        identity_files(fleet.folder, "cam-1", None)
    fleet.reset("cam-1")
    fleet.add_device("cam-1")
    assert len(identity_files(fleet.folder, "cam-1", None)) == 4


def test_the_identity_of_another_device_is_refused(fleet: FleetFolder) -> None:
    shutil.copytree(fleet.device_dir("cam-1"), fleet.device_dir("cam-2"))
    with pytest.raises(SettingsWrong, match="holds the identity of 'cam-1'"):
        identity_files(fleet.folder, "cam-2", None)


def test_nothing_is_written_with_a_bad_token(
    fleet: FleetFolder, token: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet.revoke(token.stem)
    bundle = tmp_path / "card.tar.gz"
    command = ["flash", "--bundle", str(bundle), "--folder", str(fleet.folder)]
    command += ["--token", str(token), "--index", "https://index.invalid", "--class", "pi4"]
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == SettingsWrong.exit_code
    assert "has been revoked" in capsys.readouterr().err
    assert not bundle.exists()
