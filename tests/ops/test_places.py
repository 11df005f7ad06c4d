from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509

from broker.config import BrokerConfig, load_settings
from broker.errors import TopicError
from coordinator.settings import CoordinatorSettings
from edge_agent.identity.keeper import with_name
from edge_agent.identity.keys import issued_by
from edge_agent.settings import AgentSettings
from ops.errors import DiskTrouble, FleetFailed, SettingsWrong
from ops.identity import FleetFolder
from ops.places import lay_out, take


def laid_out(folder: Path, places: int, broker_name: str = "mosquitto") -> Path:
    lay_out(
        folder,
        fleet="lab",
        broker_names=[broker_name, "localhost"],
        port=1884,
        places=places,
        cuts=(2, 3, 5),
        shares=4,
    )
    return folder


def identity(folder: Path, number: int) -> bytes:
    return (folder / "devices" / f"agent-{number}" / "device.pem").read_bytes()


def good(folder: Path, number: int) -> bool:
    """Whether the fleet has signed it, and it is on no list."""
    certificate = x509.load_pem_x509_certificate(identity(folder, number))
    ca = x509.load_pem_x509_certificate((folder / "broker" / "fleet-ca.pem").read_bytes())
    revoked = x509.load_pem_x509_crl((folder / "broker" / "fleet-crl.pem").read_bytes())
    listed = revoked.get_revoked_certificate_by_serial_number(certificate.serial_number)
    return issued_by(certificate, ca) and listed is None


@contextlib.contextmanager
def container(agents: Path, name: str) -> Iterator[str]:
    """The name of the place it takes, and keeps as long as the context lasts."""
    place, lock = take(agents, name)
    try:
        yield place.name
    finally:
        os.close(lock)


def test_every_place_has_a_name_a_cut_layer_a_share_and_an_identity(tmp_path: Path) -> None:
    laid_out(tmp_path, 5)
    places = [tmp_path / "devices" / f"agent-{n}" / "agent.toml" for n in range(1, 6)]
    agents = [load_settings(AgentSettings, section="agent", file=file) for file in places]
    assert [a.device for a in agents] == [f"agent-{n}" for n in range(1, 6)]
    assert [a.cut for a in agents] == [2, 3, 5, 2, 3]
    assert [(a.share, a.shares) for a in agents] == [(0, 4), (1, 4), (2, 4), (3, 4), (0, 4)]
    assert [a.state_dir for a in agents] == [file.parent / "state" for file in places]
    assert [a.identity_dir for a in agents] == [file.parent for file in places]
    assert [with_name(agent) for agent in agents] == agents, "the certificates say the same"
    own = tmp_path / "coordinator" / "coordinator.toml"
    coordinator = load_settings(CoordinatorSettings, section="coordinator", file=own)
    assert (coordinator.fleet, coordinator.state_dir) == ("lab", own.parent / "state")
    for file in (own, *places):
        url = load_settings(BrokerConfig, section="broker", file=file).url
        assert url == "mqtts://mosquitto:1884"
        assert file.parent.stat().st_mode & 0o077 == 0, "for its owner only"
    assert "listener 1884\n" in (tmp_path / "broker" / "mosquitto.conf").read_text()


def test_identities_stay_when_places_are_laid_out_again(tmp_path: Path) -> None:
    laid_out(tmp_path, 3)
    before = [identity(tmp_path, n) for n in (1, 2, 3)]
    laid_out(tmp_path, 6)
    assert [identity(tmp_path, n) for n in (1, 2, 3)] == before
    (tmp_path / "kept").write_bytes(before[2])
    laid_out(tmp_path, 2)
    assert [identity(tmp_path, n) for n in (1, 2)] == before[:2]
    assert all(good(tmp_path, n) for n in (1, 2))
    assert not list((tmp_path / "devices" / "agent-3").iterdir())
    (tmp_path / "devices" / "agent-3" / "device.pem").write_bytes(before[2])
    assert not good(tmp_path, 3), "who has kept a copy is not let in"
    laid_out(tmp_path, 3)
    assert good(tmp_path, 3)


