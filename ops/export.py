"""``splitfleet model export``: a version of a run as a file that answers without a fleet.

Three formats: ``model`` is the whole network with all exits, for ``splitfleet predict --model``;
``pt2`` and ``onnx`` are a device's half with its exit as a program for other runtimes. A file is
read again and compared with what PyTorch answers before it gets its name.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from coordinator.checkpoint import Checkpoint
from coordinator.service import held_out_images
from coordinator.settings import CoordinatorSettings
from ops.checkpoints import settings_of_run
from ops.errors import OpsError, SettingsWrong
from ops.exits import ExitSettings, judge_exits
from ops.model_file import KEY, CutCard, ModelCard, read_model, write_bytes, write_model
from ops.models import load_version
from ops.run import settings_of
from ops.units import byte_size, percent
from tensors.datasets import Dataset
from tensors.errors import ProgramError
from tensors.exit_rules import ExitRule
from tensors.networks import CutNetwork, Exits, NetworkSpec, build_network, write_state
from tensors.onnx_half import INPUT, OUTPUTS
from tensors.programs import (
    CHECKED_BATCHES,
    Outputs,
    compare,
    need_onnx,
    onnx_model,
    quiet,
    random_images,
    traced,
)

Format = Literal["model", "pt2", "onnx"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Which version is exported, and where the class names and held-out images come from."""

    state_dir: Path
    version: str
    dataset: str | None = None
    data_root: Path | None = None
    download: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What thresholds shall be: given, or calibrated; else those the version served with."""

    threshold: float | None = None
    accuracy: float | None = None
    offload: float | None = None
    level: float | None = None
    rule: ExitRule | None = None

    @property
    def flags(self) -> dict[str, float | None]:
        """What is calibrated to."""
        return {"accuracy": self.accuracy, "offload": self.offload, "level": self.level}

    @property
    def calibrate(self) -> bool:
        """Whether anything is."""
        return any(value is not None for value in self.flags.values())


def export(
    source: Source,
    to: Path,
    kind: Format,
    *,
    cut: int | None,
    wishes: Wishes,
) -> None:
    """Write ``to``, check it, and say what it holds.

    Raises :class:`SettingsWrong`, ``StoreError``, ``DataError``; ``ProgramError`` or
    :class:`OpsError` if what was written does not answer as PyTorch does. ``to`` is then as it was
    before.
    """
    if to.is_dir() or not to.name:
        raise SettingsWrong(f"--to {to}: that is a folder; name a file in it")
    if kind == "onnx":
        try:
            need_onnx()
        except ProgramError as exc:
            raise SettingsWrong(f"{exc}, or export --format pt2") from exc
    card, network = _load(source, wishes)
    if kind == "model":
        _export_model(to, card, network)
        print(f"{to}: {_sentence(card)}, {byte_size(to.stat().st_size)}")
        return
    cut, _ = card.cut_card(cut)
    make, load = (_pt2, _load_pt2) if kind == "pt2" else (_onnx, _load_onnx)
    half = Exits(network.device_half(cut)).eval()
    with quiet():
        data = make(half, card)
        difference = compare(half, load(data), card.spec)
    write_bytes(to, data)
    print(
        f"{to}: version {card.version} of {card.run} up to cut {cut} with its exit, "
        f"{byte_size(len(data))}\n"
        f"input   {INPUT} float32 (N, {card.network.channels}, {card.network.size}, "
        f"{card.network.size}), normalised: mean {card.mean}, std {card.std}\n"
        f"outputs {OUTPUTS[0]} at the cut, {OUTPUTS[1]} (N, {card.network.classes}) of the exit\n"
        f"differs from PyTorch by {difference:.1e} of the largest value at most"
    )


def _load(source: Source, wishes: Wishes) -> tuple[ModelCard, CutNetwork]:
    run, store, identity, checkpoint = load_version(source.state_dir, source.version)
    given = {"dataset": source.dataset, "data_root": source.data_root, "download": source.download}
    made = settings_of_run(store.folder, identity, given)
    images = held_out_images(made)
    if images is None:
        raise SettingsWrong(
            "this run names no data set, of which the class names and the scale of pixels come: "
            "give --dataset, e.g. fashion-mnist-small"
        )
    spec = NetworkSpec(**made.network.model_dump())
    network = build_network(spec)
    write_state(network, checkpoint.model.state)
    rule: ExitRule = wishes.rule or checkpoint.policies.get("basis", {}).get("exit_rule", "entropy")
    card = ModelCard(
        run=run,
        version=checkpoint.version,
        dataset=images.name,
        score=checkpoint.score,
        network=made.network,
        classes=images.classes,
        mean=images.mean,
        std=images.std,
        exit_rule=rule,
        cuts=_cuts(checkpoint, made, images, wishes, rule),
    )
    return card, network.eval()


def _cuts(
    checkpoint: Checkpoint,
    made: CoordinatorSettings,
    images: Dataset,
    wishes: Wishes,
    rule: ExitRule,
) -> dict[int, CutCard]:
    """Thresholds: as wished, else as the version served with, else calibrated."""
    trained = sorted(checkpoint.trained_cuts)
    if wishes.threshold is not None:
        return dict.fromkeys(trained, CutCard(threshold=wishes.threshold))
    served = _served(checkpoint)
    as_served = rule == checkpoint.policies.get("basis", {}).get("exit_rule")
    if as_served and not wishes.calibrate and served.keys() == set(trained):
        return served
    settings = settings_of(ExitSettings, "exits", None, wishes.flags | {"rule": rule})
    if not trained:
        return {}
    judged = judge_exits(
        checkpoint.model.state,
        NetworkSpec(**made.network.model_dump()),
        trained,
        images,
        made.codec,
        settings=settings,
    )
    return {
        found.row["cut"]: CutCard(
            threshold=found.row["threshold"],
            accuracy=found.row["accuracy"],
            offload_rate=found.row["offload_rate"],
        )
        for found in judged
    }


def _served(checkpoint: Checkpoint) -> dict[int, CutCard]:
    """What the version's exits served with; nothing if the checkpoint does not say."""
    try:
        return {
            int(cut): CutCard(
                threshold=policy["threshold"],
                accuracy=policy["accuracy"],
                offload_rate=policy["offload_rate"],
            )
            for cut, policy in checkpoint.policies["cuts"].items()
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        return {}


def _export_model(to: Path, card: ModelCard, network: CutNetwork) -> None:
    """Beside its place first: a file that was there is replaced by one that has been checked."""
    from tensors.networks import read_state

    beside = to.with_name(f".checking-{to.name}")
    try:
        write_model(beside, card, read_state(network))
        again = read_model(beside, factories=(card.network.name,))
        images = torch.from_numpy(random_images(card.spec, CHECKED_BATCHES[-1]))
        with torch.inference_mode():
            for cut in sorted(card.cuts):
                for ours, theirs in zip(
                    Exits(network.device_half(cut))(images),
                    Exits(again.network.device_half(cut))(images),
                    strict=True,
                ):
                    _require(torch.equal(ours, theirs), f"the exit at cut {cut}")
            _require(torch.equal(network(images), again.network(images)), "the network")
            _require(again.card == card, "the description")
        write_bytes(to, beside.read_bytes())
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def _require(equal: bool, what: str) -> None:  # noqa: FBT001 one condition, one name
    if not equal:
        raise OpsError(f"{what} is not what was written: check the disk, and report this")


def _pt2(half: Exits, card: ModelCard) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(traced(half, card.spec), buffer, extra_files={KEY: card.model_dump_json()})
    return buffer.getvalue()


def _load_pt2(data: bytes) -> Callable[[np.ndarray], Outputs]:
    module = torch.export.load(io.BytesIO(data)).module()

    def run(images: np.ndarray) -> Outputs:
        with torch.inference_mode():
            return tuple(output.numpy() for output in module(torch.from_numpy(images)))

    return run


def _onnx(half: Exits, card: ModelCard) -> bytes:
    from onnx.helper import set_model_props

    model = onnx_model(half, card.spec)
    set_model_props(model, {KEY: card.model_dump_json()})
    content: bytes = model.SerializeToString()
    return content


def _load_onnx(data: bytes) -> Callable[[np.ndarray], Outputs]:
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])

    def run(images: np.ndarray) -> Outputs:
        return tuple(session.run(list(OUTPUTS), {INPUT: images}))

    return run


def _sentence(card: ModelCard) -> str:
    exits = ", ".join(
        f"{cut} (τ = {found.threshold:.3f}"
        + (
            f": {percent(found.accuracy)} right, {percent(found.offload_rate)} passed on)"
            if found.accuracy is not None
            else ")"
        )
        for cut, found in sorted(card.cuts.items())
    )
    return (
        f"version {card.version} of {card.run}, {len(card.classes)} classes, exits at cut "
        f"{exits or '– none was trained'}"
    )
