"""The merged model as devices see it: one parameter pack and one manifest per cut layer."""

from __future__ import annotations

import hashlib
import logging

from broker.messages import Envelope, Manifest, Parameters, down, to_cut
from coordinator.aggregation import Model
from tensors.errors import CodecError
from tensors.parameters import pack_parameters

log = logging.getLogger("splitfleet.coordinator")


class Published:
    """A version of the model, packed once for each cut that asks for it."""

    def __init__(self, run: str, version: int, model: Model, trained: set[int], codec: str) -> None:
        self._run = run
        self._codec = codec
        self._packs: dict[int, bytes] = {}
        self.version = version
        self.model = model
        self.trained = trained
        """Cuts whose exit head some device has trained; the others never answer."""

    def replace(self, model: Model, trained: set[int]) -> None:
        """The next version; ``trained`` are cuts that were trained for it."""
        self.version += 1
        self.model = model
        self.trained = self.trained | trained
        self._packs.clear()

    def manifest(self, cut: int) -> Envelope:
        """Which parameters a device with this cut should hold."""
        pack = self._pack(cut)
        digest = hashlib.sha256(pack).hexdigest()
        return to_cut(
            cut,
            Manifest(
                run=self._run,
                version=self.version,
                sha256=digest,
                size=len(pack),
                trained=cut in self.trained,
            ),
        )

    def broadcast(self, cut: int) -> Envelope:
        """The parameters, to every device with this cut."""
        return to_cut(cut, self._parameters(cut))

    def answer(self, device: str, cut: int) -> list[Envelope]:
        """Manifest and parameters, to the one device that asked."""
        return [self.manifest(cut), down(device, self._parameters(cut))]

    def _parameters(self, cut: int) -> Parameters:
        return Parameters(run=self._run, version=self.version, cut=cut, state=self._pack(cut))

    def _pack(self, cut: int) -> bytes:
        if cut not in self._packs:
            prefixes = (*(f"blocks.{i}." for i in range(cut)), f"heads.{cut}.")
            half = {n: v for n, v in self.model.state.items() if n.startswith(prefixes)}
            try:
                self._packs[cut] = pack_parameters(half, codec=self._codec)
            except CodecError as exc:
                log.warning("sending version %d in fp32: %s", self.version, exc)
                self._packs[cut] = pack_parameters(half)
        return self._packs[cut]
