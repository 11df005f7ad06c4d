"""Which version is started: the real start.sh, with scripts for agents."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import pytest

from edge_agent.errors import StateError
from edge_agent.updates.slots import FLASHED, STARTS, Failure, Slots
from edge_agent.updates.start import START
from tests.crashing_disk import Disk, power_cuts, write_tree

AGENT = '#!/bin/sh\necho {name} "$@"\n{then}\n'
FULL = ("/bin/sh", "-c", 'ulimit -f 0; exec "$@"', "sh")


def install(place: Path, name: str, then: str = "") -> None:
    (place / "bin").mkdir(parents=True)
    agent = place / "bin" / "splitfleet"
    agent.write_text(AGENT.format(name=name, then=then))
    agent.chmod(0o755)


@pytest.fixture
def slots(tmp_path: Path) -> Slots:
    install(tmp_path / "flashed", "flashed")
    (tmp_path / "updates").mkdir()
    return Slots(tmp_path / "updates")


def start(slots: Slots, *, full: bool = False) -> str:
    """What the agent that is started says; a process group, as a service manager would have it.

    On a ``full`` disk no byte can be written to a file.
    """
    flashed = slots.folder.parent / "flashed"
    process = subprocess.Popen(
        [
            *(FULL if full else ()),
            "/bin/sh",
            START,
            slots.folder,
            flashed,
            "agent",
            "--config",
            "a b",
        ],
        stdout=subprocess.PIPE,
        restore_signals=False,  # SIGXFSZ stays ignored: writing fails
        text=True,
        start_new_session=True,
    )
    try:
        out, _ = process.communicate(timeout=100)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return out.strip()


def test_the_flashed_version_until_there_is_another(slots: Slots) -> None:
    assert start(slots) == "flashed agent --config a b"
    assert slots.current == FLASHED
    assert not slots.on_trial


def test_a_version_that_proves_itself_stays(slots: Slots) -> None:
    install(slots.prepare("1.1"), "new")
    slots.try_out("1.1", "r1", signed=100, prove_s=600)
    assert start(slots).startswith("new")
    assert (slots.on_trial, slots.rollout) == (True, "r1")
    slots.prove()
    for _ in range(STARTS + 1):
        assert start(slots).startswith("new")
    assert (slots.on_trial, slots.failure) == (False, None)


def test_a_version_that_is_never_proven_is_taken_back(slots: Slots) -> None:
    install(slots.prepare("1.1"), "new", then="exit 1")
    slots.try_out("1.1", "r1", signed=100, prove_s=600)
    assert [start(slots).split()[0] for _ in range(STARTS + 2)] == [
        *["new"] * STARTS,
        *["flashed"] * 2,
    ]
    assert not slots.on_trial
    assert slots.current == FLASHED
    assert slots.failure is not None
    assert slots.failure.rollout == "r1"
    assert "1.1" in slots.failure.reason


def test_one_that_hangs_is_ended(slots: Slots) -> None:
    install(slots.prepare("1.1"), "new", then="exec sleep 600")
    slots.try_out("1.1", "r1", signed=100, prove_s=1)
    assert [start(slots).split()[0] for _ in range(STARTS + 1)] == ["new"] * STARTS + ["flashed"]


def test_the_version_before_comes_back_not_the_flashed_one(slots: Slots) -> None:
    install(slots.prepare("1.1"), "good")
    slots.try_out("1.1", "r1", signed=100, prove_s=600)
    slots.prove()
    install(slots.prepare("1.2"), "bad")
    slots.try_out("1.2", "r2", signed=100, prove_s=600)
    for _ in range(STARTS):
        start(slots)
    assert start(slots).startswith("good")
    assert slots.current == "1.1"


def test_a_version_that_is_gone_is_replaced_by_the_flashed_one(slots: Slots) -> None:
    slots.prepare("1.1")
    slots.try_out("1.1", "r1", signed=100, prove_s=600)
    slots.prove()
    assert start(slots).startswith("flashed")


@pytest.mark.parametrize(
    "trial",
    ["", "- x y z", "-", "- 99999999999999999999 1 r 1", "rubbish", "- 1 600s r 1", "\0\0\0\n"],
)
def test_a_damaged_trial_ends_somehow(slots: Slots, trial: str) -> None:
    install(slots.prepare("1.1"), "new")
    slots.try_out("1.1", "r1", signed=100, prove_s=600)
    (slots.folder / "trial").write_text(trial)
    assert start(slots).split()[0] == "flashed"
    assert not slots.on_trial
    assert start(slots).split()[0] == "flashed"


def test_only_the_last_two_versions_stay(slots: Slots) -> None:
    for version in ("1.1", "1.2", "1.3"):
        install(slots.prepare(version), version)
        slots.try_out(version, version, signed=100, prove_s=1)
        slots.prove()
    assert {place.name for place in (slots.folder / "versions").iterdir()} == {"1.2", "1.3"}


def test_a_failure_is_one_line_and_forgotten_with_the_next_trial(slots: Slots) -> None:
    slots.fail("r1", "a reason\nof two  lines")
    assert slots.failure == Failure("r1", "a reason of two lines")
    install(slots.prepare("1.1"), "new")
    slots.try_out("1.1", "r2", signed=100, prove_s=1)
    assert slots.failure is None


def test_a_disk_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="cannot write"):
        Slots(tmp_path / "file").fail("r1", "reason")


def test_the_newest_bundle_that_was_proven_is_remembered(slots: Slots) -> None:
    assert slots.signed == 0
    install(slots.prepare("1.1"), "new")
    slots.try_out("1.1", "r1", signed=200, prove_s=600)
    start(slots)
    assert slots.signed == 0
    slots.prove()
    assert slots.signed == 200
    install(slots.prepare("1.2"), "bad", then="exit 1")
    slots.try_out("1.2", "r2", signed=300, prove_s=600)
    for _ in range(STARTS + 1):
        start(slots)
    assert (slots.current, slots.signed) == ("1.1", 200)
    (slots.folder / "signed").write_bytes(bytes(5))
    assert slots.signed == 0


def test_a_switch_that_was_broken_off_is_no_trial(slots: Slots) -> None:
    install(slots.prepare("1.1"), "new")
    slots.try_out("1.1", "r1", signed=100, prove_s=600)
    (slots.folder / "current").unlink()
    assert not slots.on_trial
    assert start(slots).startswith("flashed")
    assert not (slots.folder / "trial").exists()
    assert slots.failure is None


def test_a_way_back_that_was_broken_off_is_gone_to_its_end(slots: Slots) -> None:
    install(slots.prepare("1.1"), "new")
    slots.try_out("1.1", "r1", signed=100, prove_s=600)
    slots.fail("r1", "version 1.1 did not prove itself in time, or did not start")
    (slots.folder / "current").write_text("-\n")
    assert start(slots).startswith("flashed")
    assert (slots.on_trial, slots.failure is not None) == (False, True)
    assert not (slots.folder / "trial").exists()


def test_a_power_cut_leaves_the_version_before_or_one_on_trial(tmp_path: Path) -> None:
    (tmp_path / "updates").mkdir()
    disk = Disk(tmp_path / "updates")
    with disk.watched():
        slots = Slots(tmp_path / "updates")
        slots.prepare("1.1")
        slots.try_out("1.1", "r1", signed=100, prove_s=600)
        disk.done(0)
        slots.prove()
        disk.done(1)
    for number, (steps, tree) in enumerate(power_cuts(tmp_path / "updates", disk.operations)):
        write_tree(tmp_path / str(number), tree)
        left = Slots(tmp_path / str(number))
        state = left.current, left.on_trial, left.signed
        if steps == 0:
            assert state in {("-", False, 0), ("1.1", True, 0)}
        elif steps == 1:
            assert state in {("1.1", True, 0), ("1.1", True, 100), ("1.1", False, 100)}
        else:
            assert state == ("1.1", False, 100)


def test_on_a_full_disk_the_version_before_is_started_until_there_is_space(slots: Slots) -> None:
    install(slots.prepare("1.1"), "good")
    slots.try_out("1.1", "r1", signed=100, prove_s=600)
    slots.prove()
    install(slots.prepare("1.2"), "bad", then="exit 1")
    slots.try_out("1.2", "r2", signed=200, prove_s=600)
    for _ in range(STARTS + 1):
        assert start(slots, full=True).startswith("good")
    for _ in range(STARTS):
        assert start(slots).startswith("bad")
    for _ in range(2):
        assert start(slots, full=True).startswith("good")
    assert slots.on_trial
    assert start(slots).startswith("good")
    assert (slots.current, slots.on_trial, slots.failure is None) == ("1.1", False, False)
