from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ops.flash.classes import device_class
from ops.flash.identity import identity_files
from ops.flash.payload import FOLDER, device_files
from ops.flash.wheels import Wheel
from tests.ops.flash.wheels import write_wheel

# Does at once what takes Python long: a virtual environment is two scripts, and pip writes a log.
PYTHON = """#!/bin/sh
case "$*" in
-c*) exec {python} "$@" ;;
"-m venv "*)
    for place in "$@"; do :; done
    mkdir -p "$place/bin"
    cp "$0" "$place/bin/python"
    printf '#!/bin/sh\\n' >"$place/bin/splitfleet"
    chmod +x "$place/bin/splitfleet" ;;
*pip*)
    echo "$*" >>"$PIP_LOG"
    [ ! -e "$PIP_LOG.fails" ] ;;
esac
"""
TIMEOUT_S = 250.0


class Card:
    """A device's root folder, and beside it the folder that install.sh is run in."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root of it"
        self.here = folder / FOLDER
        self.log = folder / "pip.log"
        self.python = folder / "python3"
        self.python.write_text(PYTHON.format(python=sys.executable))
        self.python.chmod(0o755)
        self.identity = self.root / "var/lib/splitfleet/identity"
        self.current = self.root / "opt/splitfleet/current"
        self._wheels = [
            Wheel(name, version, write_wheel(folder / "wheels", name, version), "0" * 64)
            for name, version in (("splitfleet", "0.1.0"), ("pip", "26.0"))
        ]

    def flash(self, fleet: Path, device: str | None = "cam-1", *, token: bool = False) -> None:
        shutil.rmtree(self.here, ignore_errors=True)
        files = [
            *device_files(device_class("generic"), "[agent]\n", self._wheels, ()),
            *identity_files(fleet, device, fleet / "token.pem" if token else None),
        ]
        for file in files:
            path = self.here.parent / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.read())

    def install(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", str(self.here / "install.sh"), "--root", str(self.root)],
            env=os.environ | {"SPLITFLEET_PYTHON": str(self.python), "PIP_LOG": str(self.log)},
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT_S,
        )

    @property
    def installations(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0

    @property
    def names(self) -> set[str]:
        return {path.name for path in self.identity.iterdir()}


@pytest.fixture
def card(tmp_path: Path, fleet_folder: Path) -> Card:
    card = Card(tmp_path)
    card.flash(fleet_folder)
    return card


def test_it_installs_and_wipes_what_is_secret(card: Card, fleet_folder: Path) -> None:
    key = card.here / "identity" / "key.pem"
    other = card.here.parent / "what lies on the disk"
    os.link(key, other)
    size = key.stat().st_size
    done = card.install()
    assert done.returncode == 0, done.stderr
    assert card.current.resolve() == card.root / "opt/splitfleet/versions/0.1.0"
    assert card.names == {"device.pem", "fleet-ca.pem", "key.pem", "return.pem"}
    for name in card.names:
        theirs = (fleet_folder / "devices" / "cam-1" / name).read_bytes()
        assert (card.identity / name).read_bytes() == theirs
        assert (card.identity / name).stat().st_mode & 0o077 == 0
    assert not (card.here / "identity").exists()
    assert other.read_bytes() == bytes(size), "it can still be read from the disk"
    settings = card.root / "etc/splitfleet/agent.toml"
    assert settings.read_text() == "[agent]\n"
    assert settings.stat().st_mode & 0o777 == 0o640
    unit = (card.root / "etc/systemd/system/splitfleet-agent.service").read_text()
    for path in re.findall(r"/opt/splitfleet/[\w./]+", unit):
        assert os.access(f"{card.root}{path}", os.F_OK), path
    assert "install" in card.log.read_text()
    assert "--requirement requirements.txt" in card.log.read_text()


def test_the_agent_may_read_its_settings(card: Card) -> None:
    unit = (card.here / "splitfleet-agent.service").read_text()
    group = re.search(r"^Group=(\w+)$", unit, re.MULTILINE)
    assert group
    assert f'chgrp {group[1]} "$etc/agent.toml"' in (card.here / "install.sh").read_text()


def test_again_it_does_no_harm(card: Card) -> None:
    assert card.install().returncode == 0
    before = {path: path.stat().st_mtime_ns for path in card.identity.iterdir()}
    assert card.install().returncode == 0
    assert card.installations == 1
    assert {path: path.stat().st_mtime_ns for path in card.identity.iterdir()} == before


def test_what_is_flashed_is_what_runs_next(card: Card, fleet_folder: Path) -> None:
    assert card.install().returncode == 0
    updates = card.root / "var/lib/splitfleet/updates"
    (updates / "current").write_text("0.2.0\n")
    assert card.install().returncode == 0
    assert (updates / "current").exists(), "the same again is no reason"
    card.flash(fleet_folder)
    with (card.here / "requirements.txt").open("a") as file:
        file.write("another==1.0\n")
    assert card.install().returncode == 0
    assert card.installations == 2
    assert not (updates / "current").exists()


def test_after_a_failure_it_goes_on_and_the_secret_is_gone_already(card: Card) -> None:
    failing = Path(f"{card.log}.fails")
    failing.touch()
    assert card.install().returncode != 0
    assert not (card.here / "identity").exists()
    assert not card.current.exists()
    failing.unlink()
    assert card.install().returncode == 0
    assert card.current.exists()
    assert "key.pem" in card.names


@pytest.mark.parametrize("token", [False, True])
def test_a_power_cut_while_it_wipes_loses_no_identity(
    card: Card, fleet_folder: Path, *, token: bool
) -> None:
    card.flash(fleet_folder, None if token else "cam-1", token=token)
    wiped = {path.name: path.stat().st_size for path in (card.here / "identity").iterdir()}
    assert card.install().returncode == 0
    before = {path.name: path.read_bytes() for path in card.identity.iterdir()}
    # Zeros are on the card, that the files were removed is not.
    (card.here / "used").mkdir()
    for name, size in wiped.items():
        (card.here / "used" / name).write_bytes(bytes(size))
    assert card.install().returncode == 0
    assert {path.name: path.read_bytes() for path in card.identity.iterdir()} == before
    assert not (card.here / "used").exists()


def test_what_is_wiped_is_no_identity_any_more(card: Card, tmp_path: Path) -> None:
    places = tmp_path / "bin"
    places.mkdir()
    (places / "dd").write_text("#!/bin/sh\nkill $PPID\n")
    (places / "dd").chmod(0o755)
    path = os.environ["PATH"]
    os.environ["PATH"] = f"{places}:{path}"
    try:
        assert card.install().returncode != 0
    finally:
        os.environ["PATH"] = path
    assert not (card.here / "identity").exists()
    assert (card.here / "used" / "key.pem").exists()
    assert card.install().returncode == 0
    assert not (card.here / "used").exists()
    assert "key.pem" in card.names


def test_a_device_that_is_enrolled_needs_no_token(card: Card, fleet_folder: Path) -> None:
    assert card.install().returncode == 0
    (card.identity / "device.pem").write_text("renewed")
    card.flash(fleet_folder, None, token=True)
    assert card.install().returncode == 0
    assert not (card.here / "identity").exists()
    assert "claim.pem" not in card.names
    card.flash(fleet_folder)
    assert card.install().returncode == 0
    assert (card.identity / "device.pem").read_text() == "renewed", "the key is the same"


def test_a_new_identity_replaces_the_old_one(card: Card, fleet_folder: Path) -> None:
    card.flash(fleet_folder, None, token=True)
    assert card.install().returncode == 0
    assert card.names == {"claim.pem", "claim-key.pem", "fleet-ca.pem"}
    card.flash(fleet_folder)
    assert card.install().returncode == 0
    assert card.names == {"device.pem", "fleet-ca.pem", "key.pem", "return.pem"}


@pytest.mark.parametrize("line", ["python=3.9", "machine=riscv64"])
def test_a_device_of_another_kind_is_told_so(card: Card, line: str) -> None:
    about = card.here / "about"
    key = line.partition("=")[0]
    about.write_text(re.sub(rf"{key}=.*", line, about.read_text()))
    done = card.install()
    assert done.returncode == 1
    assert line.partition("=")[2] in done.stderr
    assert "flash again" in done.stderr
    assert (card.here / "identity" / "key.pem").exists()


def test_bad_arguments_are_refused(card: Card) -> None:
    done = subprocess.run(
        ["sh", str(card.here / "install.sh"), "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "usage" in done.stderr


@pytest.fixture
def unit(card: Card, tmp_path: Path) -> Path:
    path = tmp_path / "splitfleet-agent.service"
    shutil.copy(card.here / path.name, path)
    return path


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"needs {program}")


@needs("systemd-analyze")
def test_the_unit_leaves_little_to_somebody_who_gets_into_the_agent(unit: Path) -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", str(unit)],
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert found, done.stderr
    assert float(found[1]) <= 1.6


@needs("shellcheck")
def test_shellcheck_finds_nothing_in_the_scripts() -> None:
    folder = Path(__file__).parents[3] / "ops" / "flash" / "device"
    scripts = [str(path) for path in folder.glob("*.sh")]
    done = subprocess.run(
        ["shellcheck", *scripts], capture_output=True, text=True, check=False, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stdout
