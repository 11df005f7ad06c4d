"""What statistics for each cut could bring: the comparison, on a tiny network."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from coordinator.checkpoint import Checkpoint
from coordinator.settings import CoordinatorSettings
from coordinator.store import Store
from ops.bench_batch_norm import compare, estimate, run_bench
from ops.errors import SettingsWrong
from tensors.batches import normalise
from tensors.networks import Residual, build_network, read_state
from tests.server_side import START, STATE
from tests.tiny import CPU, SPEC, differs, make_dataset, make_settings

TRAIN, TEST = make_dataset(48), make_dataset(24, seed=1)


def test_statistics_are_those_of_what_enters_at_the_cut() -> None:
    found = estimate(build_network(SPEC), STATE, TRAIN, [3], "fp32", CPU)
    network = build_network(SPEC).eval()
    with torch.no_grad():
        x = torch.from_numpy(normalise(TRAIN.images, TRAIN.mean, TRAIN.std))
        block = network.blocks["3"]
        assert isinstance(block, Residual)
        out = block.conv1(network(x, stop=3))
    np.testing.assert_allclose(
        found["blocks.3.bn1.running_mean"], out.mean(dim=(0, 2, 3)), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
        found["blocks.3.bn1.running_var"], out.var(dim=(0, 2, 3)), rtol=1e-4, atol=1e-6
    )


def test_only_statistics_behind_the_cut_change() -> None:
    found = estimate(build_network(SPEC), STATE, TRAIN, [3, 5], "int4", CPU)
    moved = differs(found, STATE)
    assert all(".running_" in name or name.endswith("tracked") for name in moved)
    assert {int(name.split(".")[1]) for name in moved} == set(range(3, 9))


def test_statistics_that_are_wrong_are_found_out() -> None:
    """A network that was trained, but whose running statistics behind the cut are spoilt."""
    network = build_network(SPEC).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    x = torch.from_numpy(normalise(TRAIN.images, TRAIN.mean, TRAIN.std))
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(network(x), torch.from_numpy(TRAIN.labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    state = read_state(network)
    for name in state:
        if name.startswith("blocks.8.") and name.endswith("running_mean"):
            state[name] = state[name] + np.linspace(-9, 9, state[name].size, dtype=np.float32)
    rows = compare(SPEC, state, TRAIN, TEST, cuts=[2, 5], codec="fp32", compute=CPU)
    assert [row.cut for row in rows] == [2, 5]
    for row in rows:
        assert row.trained < 0.7
        assert row.estimated > 0.9
        assert row.by_cut > 0.9


def test_a_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(SettingsWrong, match="no run there"):
            bench(folder)
    assert not (tmp_path / "missing").exists()


def test_a_network_without_batchnorm_is_an_error(tmp_path: Path) -> None:
    settings = make_settings()
    network = settings.network.model_copy(update={"norm": "group"})
    make_run(tmp_path, settings.model_copy(update={"network": network}))
    with pytest.raises(SettingsWrong, match="norm = batch"):
        bench(tmp_path)


def make_run(folder: Path, settings: CoordinatorSettings) -> None:
    registry = [{"name": "a", "cut": 2, "hello": None, "rounds": 0, "samples": 0}]
    identity = json.loads(json.dumps(settings.identity()))
    checkpoint = Checkpoint(version=0, round=0, model=START, registry=registry)
    Store(folder).create("run", identity, checkpoint)


def bench(folder: Path) -> None:
    run_bench(folder, dataset=None, data_root=None, images=100, append=None, quiet=True)
