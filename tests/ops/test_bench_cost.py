from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from ops import bench_cost
from ops.bench_cost import Setup, run_bench
from ops.cost_probe import Order, measure
from ops.energy import EnergyRates
from ops.errors import DiskTrouble, FleetFailed, SettingsWrong
from tensors.cost import network_cost
from tensors.errors import ExitRuleError, NetworkError
from tensors.networks import NetworkSpec

RATES = EnergyRates(watts_per_core=1.0, joules_per_byte=1e-6)
linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="peak memory is read from Linux's /proc"
)


def bench(*, append: Path | None = None, **changes: Any) -> dict[str, list[dict[str, Any]]]:
    small: dict[str, Any] = {
        "widths": (4,),
        "cuts": (2,),
        "devices": (4,),
        "strategies": ("averaging",),
        "exit_rates": (0.0, 1.0),
        "batch_size": 4,
        "seconds": 0.001,
    }
    return run_bench(Setup(**(small | changes)), RATES, append=append, quiet=True)


@linux
@pytest.mark.timeout(300)
@pytest.mark.slow
def test_every_figure_comes_from_a_measurement_and_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "cost.md"
    tables = bench(append=file)
    whole, cut = tables["device"]
    assert (whole["cut"], cut["cut"]) == (None, 2)
    for row in (whole, cut):
        assert row["training_cpu_s"] > row["inference_cpu_s"] > 0
        assert row["training_peak_bytes"] > 0
    assert whole["training_cpu_share"] == whole["training_flops_share"] == 1
    assert cut["training_flops_share"] < 0.5
    nobody, everybody = tables["answers"]
    assert (nobody["exit_rate"], everybody["exit_rate"]) == (0, 1)
    assert nobody["joules"] == pytest.approx(cut["inference_cpu_s"] + 1e-6 * nobody["uplink_bytes"])
    assert everybody["joules"] == pytest.approx(cut["inference_cpu_s"])
    (server,) = tables["server"]
    assert server["cpu_s"] > 0
    assert server["aggregation_cpu_s"] > 0
    lines = file.read_text().splitlines()
    assert sum(line.startswith("| ---") for line in lines) == 3
    assert sum(" | 4 | " in line for line in lines) == 5


@linux
def test_what_is_measured_is_at_least_what_is_predicted() -> None:
    """On batches so large that features are nearly all there is; the rest is workspace."""
    order = Order(what="device-training", width=16, cuts=(2,), batch_size=128, seconds=0.001)
    predicted = network_cost(NetworkSpec(width=16)).device_memory(2, batch_size=128).total
    found = bench_cost._probe(order)["peak_bytes"]
    assert predicted < found < 5 * predicted


@linux
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_averaging_needs_more_memory_for_more_devices_and_sequential_does_not() -> None:
    def peak(strategy: str, devices: int) -> float:
        cuts = (2, 3, 4, 5) * (devices // 4)
        order = Order(
            what="server", strategy=strategy, width=16, cuts=cuts, batch_size=2, seconds=0.001
        )
        return bench_cost._probe(order)["peak_bytes"]

    one_replica = 3 * 4 * 0.6e6  # weights, gradients and momentum of the blocks behind the cuts
    assert peak("averaging", 32) - peak("averaging", 4) > 28 * one_replica
    assert abs(peak("sequential", 32) - peak("sequential", 4)) < 4 * one_replica


@linux
def test_a_fleet_that_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_cost, "available_memory_mb", lambda: 1.0)
    (row,) = bench(part="server", widths=(16,))["server"]
    assert row["peak_bytes"] is row["cpu_s"] is None
    assert row["predicted_bytes"] > 2**20


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"part": "half"}, r"--part half.*all, device, server"),
        ({"widths": ()}, "--widths"),
        ({"widths": (16, 0)}, "--widths"),
        ({"strategies": ("federated",)}, r"--strategies federated.*sequential, averaging"),
        ({"devices": (3,)}, "--devices"),
        ({"batch_size": 1}, "--batch-size"),
        ({"seconds": 0.0}, "--seconds"),
        ({"bits": 0.0}, "--bits"),
        ({"precision": "fp8"}, r"--precision fp8.*fp32"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsWrong, match=said):
        bench(**changes)


def test_a_cut_or_rate_that_does_not_exist_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench_cost, "_probe", lambda order: pytest.fail("it was measured"))
    with pytest.raises(NetworkError, match=r"cut layer 12.*1 to 9"):
        bench(cuts=(2, 12))
    with pytest.raises(ExitRuleError, match="exit_rate"):
        bench(exit_rates=(2.0,), cuts=None)


@linux
def test_a_measurement_that_fails_is_told() -> None:
    with pytest.raises(FleetFailed, match="astrology"):
        bench_cost._probe(Order(what="astrology", width=4, cuts=(2,), batch_size=2, seconds=0.001))


@linux
def test_a_file_that_cannot_be_written_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = dict.fromkeys(("cpu_s_per_sample", "peak_bytes", "built_bytes"), 1.0)
    monkeypatch.setattr(bench_cost, "_probe", lambda order: figures)
    with pytest.raises(DiskTrouble):
        bench(append=Path("/nowhere/cost.md"), part="device")


def test_there_is_no_measurement_of_another_name() -> None:
    with pytest.raises(ValueError, match="astrology"):
        measure(Order(what="astrology", width=4, cuts=(2,), batch_size=2, seconds=0.001))
