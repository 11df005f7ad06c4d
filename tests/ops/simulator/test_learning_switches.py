"""Every switch of the learning, in every strategy that has it: a fleet that really learns."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from broker.envelopes import Envelope
from broker.fields import Message
from broker.training_messages import Activations, Gradients, Round
from coordinator.checkpoint import Checkpoint
from ops.simulator import Device, SimulatedFleet
from tensors.networks import NetworkSpec, build_network, read_state
from tests.tiny import CLASSES, NETWORK, SPEC, differs, make_device_data, make_settings

M = TypeVar("M", bound=Message)
AVERAGING: dict[str, Any] = {"strategy": "averaging"}
SEQUENTIAL: dict[str, Any] = {"strategy": "sequential"}
CASCADE: dict[str, Any] = {"strategy": "cascade"}
BUFFERED: dict[str, Any] = {"aggregation": "buffered", "buffer_size": 2}
MODES = {
    "averaging": AVERAGING,
    "sequential": SEQUENTIAL,
    "cascade": CASCADE,
    "buffered": BUFFERED,
}


def run_fleet(folder: Path, **settings: Any) -> tuple[Checkpoint, list[Message]]:
    said: list[Message] = []

    def watch(envelope: Envelope) -> None:
        said.append(envelope.message)

    devices = [Device(f"d{cut}", cut=cut, data=make_device_data(40, seed=cut)) for cut in (2, 3, 5)]
    fleet = SimulatedFleet(
        make_settings(state_dir=folder, min_devices=len(devices), **settings),
        devices,
        learning="real",
        watch=watch,
    )
    fleet.run()
    return fleet.checkpoint(), said


def of(kind: type[M], said: list[Message]) -> list[M]:
    return [message for message in said if isinstance(message, kind)]


def moved_weights(checkpoint: Checkpoint, other: Checkpoint) -> set[str]:
    assert all(np.isfinite(values).all() for values in checkpoint.model.state.values())
    moved = differs(checkpoint.model.state, other.model.state)
    return {name for name in moved if name.endswith(("weight", "bias"))}


@pytest.mark.parametrize("mode", MODES)
def test_exits_that_are_taught_by_the_whole_network(tmp_path: Path, mode: str) -> None:
    usual, said = run_fleet(tmp_path / "usual", **MODES[mode])
    assert not any(message.logits for message in of(Gradients, said))
    taught, said = run_fleet(tmp_path / "taught", **MODES[mode], distill_weight=1.0)
    answers = of(Gradients, said)
    assert answers
    for message in answers:
        assert message.logits is not None
        assert len(message.logits) < 2 * 8 * CLASSES + 64
    assert any(name.startswith("heads.") for name in moved_weights(taught, usual))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("feedback", ["gradient", "none"])
def test_losses_that_account_for_the_labels(tmp_path: Path, mode: str, feedback: str) -> None:
    usual, _ = run_fleet(tmp_path / "usual", **MODES[mode], feedback=feedback)
    assert all("labels" not in entry for entry in usual.registry)
    calibrated, said = run_fleet(
        tmp_path / "calibrated", **MODES[mode], feedback=feedback, label_skew="calibrated"
    )
    moved = moved_weights(calibrated, usual)
    assert {name.split(".")[0] for name in moved} == {"blocks", "heads"}
    if mode != "buffered":  # there the last checkpoint may come before the last batch
        sent = sum((Counter(message.labels) for message in of(Activations, said)), Counter[int]())
        counted = np.sum([entry["labels"] for entry in calibrated.registry], axis=0)
        np.testing.assert_array_equal(counted, [sent[label] for label in range(CLASSES)])


@pytest.mark.parametrize("mode", ["sequential", "cascade"])
def test_a_slower_server_network_where_many_enter_it(tmp_path: Path, mode: str) -> None:
    moves = {}
    start = read_state(build_network(SPEC))["blocks.9.fc.weight"]
    for rule, share in (("same", 1), ("linear", 1 / 3)):
        checkpoint, said = run_fleet(
            tmp_path / rule, **MODES[mode], server_rate=rule, rounds=1, codec="fp32"
        )
        (record,) = checkpoint.history
        assert record["learning_rate"] == 0.05
        assert record["server_rate"] == pytest.approx(0.05 * share)
        announced = {m.learning_rate for m in of(Round, said) if m.phase == "training"}
        assert announced == {0.05}, "devices keep theirs"
        moves[rule] = np.abs(checkpoint.model.state["blocks.9.fc.weight"] - start).sum()
    assert moves["linear"] < 0.6 * moves["same"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rule", ["reset", "outer"])
def test_the_servers_momentum_at_a_rounds_end(tmp_path: Path, mode: str, rule: str) -> None:
    averaged, _ = run_fleet(tmp_path / "averaged", **MODES[mode])
    other, _ = run_fleet(tmp_path / "other", **MODES[mode], server_momentum=rule)
    assert any(values.any() for values in averaged.model.momentum.values())
    assert not any(values.any() for values in other.model.momentum.values())
    assert moved_weights(other, averaged)
    assert bool(other.model.velocity) is (rule == "outer")


@pytest.mark.parametrize("mode", MODES)
def test_feedback_that_weighs_more_in_every_round(tmp_path: Path, mode: str) -> None:
    usual, said = run_fleet(tmp_path / "usual", **MODES[mode])
    assert {m.feedback_weight for m in of(Round, said)} == {None}
    rising, said = run_fleet(tmp_path / "rising", **MODES[mode], feedback_schedule="rising")
    told = {m.round: m.feedback_weight for m in of(Round, said) if m.phase == "training"}
    assert told == {1: 0.5, 2: 1.0}
    assert "blocks.0.conv.weight" in moved_weights(rising, usual)


@pytest.mark.parametrize("mode", MODES)
def test_a_network_without_batchnorm(tmp_path: Path, mode: str) -> None:
    network = NETWORK.model_copy(update={"norm": "group", "head": "conv"})
    checkpoint, _ = run_fleet(tmp_path, **MODES[mode], network=network)
    names = checkpoint.model.state.keys()
    assert "blocks.3.bn2.weight" in names
    assert not any("running_" in name or name.endswith("tracked") for name in names)
    start = read_state(build_network(NetworkSpec(**network.model_dump())))
    moved = differs(checkpoint.model.state, start)
    assert {"blocks.0.norm.weight", "blocks.3.bn2.weight", "blocks.9.fc.weight"} <= moved
