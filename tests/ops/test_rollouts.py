"""What an operator can do with a rollout in each of its states, and what it is refused for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coordinator.identity.fleet import state_dir
from coordinator.updates.book import Progress, Rollout, RolloutBook
from coordinator.updates.rollouts import BUNDLES, bundle_file
from ops import rollouts
from ops.bundles import make_bundle
from ops.errors import SettingsWrong
from ops.identity import init_fleet


class Lab:
    """A fleet of two devices, and a bundle for them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        made = init_fleet(folder / "plant", "plant", broker_names=["broker.example"])
        self.close = made.close
        self.fleet = made.fleet
        for device in ("cam-1", "cam-2"):
            made.add_device(device)
        self.book = RolloutBook(self.fleet.roster, clock=lambda: 1000.0)
        self.bundle = self.make("1.1.0")

    def make(self, version: str) -> Path:
        wheels = self.folder / version
        wheels.mkdir()
        (wheels / f"splitfleet-{version}-py3-none-any.whl").write_bytes(b"wheel" * 1000)
        bundle = self.folder / f"{version}.tar"
        make_bundle(wheels, bundle, self.fleet.authority, signed=self.book.next_signed())
        return bundle

    def start(self, **changes: Any) -> Rollout:
        about: dict[str, Any] = {
            "bundle": self.bundle,
            "stages": ["100%"],
            "error_threshold": "10%",
            "prove_s": 600.0,
            "patience_s": 7200.0,
        }
        return rollouts.start(self.fleet, **about | changes)

    def comes_to(self, rollout: Rollout, state: Any, **devices: Progress) -> None:
        self.book.put(replace(rollout, state=state))
        for device, progress in devices.items():
            self.book.put_part(rollout.id, device.replace("_", "-"), 0, progress)

    @property
    def kept(self) -> set[Path]:
        return set((state_dir(self.fleet.folder) / BUNDLES).iterdir())


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path)
    yield made
    made.close()


def test_what_is_over_can_be_stopped_for_those_who_are_away(lab: Lab) -> None:
    rollout = lab.start()
    lab.comes_to(rollout, "done", cam_1="done", cam_2="waiting")
    assert set(lab.book.wanted()) == {"cam-1", "cam-2"}
    assert rollouts.stop(lab.fleet).state == "stopped"
    assert set(lab.book.wanted()) == {"cam-1"}
    with pytest.raises(SettingsWrong, match="not running"):
        rollouts.stop(lab.fleet)
    assert rollouts.resume(lab.fleet).state == "running"


def test_what_is_wholly_over_can_be_neither_stopped_nor_resumed(lab: Lab) -> None:
    rollout = lab.start()
    lab.comes_to(rollout, "done", cam_1="done", cam_2="failed")
    with pytest.raises(SettingsWrong, match="not running"):
        rollouts.stop(lab.fleet)
    with pytest.raises(SettingsWrong, match="not stopped"):
        rollouts.resume(lab.fleet)


def test_without_a_rollout_there_is_nothing_to_stop(lab: Lab) -> None:
    for command in (rollouts.stop, rollouts.resume):
        with pytest.raises(SettingsWrong, match="nothing has been rolled out"):
            command(lab.fleet)


def test_who_resumes_after_failures_says_how_many_are_allowed(lab: Lab) -> None:
    rollout = lab.start()
    lab.comes_to(rollout, "stopped", cam_1="failed", cam_2="done")
    with pytest.raises(SettingsWrong, match="1 of 2 devices failed, so it would stop at once"):
        rollouts.resume(lab.fleet)
    resumed = rollouts.resume(lab.fleet, error_threshold="50%")
    assert (resumed.state, resumed.error_threshold) == ("running", 0.5)


@pytest.mark.parametrize("stage", ["lap-*", "class:pi9", "cam-3"])
def test_a_stage_that_is_nobody_is_refused(lab: Lab, stage: str) -> None:
    with pytest.raises(SettingsWrong, match="is nobody: splitfleet fleet list"):
        lab.start(stages=["cam-1", stage, "100%"])
    assert lab.book.rollouts() == []


def test_a_bundle_that_is_damaged_is_refused_before_any_device_has_it(lab: Lab) -> None:
    content = bytearray(lab.bundle.read_bytes())
    content[content.index(b"wheelwheel")] ^= 1
    lab.bundle.write_bytes(content)
    with pytest.raises(SettingsWrong, match=r"damaged \(checksum\); make it with"):
        lab.start()
    os.truncate(lab.bundle, 3000)
    with pytest.raises(SettingsWrong, match="make it with"):
        lab.start()


def test_a_copy_that_was_damaged_is_made_again(lab: Lab) -> None:
    rollout = lab.start()
    copy = bundle_file(state_dir(lab.fleet.folder) / BUNDLES, rollout.sha256)
    os.truncate(copy, 100)
    rollouts.stop(lab.fleet)
    lab.start()
    assert copy.read_bytes() == lab.bundle.read_bytes()


def test_bundles_that_nobody_waits_for_are_removed(lab: Lab) -> None:
    first = lab.start()
    lab.comes_to(first, "stopped", cam_1="waiting")
    lab.bundle = lab.make("1.2.0")
    second = lab.start()
    assert {file.stem for file in lab.kept} == {second.sha256}
    lab.comes_to(second, "done", cam_1="waiting")
    lab.bundle = lab.make("1.3.0")
    third = lab.start()
    assert {file.stem for file in lab.kept} == {second.sha256, third.sha256}


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"prove_s": float("inf")}, "--prove"), ({"url": "ftp://files.example/b"}, "--url")],
)
def test_what_devices_would_not_take_names_its_option(
    lab: Lab, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(SettingsWrong, match=says):
        lab.start(**changes)
