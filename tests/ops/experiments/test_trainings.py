"""What an arm trains, whether interrupted or not; learning is real here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from coordinator.store import Store
from edge_agent.snapshots import DiskSnapshots, Snapshot
from ops.errors import DiskTrouble, FleetFailed, SettingsWrong
from ops.experiments.fleet_training import FleetTraining
from ops.experiments.images import load_images
from ops.experiments.local_training import LocalTraining
from ops.experiments.one_run import run_training
from ops.experiments.spec import Arm, Experiment, Training, trainings
from tensors.batches import BatchStream
from tensors.networks import NetworkSpec, State, build_network

ROUNDS = 3


def make_training(
    kind: str = "fleet", seed: int = 1, cuts: tuple[int, ...] = (2, 4), **settings: Any
) -> Training:
    experiment = Experiment(
        name="test",
        seeds=(seed,),
        reference="arm",
        data={
            "dataset": "fashion-mnist-small",
            "train_images": 130,
            "test_images": 50,
            "curve_images": 20,
        },
        fleet={"cuts": cuts},
        training={
            "rounds": ROUNDS,
            "batch_size": 16,
            "codec": "fp32",
            "device": "cpu",
            "precision": "fp32",
            "memory_format": "contiguous",
            "network": {"width": 4},
            **settings,
        },
        arms=(Arm(name="arm", kind=kind),),
    )
    (training,) = trainings(experiment, data_root=None)
    return training


def run(training: Training, folder: Path, *, stop_after: int = 99) -> Any:
    rounds: list[int] = []
    return run_training(
        training,
        folder,
        data_root=None,
        told=lambda record: rounds.append(record["round"]),
        stop=lambda: len(rounds) >= stop_after,
    )


def state_of(folder: Path) -> State:
    store = Store(folder)
    assert store.current() is not None
    checkpoint = store.latest()
    assert checkpoint is not None
    return checkpoint.model.state


ARMS = [
    ("centralized", {}, "store"),
    ("distributed", {}, "device-0-cut-2"),
    ("fleet", {}, "coordinator"),
    ("fleet", {"feedback": "none"}, "coordinator"),
    ("fleet", {"strategy": "cascade"}, "coordinator"),
    ("fleet", {"server_momentum": "outer"}, "coordinator"),
    ("fleet", {"label_skew": "calibrated", "codec": "int4+zstd"}, "coordinator"),
]


@pytest.mark.parametrize(("kind", "settings", "store"), ARMS)
def test_what_is_stopped_after_a_round_ends_as_what_is_not(
    tmp_path: Path, kind: str, settings: dict[str, Any], store: str
) -> None:
    training = make_training(kind, **settings)
    whole = run(training, tmp_path / "whole")
    for _ in range(ROUNDS - 1):
        assert run(training, tmp_path / "parts", stop_after=1) is None
    parts = run(training, tmp_path / "parts")
    wanted, found = (state_of(tmp_path / name / "state" / store) for name in ("whole", "parts"))
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-6, err_msg=name)
    without_time = [
        [
            {k: v for k, v in record.items() if k not in ("seconds", "bytes_up", "bytes_down")}
            for record in result["history"]
        ]
        for result in (whole, parts)
    ]
    assert without_time[0] == without_time[1]
    assert [record["round"] for record in whole["history"]] == [1, 2, 3]
    assert whole["final"] == parts["final"]


def test_without_a_barrier_no_version_is_missing(tmp_path: Path) -> None:
    training = make_training(
        aggregation="buffered", buffer_size=2, rounds=6, cuts=(2, 3, 4, 5), batches_per_round=2
    )
    result = run(training, tmp_path)
    assert [record["round"] for record in result["history"]] == [1, 2, 3, 4, 5, 6]
    store = Store(tmp_path / "state" / "coordinator")
    assert store.current() is not None
    checkpoint = store.latest()
    assert checkpoint is not None
    theirs = [
        sum(device["samples"] for device in record["devices"].values())
        for record in checkpoint.history
    ]
    assert [record["samples"] for record in result["history"]] == theirs
    assert sum(theirs) >= 6 * 2 * 2 * 16, "each version has two contributions of two batches"
    assert "full" in result["history"][-1]


def test_a_batch_that_cannot_be_computed_ends_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("too little")

    monkeypatch.setattr("coordinator.server_copy.ServerCopy._flow", no_memory)
    with pytest.raises(FleetFailed, match="could not be computed"):
        run(make_training(), tmp_path)


def test_a_finished_training_is_not_made_again(tmp_path: Path) -> None:
    training = make_training("centralized")
    first = run(training, tmp_path)
    assert run(training, tmp_path, stop_after=0) == first


def test_a_folder_holds_one_training(tmp_path: Path) -> None:
    run(make_training("centralized"), tmp_path, stop_after=1)
    with pytest.raises(SettingsWrong, match="another learning_rate"):
        run(make_training("centralized", learning_rate=0.01), tmp_path)
    for name in ("history.json", "training.json"):
        kept = (tmp_path / name).read_bytes()
        for rubbish in ("{", "[]", '{"rounds": 5, "settings": 5}'):
            (tmp_path / name).write_text(rubbish)
            with pytest.raises(DiskTrouble, match=name.replace(".", r"\.")):
                run(make_training("centralized"), tmp_path)
        (tmp_path / name).write_bytes(kept)


def test_a_lost_history_is_told_again_by_what_was_kept(tmp_path: Path) -> None:
    for kind in ("centralized", "fleet"):
        folder = tmp_path / kind
        whole = run(make_training(kind), tmp_path / f"{kind}-whole")
        run(make_training(kind), folder, stop_after=2)
        (folder / "history.json").unlink()
        found = run(make_training(kind), folder)
        for key in ("round", "samples", "train_loss"):
            wanted = [record[key] for record in whole["history"]]
            assert [record[key] for record in found["history"]] == wanted, key


def test_a_kill_between_the_checkpoint_and_a_device_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first device has kept version 2 when everything goes, the second has not."""
    training = make_training(parameter_codec="int8")
    whole = run(training, tmp_path / "whole")
    save = DiskSnapshots.save

    def die(self: DiskSnapshots, name: str, cut: int, version: int, snapshot: Snapshot) -> None:
        if version == 2 and cut == training.cuts[1]:
            raise KeyboardInterrupt
        save(self, name, cut, version, snapshot)

    monkeypatch.setattr(DiskSnapshots, "save", die)
    with pytest.raises(KeyboardInterrupt):
        run(training, tmp_path / "killed")
    monkeypatch.setattr(DiskSnapshots, "save", save)
    store = Store(tmp_path / "killed" / "state" / "coordinator")
    assert store.current() is not None
    assert store.versions()[-1] == 2, "the coordinator had kept it"
    found = run(training, tmp_path / "killed")
    assert found["final"] == whole["final"]
    losses = [[record["train_loss"] for record in r["history"]] for r in (whole, found)]
    assert losses[0] == losses[1]


