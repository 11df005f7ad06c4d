"""The parameters a device holds: how new ones are checked and taken, how its own are sent."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import numpy as np

from broker.messages import Assignment, Manifest, Parameters
from edge_agent.errors import StateError
from edge_agent.learning import Learner
from edge_agent.snapshots import Snapshot
from tensors.codecs import parse_codec
from tensors.deltas import apply_delta, encode_delta, fingerprint, sends_deltas
from tensors.errors import CodecError, FormatError, TensorsError
from tensors.parameters import pack_parameters, unpack_parameters

log = logging.getLogger("splitfleet.agent")

State = Mapping[str, np.ndarray]


class SnapshotStore(Protocol):
    """Where a device keeps its learning between restarts."""

    def save(self, run: str, cut: int, version: int, snapshot: Snapshot) -> None:
        """Keep the start of the round that begins at ``version``."""
        ...

    def load(self, run: str, cut: int) -> tuple[int, Snapshot] | None:
        """Version and snapshot kept for this run and cut, if there is one."""
        ...


class Holding:
    """The version a learner starts its rounds from, and what uploads still owe the coordinator.

    That residual is added to the next upload. An upload's becomes valid with the next version that
    is taken, whichever way it comes, or when it is :meth:`delivered` for good: until then the round
    may be repeated from its start. It ends with the run or the cut. Without its snapshot on disk a
    device loses it, and with it less than a quantization step of its parameters.
    """

    def __init__(self, assignment: Assignment, learner: Learner, snapshots: SnapshotStore) -> None:
        assert assignment.cut is not None
        self._run, self._cut = assignment.run, assignment.cut
        self._codec = parse_codec(assignment.parameter_codec)
        self._learner = learner
        self._snapshots = snapshots
        self._residual: State = {}
        self._next_residual: State | None = None
        self.version: int | None = None
        try:
            kept = snapshots.load(self._run, self._cut)
            if kept is not None:
                learner.restore(kept[1])
                self.version, self._residual = kept[0], _fitting(kept[1])
        except (StateError, TensorsError) as exc:
            log.warning("starting without the device's own state: %s", exc)

    def read(self, message: Parameters, manifest: Manifest | None) -> State | None:
        """The state in a message; None if it is not for this device or not what it should be.

        What changed since a version is of use only to who holds that, and only if the manifest
        confirms the result.
        """
        if (message.run, message.cut) != (self._run, self._cut) or message.version == self.version:
            return None
        try:
            if message.base is None:
                names = self._learner.start.state.keys() or None
                state = unpack_parameters(message.state, names=names)
            elif message.base == self.version:
                state = apply_delta(self._learner.start.state, message.state)
            else:
                return None
        except FormatError as exc:
            log.warning("parameters version %d are unusable: %s", message.version, exc)
            return None
        if manifest is None or (manifest.run, manifest.version) != (message.run, message.version):
            return state if message.base is None else None
        if manifest.sha256 != fingerprint(state):
            log.warning("parameters version %d do not match their checksum", message.version)
            return None
        return state

    def take(self, version: int, state: State) -> bool:
        """Start the next round from this state; False if it does not fit the network."""
        try:
            self._learner.load(state)
        except TensorsError as exc:
            log.warning("parameters version %d are unusable: %s", version, exc)
            return False
        self.version = version
        self.delivered()
        snapshot = replace(self._learner.start, residual=self._residual)
        try:
            self._snapshots.save(self._run, self._cut, version, snapshot)
        except StateError as exc:
            log.warning("going on without saving the device's own state: %s", exc)
        return True

    def delivered(self) -> None:
        """The last upload counts for good: the next one from the same version owes what it owes."""
        if self._next_residual is not None:
            self._residual, self._next_residual = self._next_residual, None

    def upload(self) -> tuple[bytes, int | None]:
        """What was learnt since the start of the round, and the version it is the difference to."""
        state, start = self._learner.state(), self._learner.start.state
        if not state:
            return b"", None
        try:
            if sends_deltas(self._codec):
                delta = encode_delta(state, start, self._codec, self._residual)
                self._next_residual = delta.residual
                return delta.pack(), self.version
            return pack_parameters(state, codec=self._codec.name), None
        except CodecError as exc:  # the coordinator leaves out what is no parameter pack
            log.warning("nothing to upload: %s", exc)
            return b"", None


def _fitting(snapshot: Snapshot) -> State:
    return {
        name: values
        for name, values in snapshot.residual.items()
        if name in snapshot.state and values.shape == snapshot.state[name].shape
    }
