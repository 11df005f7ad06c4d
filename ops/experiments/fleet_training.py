"""An arm that is a fleet: the production coordinator and agents, in one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coordinator.observer import Observer
from coordinator.store import Store
from edge_agent.data import DeviceData
from edge_agent.snapshots import DiskSnapshots, Snapshot, version_of
from ops.errors import FleetFailed
from ops.experiments.images import ImageSets, resident_images
from ops.experiments.spec import Training
from ops.simulator.fleet import SimulatedFleet
from ops.simulator.programs import Device
from tensors.networks import State


class FleetTraining:
    """A simulated fleet on links that take no time, whose state lies in ``folder``.

    What lies there already is gone on with.
    """

    def __init__(self, training: Training, images: ImageSets, folder: Path) -> None:
        self._training = training
        self._closed = _Closed()
        if training.settings.aggregation == "rounds":
            _go_back_together(folder, training.devices)
        self._kept: list[_Snapshots] = []
        nothing = np.zeros(0, np.int64)
        devices = []
        shares = training.shares(images)
        resident = resident_images(images.train, training.settings.device)
        for name, cut, rows in zip(training.devices, training.cuts, shares, strict=True):
            self._kept.append(_Snapshots(folder / "devices" / name))
            data = DeviceData(images.train, rows, None, nothing, resident)
            devices.append(Device(name, cut=cut, data=data, snapshots=self._kept[-1]))
        settings = training.settings.model_copy(
            update={"state_dir": folder / "coordinator", "dataset": None}
        )
        self._fleet = SimulatedFleet(
            settings,
            devices,
            seed=training.seed,
            learning="real",
            by_reference=True,
            observer=self._closed,
        )
        self._fleet.run(until=lambda: self._fleet.coordinator.machine is not None)
        self.round = self._fleet.checkpoint().round

    def advance(self) -> None:
        """Train the next round, without a barrier maybe several of them.

        Raises ``FleetFailed`` if it does not close, or a batch could not be computed.
        """
        wanted = self.round + 1
        self._fleet.run(until=lambda: self._is_kept(wanted) or self._fleet.done)
        checkpoint = self._fleet.checkpoint()
        if checkpoint.round < wanted:
            raise FleetFailed(
                f"round {wanted} of {self._training.arm} was abandoned {self._closed.abandoned} "
                "times: too few devices finish it"
            )
        self.round = checkpoint.round
        lost = sum(
            device["account"]["discarded"].get("not_computable", 0)
            for device in checkpoint.history[-1]["devices"].values()
        )
        if lost:  # for want of memory, maybe: what is trained with the rest is another experiment
            raise FleetFailed(
                f"{lost} batches of round {self.round} of {self._training.arm} could not be "
                "computed; the log says why"
            )

    def models(self) -> dict[str, State]:
        """One for all devices."""
        return {"": self._fleet.checkpoint().model.state}

    def records(self) -> list[dict[str, Any]]:
        """Of every closed round: samples applied, batches discarded, bytes."""
        return [summary(record) for record in self._fleet.checkpoint().history]

    def _is_kept(self, number: int) -> bool:
        """Whether the round has closed, and every device can go on from there after a crash."""
        if self._closed.round != number or number == self._training.settings.rounds:
            return self._closed.round > number
        return all(kept.version >= self._closed.version for kept in self._kept)


def summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """What an experiment keeps of a coordinator's record of a round."""
    devices = record["devices"].values()
    sent = record["bytes"]
    return {
        "round": record["round"],
        "samples": sum(device["samples"] for device in devices),
        "discarded": sum(sum(device["account"]["discarded"].values()) for device in devices),
        "bytes_up": sum(size for role, size in sent.items() if role.startswith("up/")),
        "bytes_down": sum(size for role, size in sent.items() if role.startswith("down/")),
        "train_loss": record["train_loss"],
    }


class _Closed(Observer):
    def __init__(self) -> None:
        self.round = self.version = self.abandoned = 0

    def round_ended(self, number: int, outcome: str, record: dict[str, Any]) -> None:
        if outcome == "closed":
            self.round, self.version = number, record["version"]
        elif outcome == "abandoned":
            self.abandoned += 1


class _Snapshots(DiskSnapshots):
    """Knows which version it keeps, and keeps the one before."""

    version = -1

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._before = folder / "before.safetensors"

    def load(self, run: str, cut: int) -> tuple[int, Snapshot] | None:
        kept = super().load(run, cut)
        if kept is not None:
            self.version = kept[0]
        return kept

    def save(self, run: str, cut: int, version: int, snapshot: Snapshot) -> None:
        if self.path.exists() and version != self.version:
            self.path.replace(self._before)
        super().save(run, cut, version, snapshot)
        self.version = version

    def versions(self) -> set[int]:
        """Those that can be gone on from."""
        found = (version_of(path) for path in (self.path, self._before) if path.exists())
        return {version for version in found if version is not None}

    def go_back(self, version: int) -> None:
        """Keep this version, which is one of :meth:`versions`, as the newest."""
        if version_of(self.path) != version:
            self._before.replace(self.path)


def _go_back_together(folder: Path, devices: Sequence[str]) -> None:
    """After a kill between a checkpoint and the last device's: to the version that all have.

    Otherwise a device would go on without its momentum, and come to something else.
    """
    store = Store(folder / "coordinator")
    kept = [_Snapshots(folder / "devices" / name) for name in devices]
    if store.current() is None:
        return
    newest, *older = reversed(store.versions())
    for version in (newest, *older):
        if all(version in each.versions() for each in kept):
            break
    else:
        return  # of the first round there is nothing yet
    for each in kept:
        each.go_back(version)
    if version != newest:
        store.go_back(version)
