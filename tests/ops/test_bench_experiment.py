from __future__ import annotations

from pathlib import Path

import torch

from ops.bench_experiment import HEADER, Setup, run_bench
from ops.plain_training import PlainTraining
from tensors.networks import NetworkSpec, build_network


def test_the_plain_network_is_as_large_as_ours_at_every_cut() -> None:
    ours = build_network(NetworkSpec(width=16))
    plain = PlainTraining(range(1, 10), channels=3, side=32, width=16, classes=10)
    backbone = sum(p.numel() for p in ours.blocks.parameters())
    for copy in plain._copies:
        assert sum(p.numel() for p in copy.blocks.parameters()) == backbone
        head = sum(p.numel() for p in ours.heads[str(copy.cut)].parameters())
        assert sum(p.numel() for p in copy.exit.parameters()) == head


def test_the_plain_loop_learns_and_ends_with_one_network() -> None:
    plain = PlainTraining([2, 5], channels=1, side=8, width=8, classes=2, rate=0.02)
    labels = torch.arange(16) % 2
    images = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    images += labels[:, None, None, None] * 2
    first = plain.round(2, lambda device, step: (images, labels))
    for _ in range(5):
        last = plain.round(2, lambda device, step: (images, labels))
    assert last[0] < first[0]
    assert last[1] < first[1]
    one, other = (copy.blocks.state_dict() for copy in plain._copies)
    for name, value in one.items():
        assert torch.equal(value, other[name])


def test_fleet_and_loop_are_measured_in_pairs(tmp_path: Path) -> None:
    rows = tmp_path / "rows.md"
    setup = Setup(dataset="fashion-mnist-small", width=4, rounds=2, batches=1, batch_size=8)
    row = run_bench(setup, pairs=2, data_root=None, append=rows, quiet=True)
    assert row["least"] <= row["ratio"] <= row["most"]
    assert row["plain_samples_per_s"] > 0
    assert row["fleet_samples_per_s"] > 0
    cells = [cell.strip() for cell in rows.read_text().strip().strip("|").split("|")]
    assert len(cells) == len(HEADER)
    assert cells[-1] == "2"
