"""``splitfleet bundle`` and ``rollout`` as an operator uses them."""

from __future__ import annotations

import json
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from broker.update_messages import Software
from coordinator.updates.book import RolloutBook
from coordinator.updates.rollouts import BUNDLES, bundle_file
from ops.cli import main
from ops.identity import FleetFolder

Command = Callable[..., str]


@pytest.fixture
def command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Command:
    """Runs a command in a new fleet's folder; what it prints, or its error with ``code``."""
    monkeypatch.setenv("SPLITFLEET_FLEET_DIR", str(tmp_path / "plant"))
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, code: int = 0) -> str:
        with pytest.raises(SystemExit) as caught:
            main([*arguments])
        printed = capsys.readouterr()
        assert caught.value.code == code, printed.err
        return printed.err if code else printed.out

    run("fleet", "init", "plant", "--fleet", "plant", "--broker-name", "broker.example")
    run("fleet", "add", "cam-1")
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "splitfleet-1.1.0-py3-none-any.whl").write_bytes(b"wheel")
    return run


def rollouts(command: Command) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(command("rollout", "--json"))
    return found


def test_a_bundle_is_made_and_rolled_out(command: Command, tmp_path: Path) -> None:
    assert "version 1.1.0, 1 wheels" in command("bundle", "wheels", "--extra", "lite")
    assert "nothing has been rolled out" in command("rollout")
    out = command("rollout", "bundle.tar", "--stages", "cam-*,100%", "--prove", "20min")
    assert "version 1.1.0" in out
    assert "running; stage 1 of 3, 5%: nobody yet" in out
    (entered,) = rollouts(command)
    assert entered["stages"] == ["5%", "cam-*", "100%"]
    assert entered["prove_s"] == pytest.approx(1200)
    assert entered["error_threshold"] == pytest.approx(0.1)
    kept = bundle_file(tmp_path / "plant" / "coordinator" / "state" / BUNDLES, entered["sha256"])
    assert kept.read_bytes() == (tmp_path / "bundle.tar").read_bytes()
    with FleetFolder.open(tmp_path / "plant") as opened:
        assert opened.fleet.roster.events(1)[0].kind == "rollout"


def test_status_shows_who_runs_what_it_should_not(command: Command, tmp_path: Path) -> None:
    for device in ("behind", "done", "untouched"):
        command("fleet", "add", device)
    command("bundle", "wheels")
    command("rollout", "bundle.tar")
    (rollout,) = rollouts(command)
    with FleetFolder.open(tmp_path / "plant") as opened:
        book = RolloutBook(opened.fleet.roster, clock=time.time)
        asked = rollout["id"]
        book.put_part(asked, "behind", 0, "failed")
        book.put_part(asked, "done", 0, "done")
        failed = Software(version="1.0.0", state="failed", rollout=asked, detail="no room")
        book.heard("behind", failed)
        book.heard("done", Software(version="1.1.0", state="running", rollout=asked))
        book.heard("untouched", Software(version="1.0.0", state="running"))
    told = json.loads(command("fleet", "status", "--json"))["software_differs"]
    assert told == [
        {
            "device": "behind",
            "version": "1.0.0",
            "wanted_version": "1.1.0",
            "update": "failed",
            "update_detail": "no room",
        }
    ]
    printed = command("fleet", "status")
    assert "1.0.0, wanted 1.1.0 (failed)" in printed
    assert "no room" in printed
    assert "wanted" not in "".join(line for line in printed.splitlines() if "done" in line)


def test_one_at_a_time_stopped_and_resumed(command: Command) -> None:
    command("bundle", "wheels")
    command("rollout", "bundle.tar")
    assert "is being rolled out" in command("rollout", "bundle.tar", code=2)
    assert "stopped (by an operator)" in command("rollout", "--stop")
    assert "not running" in command("rollout", "--stop", code=2)
    assert "running;" in command("rollout", "--resume")
    assert "not stopped" in command("rollout", "--resume", code=2)
    command("rollout", "--stop")
    command("rollout", "bundle.tar")
    assert [rollout["state"] for rollout in rollouts(command)] == ["running", "stopped"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--canary", "5"), "'5' is no stage|a stage"),
        (("--canary", "500%"), "share like 5%"),
        (("--canary", "0%"), "nobody"),
        (("--stages", "100%,a b"), "no stage"),
        (("--stages", "class:"), "no stage"),
        (("--error-threshold", "x"), "--error-threshold"),
        (("--prove", "soon"), "--prove"),
        (("--url", "ftp://files.example/b"), "--url"),
        (("--stop",), "BUNDLE, --stop or --resume"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    command: Command, arguments: tuple[str, ...], says: str
) -> None:
    command("bundle", "wheels")
    error = command("rollout", "bundle.tar", *arguments, code=2)
    assert any(part in error for part in says.split("|")), error
    assert rollouts(command) == []


def test_a_bundle_that_cannot_be_made_leaves_nothing(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "devices have agent, lite, http" in command("bundle", "wheels", "--extra", "x", code=2)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    assert "No space left" in command("bundle", "wheels", code=5)
    assert [path.name for path in tmp_path.glob(".*")] == []
    assert not (tmp_path / "bundle.tar").exists()


def test_a_bundle_of_another_fleet_or_none_is_refused(command: Command, tmp_path: Path) -> None:
    (tmp_path / "rubbish.tar").write_bytes(b"x" * 20_000)
    assert "splitfleet bundle" in command("rollout", "rubbish.tar", code=2)
    assert "splitfleet bundle" in command("rollout", "nowhere.tar", code=2)
    other = ("--folder", "other")
    command("fleet", "init", "other", "--fleet", "plant", "--broker-name", "broker.example")
    command("bundle", "wheels", "--out", "theirs.tar", *other)
    assert "not signed by this fleet" in command("rollout", "theirs.tar", code=2)
