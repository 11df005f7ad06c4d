"""``splitfleet bench cost``: what a cut costs its device, and a strategy its server.

Counted by ``tensors.cost``, measured by ``ops.cost_probe`` in a fresh process for every figure, and
estimated in joules by ``ops.energy``. The measured process has one thread, and its CPU time counts,
so that other programs on the machine matter little.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal, get_args

from rich.console import Console

from coordinator.cascade import TOGETHER
from edge_agent.measure import available_memory_mb
from ops import bench_rows, cost_tables
from ops.cost_probe import Order
from ops.energy import EnergyRates
from ops.errors import FleetFailed, SettingsWrong
from tensors.cost import NetworkCost, network_cost
from tensors.networks import NetworkSpec
from tensors.training import MemoryFormat, Precision

STRATEGIES = ("sequential", "averaging", "cascade")
SERVER_CUTS = (2, 3, 4, 5)
"""Of the server's devices, in turn."""
PROBE_LIMIT_S = 600.0
ROOM = 0.5
"""The most of the machine's free memory that a measurement may need."""

Part = Literal["all", "device", "server"]
Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is measured, and how.

    ``cuts`` None: every cut there is. ``devices``: fleets of so many, for the server. ``bits`` and
    ``gradient_bits``: of a value that goes up and down, for bytes and joules.
    """

    widths: tuple[int, ...] = (16, 64)
    part: Part = "all"
    cuts: tuple[int, ...] | None = None
    exit_rates: tuple[float, ...] = (0.0, 0.5, 0.9)
    devices: tuple[int, ...] = (4, 12, 48)
    strategies: tuple[str, ...] = STRATEGIES
    batch_size: int = 32
    seconds: float = 1.0
    bits: float = 4.0
    gradient_bits: float = 6.0
    precision: Precision = "fp32"
    memory_format: MemoryFormat = "contiguous"


def run_bench(
    setup: Setup, rates: EnergyRates, *, append: Path | None, quiet: bool
) -> dict[str, list[Row]]:
    """Measure; the rows of each table (``device``, ``answers``, ``server``), shown and appended.

    Raises :class:`SettingsWrong` for what cannot be measured, before anything is, ``NetworkError``
    for a width or cut that does not exist, :class:`FleetFailed` if a measurement fails.
    """
    _require_sense(setup)
    costs = {width: network_cost(NetworkSpec(width=width)) for width in setup.widths}
    for cost in costs.values():
        for rate in setup.exit_rates:
            for cut in setup.cuts or cost.heads:
                cost.at(cut).expected(rate, bits=setup.bits)
    console = Console(stderr=True, quiet=quiet)
    tables: dict[str, list[Row]] = {"device": [], "answers": [], "server": []}
    for width, cost in costs.items():
        if setup.part != "server":
            devices = list(_device_rows(setup, width, cost, rates, console))
            tables["device"] += devices
            tables["answers"] += _answer_rows(setup, cost, rates, devices)
        if setup.part != "device":
            tables["server"] += _server_rows(setup, width, cost, console)
    origin = (bench_rows.today(), bench_rows.machine(), bench_rows.commit())
    for name, rows in tables.items():
        if rows:
            cost_tables.show(name, rows, console)
            if append is not None:
                bench_rows.append_text(append, cost_tables.markdown(name, rows, origin))
    return tables


def _require_sense(setup: Setup) -> None:
    if not sys.platform.startswith("linux"):
        raise SettingsWrong("peak memory is read from /proc, which only Linux has: run it there")
    for key, value, allowed in (
        ("part", setup.part, get_args(Part)),
        ("precision", setup.precision, get_args(Precision)),
        ("memory-format", setup.memory_format, get_args(MemoryFormat)),
        *(("strategies", strategy, STRATEGIES) for strategy in setup.strategies),
    ):
        if value not in allowed:
            raise SettingsWrong(f"--{key} {value}: choose from {', '.join(allowed)}")
    if min(setup.widths, default=0) < 1:
        raise SettingsWrong("--widths: numbers from 1, e.g. 16,64")
    if min(setup.devices, default=0) < len(SERVER_CUTS):
        raise SettingsWrong(
            f"--devices: numbers from {len(SERVER_CUTS)}, one device for each of the cuts "
            f"{', '.join(map(str, SERVER_CUTS))}"
        )
    if setup.batch_size < 2 or setup.seconds <= 0 or not min(setup.bits, setup.gradient_bits) > 0:
        raise SettingsWrong(
            "--batch-size must be at least 2, --seconds, --bits and --gradient-bits above 0"
        )


# -- devices ---------------------------------------------------------------------------------------


def _device_rows(
    setup: Setup, width: int, cost: NetworkCost, rates: EnergyRates, console: Console
) -> Iterator[Row]:
    """The whole network first (cut None), then every cut."""
    whole = _device_row(setup, width, cost, rates, None)
    for cut in (None, *(setup.cuts or sorted(cost.heads))):
        row = whole if cut is None else _device_row(setup, width, cost, rates, cut)
        row["training_flops_share"] = row["training_flops"] / whole["training_flops"]
        row["training_cpu_share"] = row["training_cpu_s"] / whole["training_cpu_s"]
        row["training_peak_share"] = row["training_peak_bytes"] / whole["training_peak_bytes"]
        told = f"width {width} {cost_tables.cut_name(cut)}"
        console.print(f"{told}: {1000 * row['training_cpu_s']:.2f} ms a sample in training")
        yield row


def _device_row(
    setup: Setup, width: int, cost: NetworkCost, rates: EnergyRates, cut: int | None
) -> Row:
    kind = "whole" if cut is None else "device"
    training = _probe(_order(setup, f"{kind}-training", width, (cut,) if cut else ()))
    inference = _probe(_order(setup, f"{kind}-inference", width, (cut,) if cut else ()))
    if cut is None:
        flops, answer_flops, moved = cost.training_flops, cost.inference_flops, 0.0
        memory = cost.whole_memory(batch_size=setup.batch_size)
    else:
        at = cost.at(cut)
        flops, answer_flops = at.device_training_flops, at.device_inference_flops
        moved = at.feature_values * (setup.bits + setup.gradient_bits) / 8
        memory = cost.device_memory(cut, batch_size=setup.batch_size)
    return {
        "width": width,
        "cut": cut,
        "training_flops": flops,
        "inference_flops": answer_flops,
        "training_cpu_s": training["cpu_s_per_sample"],
        "inference_cpu_s": inference["cpu_s_per_sample"],
        "training_peak_bytes": training["peak_bytes"],
        "predicted_bytes": memory.total,
        "inference_peak_bytes": inference["peak_bytes"],
        "built_bytes": training["built_bytes"],
        "moved_bytes": moved,
        "training_joules": rates.joules(training["cpu_s_per_sample"], moved),
    }


def _answer_rows(
    setup: Setup, cost: NetworkCost, rates: EnergyRates, devices: Sequence[Row]
) -> list[Row]:
    """What an answer costs on average, by cut and exit rate."""
    rows = []
    for row in devices:
        for rate in setup.exit_rates if row["cut"] is not None else ():
            expected = cost.at(row["cut"]).expected(rate, bits=setup.bits)
            rows.append(
                {
                    "width": row["width"],
                    "cut": row["cut"],
                    "exit_rate": rate,
                    "device_flops": expected.device_flops,
                    "server_flops": expected.server_flops,
                    "uplink_bytes": expected.uplink_bytes,
                    "joules": rates.joules(row["inference_cpu_s"], expected.uplink_bytes),
                    "whole_joules": rates.joules(devices[0]["inference_cpu_s"], 0.0),
                }
            )
    return rows


# -- the server ------------------------------------------------------------------------------------


def _server_rows(setup: Setup, width: int, cost: NetworkCost, console: Console) -> list[Row]:
    rows = []
    for count in setup.devices:
        cuts = tuple(islice(cycle(SERVER_CUTS), count))
        for strategy in setup.strategies:
            predicted = cost.server_memory(
                cuts,
                batch_size=setup.batch_size,
                replicas=strategy == "averaging",
                together=TOGETHER if strategy == "cascade" else 1,
            ).total
            room = ROOM * available_memory_mb() * 2**20
            measured: dict[str, float] = {}
            if predicted < room:
                measured = _probe(_order(setup, "server", width, cuts, strategy))
            rows.append(
                {
                    "width": width,
                    "strategy": strategy,
                    "devices": count,
                    "predicted_bytes": predicted,
                    "peak_bytes": measured.get("peak_bytes"),
                    "ground_bytes": measured.get("ground_bytes"),
                    "cpu_s": measured.get("cpu_s_per_sample"),
                    "aggregation_peak_bytes": measured.get("aggregation_peak_bytes"),
                    "aggregation_cpu_s": measured.get("aggregation_cpu_s"),
                }
            )
            told = "measured" if measured else "left out: too little memory is free"
            console.print(f"width {width} {strategy}, {count} devices: {told}")
    return rows


def _order(setup: Setup, what: str, width: int, cuts: tuple[int, ...], strategy: str = "") -> Order:
    return Order(
        what=what,
        width=width,
        cuts=cuts,
        strategy=strategy,
        batch_size=setup.batch_size,
        seconds=setup.seconds,
        precision=setup.precision,
        memory_format=setup.memory_format,
    )


def _probe(order: Order) -> dict[str, float]:
    """Carry out an order in a process of its own, with one thread."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "ops.cost_probe", order.model_dump_json()],
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            timeout=PROBE_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise FleetFailed(
            f"the measurement {order.what!r} took more than {PROBE_LIMIT_S:.0f} s"
        ) from None
    if done.returncode != 0:
        raise FleetFailed(f"the measurement {order.what!r} failed; its error is above")
    measured: dict[str, float] = json.loads(done.stdout.decode().strip().splitlines()[-1])
    return measured
