from __future__ import annotations

import base64
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.config import BrokerConfig, load_settings
from broker.errors import ConfigError, TopicError
from broker.mosquitto_passwords import hash_password
from coordinator.settings import CoordinatorSettings
from edge_agent.settings import AgentSettings
from ops.errors import DiskTrouble, FleetFailed
from ops.places import lay_out, take

URL = "mqtt://mosquitto:1884"


def laid_out(folder: Path, places: int) -> Path:
    lay_out(folder, fleet="lab", url=URL, places=places, cuts=(2, 3, 5), shares=4)
    return folder


def login(file: Path) -> BrokerConfig:
    return load_settings(BrokerConfig, section="broker", file=file)


def password_of(file: Path) -> str:
    password = login(file).password
    assert password is not None
    return password.get_secret_value()


def known_to_the_broker(folder: Path, file: Path) -> bool:
    lines = (folder / "broker" / "passwords").read_text().splitlines()
    hashes = dict(line.split(":", 1) for line in lines)
    known = hashes.get(login(file).username or "")
    if known is None:
        return False
    salt = known.split("$")[3]
    return hash_password(password_of(file), base64.b64decode(salt)) == known


@contextlib.contextmanager
def container(agents: Path, name: str) -> Iterator[str]:
    """The name of the place it takes, and keeps as long as the context lasts."""
    place, lock = take(agents, name)
    try:
        yield place.name
    finally:
        os.close(lock)


def test_every_place_has_a_name_a_cut_layer_a_share_and_a_password(tmp_path: Path) -> None:
    laid_out(tmp_path, 5)
    places = [tmp_path / "agents" / f"agent-{n}" / "agent.toml" for n in range(1, 6)]
    agents = [load_settings(AgentSettings, section="agent", file=file) for file in places]
    assert [a.device for a in agents] == [f"agent-{n}" for n in range(1, 6)]
    assert [a.cut for a in agents] == [2, 3, 5, 2, 3]
    assert [(a.share, a.shares) for a in agents] == [(0, 4), (1, 4), (2, 4), (3, 4), (0, 4)]
    assert [a.state_dir for a in agents] == [file.parent / "state" for file in places]
    own = tmp_path / "coordinator" / "coordinator.toml"
    coordinator = load_settings(CoordinatorSettings, section="coordinator", file=own)
    assert (coordinator.fleet, coordinator.state_dir) == ("lab", own.parent / "state")
    for file in (own, *places):
        assert login(file).url == URL
        assert known_to_the_broker(tmp_path, file)
        assert file.parent.stat().st_mode & 0o077 == 0, "for its owner only"
    assert len({password_of(file) for file in (own, *places)}) == 6
    configuration = (tmp_path / "broker" / "mosquitto.conf").read_text()
    assert "listener 1884 0.0.0.0\n" in configuration
    assert f"persistence_location {tmp_path}/broker/data/\n" in configuration


def test_passwords_stay_when_places_are_laid_out_again(tmp_path: Path) -> None:
    files = [laid_out(tmp_path, 3) / "coordinator" / "coordinator.toml"]
    files += [tmp_path / "agents" / f"agent-{n}" / "agent.toml" for n in (1, 2)]
    before = [password_of(file) for file in files]
    laid_out(tmp_path, 6)
    laid_out(tmp_path, 2)
    assert [password_of(file) for file in files] == before
    assert all(known_to_the_broker(tmp_path, file) for file in files)
    assert not list((tmp_path / "agents" / "agent-3").iterdir()), "shut out, its password gone"


@pytest.mark.parametrize("lost", ["coordinator/coordinator.toml", "broker/passwords"])
def test_what_is_lost_is_made_again(tmp_path: Path, lost: str) -> None:
    laid_out(tmp_path, 2)
    (tmp_path / lost).unlink()
    laid_out(tmp_path, 2)
    for file in ("coordinator/coordinator.toml", "agents/agent-2/agent.toml"):
        assert known_to_the_broker(tmp_path, tmp_path / file)


def test_no_place_is_held_twice_and_a_free_one_is_taken_again(tmp_path: Path) -> None:
    agents = laid_out(tmp_path, 3) / "agents"
    with container(agents, "a") as first:
        with container(agents, "b") as second:
            assert (first, second) == ("agent-1", "agent-2")
        with container(agents, "c") as third:
            assert third == "agent-2"


def test_a_container_that_starts_again_finds_its_place_whoever_comes_first(tmp_path: Path) -> None:
    agents = laid_out(tmp_path, 12) / "agents"
    with contextlib.ExitStack() as stack:
        names = [stack.enter_context(container(agents, f"c{n}")) for n in range(11)]
    assert names == [f"agent-{n}" for n in range(1, 12)], "in the order of their numbers"
    with container(agents, "c10") as last, container(agents, "c3") as fourth:
        assert (last, fourth) == ("agent-11", "agent-4")


def test_a_place_is_held_by_the_program_that_the_container_becomes(tmp_path: Path) -> None:
    agents = laid_out(tmp_path, 2) / "agents"
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
    agents = laid_out(tmp_path, 1) / "agents"
    with container(agents, "a"), pytest.raises(FleetFailed, match="all 1 places"):
        take(agents, "b")


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mqtt://HOST"):
        lay_out(tmp_path, fleet="lab", url="http://x", places=1, cuts=(2,), shares=1)
    with pytest.raises(TopicError, match="la/b"):
        lay_out(tmp_path, fleet="la/b", url=URL, places=1, cuts=(2,), shares=1)
    file = laid_out(tmp_path, 1) / "agents" / "agent-1" / "agent.toml"
    file.write_text("[broker]\n")
    with pytest.raises(DiskTrouble, match=r"agent\.toml is not as it was written"):
        laid_out(tmp_path, 1)
