"""The merged model as devices see it: one parameter pack and one manifest per cut layer.

In ``fp32`` parameters go whole. In any other codec a new version is broadcast as what changed
since the one before (``tensors.deltas``), each array encoded once for all cuts. The version itself
is then what devices arrive at, not quite what was merged; the rest is in the next version.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from broker.envelopes import Envelope, down, to_cut
from broker.messages import Manifest, Parameters
from coordinator.aggregation import Model, half_of
from tensors.codecs import Codec
from tensors.deltas import Delta, encode_delta, sends_deltas, whole_pack
from tensors.networks import State
from tensors.parameters import pack_parameters


def whole_half(state: State, cut: int, codec: Codec, *, classifier: int | None = None) -> bytes:
    """The pack of all that a device with this cut needs; see ``half_of``."""
    name = "fp32" if sends_deltas(codec) else codec.name
    return pack_parameters(half_of(state, cut, classifier=classifier), codec=name)


class Published:
    """A version of the model, packed once for each cut that asks for it.

    ``residual`` is what the versions up to this one still owe to the devices. ``classifier`` is the
    last block, where devices keep that.
    """

    def __init__(
        self,
        run: str,
        version: int,
        model: Model,
        trained: set[int],
        codec: Codec,
        residual: State,
        classifier: int | None = None,
    ) -> None:
        self._run = run
        self._codec = codec
        self._classifier = classifier
        self._delta: Delta | None = None
        self._delta_cuts: frozenset[int] = frozenset()
        self._whole: dict[int, bytes] = {}
        self._said: set[int] = set()
        self._sums: dict[int, tuple[str, int]] = {}
        self.version = version
        self.model = model
        self.trained = trained
        """Cuts whose exit head some device has trained; the others never answer."""
        self.residual = residual

    def replace(self, model: Model, trained: set[int], cuts: Iterable[int]) -> None:
        """The next version, for devices with ``cuts``; ``trained`` are those trained for it."""
        self._delta, self._delta_cuts = None, frozenset(cuts)
        sent: set[str] = set()
        if sends_deltas(self._codec):
            sent = {name for cut in self._delta_cuts for name in self._half(model.state, cut)}
            self._delta = encode_delta(
                {name: model.state[name] for name in sent},
                {name: self.model.state[name] for name in sent},
                self._codec,
                {name: self.residual[name] for name in sent & self.residual.keys()},
            )
        state = dict(model.state) | (self._delta.state if self._delta else {})
        for name in self.residual.keys() - sent:  # nobody needs it as a difference any more
            state[name] = (state[name] + self.residual[name]).astype(state[name].dtype)
        self.residual = self._delta.residual if self._delta else {}
        self.version += 1
        self.model = Model(state, model.momentum, model.velocity)
        self.trained = self.trained | trained
        self._whole.clear()
        self._sums.clear()
        self._said.clear()

    def manifest(self, cut: int) -> Envelope:
        """Which parameters a device with this cut should hold."""
        if cut not in self._sums:
            pack = whole_pack(self._half(self.model.state, cut))
            self._sums[cut] = hashlib.sha256(pack).hexdigest(), len(pack)
        digest, size = self._sums[cut]
        return to_cut(
            cut,
            Manifest(
                run=self._run,
                version=self.version,
                base=self._base(cut),
                sha256=digest,
                size=size,
                trained=cut in self.trained,
            ),
        )

    def news(self, cut: int) -> list[Envelope]:
        """The manifest, unless it was said already; it is retained."""
        if cut in self._said:
            return []
        self._said.add(cut)
        return [self.manifest(cut)]

    def say_again(self) -> None:
        """The broker may have lost what it retained."""
        self._said.clear()

    def broadcast(self, cut: int) -> Envelope:
        """The parameters, to every device with this cut; only what changed if they have it all."""
        base = self._base(cut)
        if base is None:
            return to_cut(cut, self._parameters(cut))
        assert self._delta is not None
        pack = self._delta.pack(self._half(self.model.state, cut))
        return to_cut(
            cut, Parameters(run=self._run, version=self.version, cut=cut, base=base, state=pack)
        )

    def answer(self, device: str, cut: int) -> list[Envelope]:
        """Manifest and whole parameters, to the one device that asked."""
        return [*self.news(cut), down(device, self._parameters(cut))]

    def _half(self, state: State, cut: int) -> State:
        return half_of(state, cut, classifier=self._classifier)

    def _base(self, cut: int) -> int | None:
        return self.version - 1 if self._delta is not None and cut in self._delta_cuts else None

    def _parameters(self, cut: int) -> Parameters:
        if cut not in self._whole:
            self._whole[cut] = whole_half(
                self.model.state, cut, self._codec, classifier=self._classifier
            )
        return Parameters(run=self._run, version=self.version, cut=cut, state=self._whole[cut])