def test_centralized_training_is_a_plain_loop_over_all_images(tmp_path: Path) -> None:
    training = make_training(
        "centralized", schedule="constant", learning_rate=0.02, batches_per_round=1
    )
    images = load_images(training.data, None)
    under_way = LocalTraining(training, images, tmp_path)
    under_way.advance()
    torch.set_num_threads(1)
    network = build_network(NetworkSpec(**training.settings.network.model_dump()), seed=1)
    used = [
        p
        for n, p in network.named_parameters()
        if not n.startswith("heads.") or n.startswith(("heads.2.", "heads.4."))
    ]
    optimizer = torch.optim.SGD(used, lr=0.02, momentum=0.9, weight_decay=5e-4)
    stream = BatchStream(images.train, np.arange(130), batch_size=16, seed=1, device="centralized")
    network.train()
    for position in range(2):
        pixels, labels = map(torch.from_numpy, stream.batch(position))
        h2 = network(pixels, 0, 2)
        h4 = network(h2, 2, 4)
        logits = network(h4, 4, 10), network.exit(h2, 2), network.exit(h4, 4)
        full, *exits = (F.cross_entropy(x, labels) for x in logits)
        optimizer.zero_grad()
        (full + sum(exits) / 2).backward()
        optimizer.step()
    (found,) = under_way.models().values()
    for name, tensor in network.state_dict().items():
        np.testing.assert_allclose(found[name], tensor.numpy(), rtol=2e-4, atol=2e-5, err_msg=name)
    assert [record["samples"] for record in under_way.records()] == [2 * 16]


def test_distributed_devices_have_the_batches_of_the_fleet_and_never_meet(tmp_path: Path) -> None:
    training = make_training("distributed")
    images = load_images(training.data, None)
    under_way = LocalTraining(training, images, tmp_path)
    under_way.advance()
    models = under_way.models()
    assert list(models) == training.devices == ["device-0-cut-2", "device-1-cut-4"]
    first, second = models.values()
    assert any((first[name] != second[name]).any() for name in first if "conv" in name)
    start = build_network(NetworkSpec(**training.settings.network.model_dump()), seed=1)
    for name, values in start.state_dict().items():
        untrained = name.startswith("heads.") and not name.startswith("heads.2.")
        if untrained:
            np.testing.assert_array_equal(first[name], values.numpy(), err_msg=name)
    fleet = FleetTraining(make_training("fleet"), images, tmp_path / "fleet")
    fleet.advance()
    assert fleet.records()[0]["samples"] == under_way.records()[0]["samples"]


def test_one_device_in_a_fleet_learns_what_it_learns_alone(tmp_path: Path) -> None:
    """With one batch under way a fleet of one is the whole network in one place."""
    together: Any = {"cuts": (3,), "window": 1, "batches_per_round": 4, "learning_rate": 0.01}
    images = load_images(make_training(**together).data, None)
    fleet = FleetTraining(make_training(**together), images, tmp_path / "fleet")
    alone = LocalTraining(make_training("distributed", **together), images, tmp_path / "alone")
    for _ in range(2):
        fleet.advance()
        alone.advance()
    (wanted,), (found,) = alone.models().values(), fleet.models().values()
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, rtol=2e-3, atol=2e-4, err_msg=name)
