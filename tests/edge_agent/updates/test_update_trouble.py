"""Servers that do as they like, damaged files, and ends at any moment."""

from __future__ import annotations

import contextlib
import io
import urllib.error
import urllib.request
from email.message import Message
from pathlib import Path

import pytest

from broker.drive import Effect
from broker.messages import Command
from broker.update_messages import Fetch, Software
from coordinator.identity.authority import Authority
from edge_agent.updates.updater import GIVE_UP_S, RETRY_HTTP_S
from tests import bundles
from tests.crashing_disk import Disk, Killed, killed_at
from tests.updating_device import PIECE, Lab, Trickle, said, states, take, take_announced


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("authority"), bundles.FLEET)


@pytest.fixture
def lab(tmp_path: Path, authority: Authority) -> Lab:
    return Lab(tmp_path, authority)


URL = "https://files.example/bundle.tar"


def test_by_http_with_a_break(lab: Lab) -> None:
    half = len(lab.bundle) // 2
    resumed = io.BytesIO(lab.bundle[half:])
    resumed.status = 206  # type: ignore[attr-defined]
    lab.responses = [io.BytesIO(lab.bundle[:half]), ConnectionResetError("reset"), resumed]
    effects = lab.announce(url=URL)
    assert said(effects, Fetch) == []
    began = lab.clock.now
    assert states(lab.run()) == ["installing"]
    assert lab.updater.finished
    assert lab.clock.now >= began + 2 * RETRY_HTTP_S
    assert lab.requested == ["bytes=0-", f"bytes={half}-", f"bytes={half}-"]


def test_by_http_from_a_server_that_cannot_resume(lab: Lab) -> None:
    whole = io.BytesIO(lab.bundle)
    whole.status = 200  # type: ignore[attr-defined]
    lab.responses = [io.BytesIO(lab.bundle[:1000]), whole]
    lab.announce(url=URL)
    assert states(lab.run()) == ["installing"]


def test_by_http_what_is_longer_than_announced_fails(lab: Lab) -> None:
    lab.responses = [io.BytesIO(lab.bundle + b"x")]
    lab.announce(url=URL)
    assert "longer" in said(lab.run(), Software)[0].detail


@pytest.mark.parametrize(
    "url",
    [
        "http://[",
        f"http://127.0.0.1:{25 * '9'}/bundle.tar",
        f"http://{70 * 'a'}.example/bundle.tar",
    ],
)
def test_an_address_that_is_none_fails_the_update_not_the_agent(lab: Lab, url: str) -> None:
    lab.announce(url=url)
    (last,) = said(lab.run(), Software)
    assert (last.state, last.rollout) == ("failed", "r1")
    assert "cannot be fetched" in last.detail


@pytest.mark.parametrize(("code", "state"), [(404, "failed"), (429, "installing")])
def test_by_http_what_the_server_will_not_give(lab: Lab, code: int, state: str) -> None:
    refusal = urllib.error.HTTPError(URL, code, "no", Message(), None)
    lab.responses = [refusal, io.BytesIO(lab.bundle)]
    lab.announce(url=URL)
    assert states(lab.run()) == [state]


def test_by_http_a_trickle_is_given_up(lab: Lab) -> None:
    lab.responses = [Trickle(lab.clock)]
    lab.announce(url=URL)
    began = lab.clock.now
    effects: list[Effect] = []
    while lab.updater.has_work:
        effects += lab.updater.work()
    assert "hardly anything came" in said(effects, Software)[0].detail
    assert lab.clock.now - began == pytest.approx(GIVE_UP_S, abs=600.0)


def test_a_version_whose_place_is_damaged_is_installed_again(lab: Lab) -> None:
    """start.sh has started the flashed version instead."""
    assert take(lab, 100, "1.1.0", "r1").state == "running"
    lab.boot("1.0.0")
    assert take(lab, 100, "1.1.0", "r2").state == "running"
    assert lab.slots.current == "1.1.0"


@pytest.mark.parametrize("content", [b"", bytes(3), b"\xff\xfe \x00", b"../../x y", 300 * b"a"])
@pytest.mark.parametrize("name", ["current", "trial", "failed", "signed"])
def test_damaged_files_stop_neither_agent_nor_updates(lab: Lab, name: str, content: bytes) -> None:
    (lab.slots.folder / name).write_bytes(content)
    lab.boot("1.0.0").connected()
    (lab.slots.folder / "trial").unlink(missing_ok=True)  # as start.sh does
    assert take(lab, 100, "1.1.0", "r1").state == "running"


def test_killed_anywhere_a_device_has_a_version_and_comes_to_the_new_one(
    tmp_path: Path, authority: Authority
) -> None:
    update = bundles.make(tmp_path, authority).read_bytes()

    def life(folder: Path, disk: Disk) -> Lab:
        folder.mkdir()
        lab = Lab(folder, authority, update)
        with contextlib.suppress(Killed), disk.watched():
            take_announced(lab)
        return lab

    calm = Disk(tmp_path / "calm")
    assert life(tmp_path / "calm", calm).slots.signed == 100
    for number, operation in enumerate(calm.operations):
        if operation.kind == "fsync":  # says nothing about what a kill leaves
            continue
        folder = tmp_path / str(number)
        lab = life(folder, Disk(folder, killed_at(number)))
        current, on_trial = lab.slots.current, lab.slots.on_trial
        assert current in ("-", "1.1.0")
        assert on_trial <= (current == "1.1.0")
        if current == "1.1.0":
            assert lab.installations[-1].looks == 3
            assert on_trial or lab.slots.signed == 100
        lab.boot("1.1.0" if current == "1.1.0" else "1.0.0")
        with Disk(folder).watched():
            take_announced(lab)
        assert (lab.slots.current, lab.slots.on_trial, lab.slots.signed) == ("1.1.0", False, 100)


def test_what_a_power_cut_has_damaged_is_fetched_anew(lab: Lab) -> None:
    (first,) = said(lab.announce(), Fetch)
    lab.answer(first)
    (partial,) = lab.slots.folder.glob("*.bundle")
    partial.write_bytes(bytes(PIECE))
    lab.boot("1.0.0").connected()
    assert lab.fetch_all(lab.announce()) == []
    effects = lab.updater.work()
    assert [fetch.offset for fetch in said(effects, Fetch)] == [0]
    lab.fetch_all(effects)
    assert states(lab.run()) == ["installing"]


def test_the_version_before_on_a_full_disk_proves_nothing(lab: Lab) -> None:
    """start.sh could not write down that it went back."""
    lab.slots.try_out("1.1.0", "r1", signed=100, prove_s=600)
    assert states(lab.boot("1.0.0").connected()) == ["running"]
    assert lab.hear(Command(command="proven")) == []
    assert lab.slots.on_trial
