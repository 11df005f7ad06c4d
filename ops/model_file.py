"""A trained network as one file: every block and exit, and all that is needed to answer pictures.

A safetensors file whose metadata has, under ``splitfleet``, a :class:`ModelCard` as JSON. Nothing
in it is executed: a network of the user's own is built only by a factory that the reader allows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from broker.messages import Network
from coordinator.atomic_files import write_file
from edge_agent.pictures import PictureSpec
from ops.errors import DiskTrouble, SettingsWrong
from tensors.errors import NetworkError
from tensors.exit_rules import ExitRule

if TYPE_CHECKING:
    from tensors.networks import CutNetwork, NetworkSpec

KEY = "splitfleet"
BUILT_IN = ("resnet18",)
Share = Annotated[float, Field(ge=0, le=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class CutCard(BaseModel):
    """An exit that was trained: its threshold, and what that did to held-out images."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    threshold: Finite
    accuracy: Share | None = None
    """Of exit and whole network together; None where it was not measured."""
    offload_rate: Share | None = None


class ModelCard(BaseModel):
    """What a file says of the network in it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    run: str
    version: Annotated[int, Field(ge=0)]
    dataset: str
    score: Share | None
    """Accuracy of the whole network on the run's held-out images."""
    network: Network
    classes: tuple[str, ...]
    mean: tuple[Finite, ...]
    std: tuple[Positive, ...]
    """Per channel, of pixels scaled to [0, 1]."""
    exit_rule: ExitRule
    cuts: dict[int, CutCard]
    """By cut layer: the exits that were trained. The others never answer."""

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if len(self.classes) > self.network.classes:
            raise ValueError("more names than the network has classes")
        if not len(self.mean) == len(self.std) == self.network.channels:
            raise ValueError("mean and std must have one value for each channel")
        return self

    @property
    def spec(self) -> NetworkSpec:
        """What :func:`tensors.networks.build_network` takes."""
        from tensors.networks import NetworkSpec

        return NetworkSpec(**self.network.model_dump())

    @property
    def pictures(self) -> PictureSpec:
        """How pictures become what the network takes."""
        network = self.network
        return PictureSpec(
            size=network.size, channels=network.channels, mean=self.mean, std=self.std
        )

    def cut_card(self, cut: int | None) -> tuple[int, CutCard]:
        """A trained exit by its cut, or the only one. Raises :class:`SettingsWrong`."""
        known = ", ".join(map(str, sorted(self.cuts))) or "none"
        if cut is None:
            if len(self.cuts) != 1:
                raise SettingsWrong(f"which exit? give --cut; trained are those at {known}")
            (cut,) = self.cuts
        if cut not in self.cuts:
            raise SettingsWrong(f"--cut {cut}: no exit was trained there; trained are {known}")
        return cut, self.cuts[cut]


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A network in evaluation mode, and its card."""

    card: ModelCard
    network: CutNetwork


def write_model(path: Path, card: ModelCard, state: Mapping[str, np.ndarray]) -> None:
    """Write the file, whole or not at all. Raises :class:`DiskTrouble`."""
    arrays = {name: np.asarray(values, order="C") for name, values in state.items()}
    write_bytes(path, save(arrays, metadata={KEY: card.model_dump_json()}))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file that a person named, whole or not at all. Raises :class:`DiskTrouble`."""
    try:
        write_file(path, data)
    except OSError as exc:
        raise DiskTrouble(f"cannot write {path}: {exc.strerror or exc}; choose another") from exc


def read_model(path: Path, *, factories: Collection[str] = ()) -> Model:
    """Read a file that :func:`write_model` wrote, or somebody else did.

    ``factories``: those ``package.module:function`` that it may name beside the built-in networks.

    Raises :class:`SettingsWrong`: it is missing, damaged, no model, of another version, names a
    factory that is not allowed, or its parameters do not fit or are not finite.
    """
    try:
        with safe_open(path, framework="np") as file:
            text = (file.metadata() or {}).get(KEY)
            if text is None:
                raise SettingsWrong(f"{path} is no model: make one with splitfleet model export")
            card = ModelCard.model_validate_json(text)
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 it is no mapping
            if card.network.name not in {*BUILT_IN, *factories}:
                raise SettingsWrong(
                    f"{path} is of the network {card.network.name}: that is code which would be "
                    f"run here; allow it with --network {card.network.name}"
                )
            if card.network.name in BUILT_IN:
                _check_shapes(card.spec, shapes)
            state = {name: file.get_tensor(name) for name in shapes}
    except ValidationError as exc:
        error = exc.errors(include_url=False)[0]
        place = ".".join(map(str, error["loc"])) or "metadata"
        raise SettingsWrong(
            f"{path}: {place}: {error['msg']}; it is damaged or of another version of splitfleet"
        ) from exc
    except (OSError, SafetensorError, NetworkError, TypeError, ValueError) as exc:
        raise SettingsWrong(f"{path} cannot be used: {exc}; export it again") from exc
    return Model(card, _built(path, card, state))


def _check_shapes(spec: NetworkSpec, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Before memory is taken for a network: that the file holds just this one."""
    import torch

    from tensors.networks import build_network

    with torch.device("meta"):
        wanted = build_network(spec).state_dict()
    odd = sorted(wanted.keys() ^ shapes.keys())
    odd = odd or [name for name in wanted if tuple(wanted[name].shape) != shapes[name]]
    if odd:
        raise NetworkError(f"its parameters do not fit its network: {', '.join(odd[:3])} …")


def _built(path: Path, card: ModelCard, state: dict[str, Any]) -> CutNetwork:
    from tensors.networks import build_network, write_state

    try:
        network = build_network(card.spec)
        write_state(network, state)
    except NetworkError as exc:
        raise SettingsWrong(f"{path}: {exc}") from exc
    for name, values in state.items():
        if not np.isfinite(values).all():
            raise SettingsWrong(f"{path}: parameter {name} is not finite; export it again")
    illegal = sorted(set(card.cuts) - set(network.cuts))
    if illegal:
        raise SettingsWrong(f"{path}: there is no cut {illegal[0]}; export it again")
    return network.eval()