def test_a_revoked_place_stays_shut_out(tmp_path: Path) -> None:
    laid_out(tmp_path, 2)
    with FleetFolder.open(tmp_path) as fleet:
        fleet.revoke("agent-1")
    laid_out(tmp_path, 2)
    assert not good(tmp_path, 1)
    assert good(tmp_path, 2)


@pytest.mark.parametrize("lost", ["coordinator/coordinator.toml", "devices", "broker"])
def test_what_is_lost_is_made_again(tmp_path: Path, lost: str) -> None:
    laid_out(tmp_path, 2)
    path = tmp_path / lost
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    laid_out(tmp_path, 2)
    assert path.exists()
    assert good(tmp_path, 2)


def test_a_coordinator_from_a_backup_has_its_fleet_again(tmp_path: Path) -> None:
    backup = laid_out(tmp_path / "backup", 1) / "coordinator"
    folder = laid_out(tmp_path / "fleet", 2)
    shutil.rmtree(folder / "coordinator")
    shutil.copytree(backup, folder / "coordinator")
    laid_out(folder, 2)
    assert good(folder, 1)
    assert good(folder, 2)


def test_a_roster_from_before_a_reset_is_followed(tmp_path: Path) -> None:
    folder = laid_out(tmp_path / "fleet", 1)
    shutil.copytree(folder / "coordinator", tmp_path / "backup")
    with FleetFolder.open(folder) as fleet:
        fleet.reset("agent-1")
        fleet.add_device("agent-1")
    before = identity(folder, 1)
    shutil.rmtree(folder / "coordinator")
    shutil.copytree(tmp_path / "backup", folder / "coordinator")
    laid_out(folder, 1)
    assert identity(folder, 1) != before, "of a key that the roster does not know"
    assert good(folder, 1)


def test_no_place_is_held_twice_and_a_free_one_is_taken_again(tmp_path: Path) -> None:
    agents = laid_out(tmp_path, 3) / "devices"
    with container(agents, "a") as first:
        with container(agents, "b") as second:
            assert (first, second) == ("agent-1", "agent-2")
        with container(agents, "c") as third:
            assert third == "agent-2"


def test_a_container_that_starts_again_finds_its_place_whoever_comes_first(tmp_path: Path) -> None:
    agents = laid_out(tmp_path, 12) / "devices"
    with contextlib.ExitStack() as stack:
        names = [stack.enter_context(container(agents, f"c{n}")) for n in range(11)]
    assert names == [f"agent-{n}" for n in range(1, 12)], "in the order of their numbers"
    with container(agents, "c10") as last, container(agents, "c3") as fourth:
        assert (last, fourth) == ("agent-11", "agent-4")


def test_a_place_is_held_by_the_program_that_the_container_becomes(tmp_path: Path) -> None:
    agents = laid_out(tmp_path, 2) / "devices"
    code = (
        "import os, sys; from pathlib import Path; from ops.places import take\n"
        "take(Path(sys.argv[1]), 'a'); os.execvp('sh', ['sh', '-c', 'echo; exec sleep 60'])"
    )
    program = [sys.executable, "-c", code, str(agents)]
    with subprocess.Popen(program, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        with container(agents, "b") as place:
            assert place == "agent-2"
        process.kill()
    with container(agents, "c") as place:
        assert place == "agent-1"


def test_more_containers_than_places(tmp_path: Path) -> None:
    agents = laid_out(tmp_path, 1) / "devices"
    with container(agents, "a"), pytest.raises(FleetFailed, match="all 1 places"):
        take(agents, "b")


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(TopicError, match="la/b"):
        lay_out(tmp_path, fleet="la/b", broker_names=["x"], places=1, cuts=(2,), shares=1)
    folder = laid_out(tmp_path / "fleet", 1)
    with pytest.raises(SettingsWrong, match=r"broker_names.*fleet\.toml"):
        laid_out(folder, 1, broker_name="another")
    (folder / "devices" / "agent-1" / "device.pem").write_text("rubbish")
    with pytest.raises(DiskTrouble, match=r"device\.pem is not as it was written"):
        laid_out(folder, 1)
