"""The commands of the simulator: ``splitfleet simulate`` and ``splitfleet bench pipelining``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ops import run
from ops.errors import SettingsWrong

MAX_WINDOW = 1024


def register(app: typer.Typer, bench: typer.Typer) -> None:
    """Add them to the command line."""
    app.command()(simulate)
    bench.command("pipelining")(bench_pipelining)


def simulate(
    *,
    devices: Annotated[int, typer.Option(min=1, max=100_000, help="how many")] = 100,
    profile: Annotated[
        str, typer.Option(help="lan, home, cellular, mixed, or a TOML file")
    ] = "mixed",
    rounds: Annotated[int | None, typer.Option(help="default: 10")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    learning: Annotated[str, typer.Option(help="stub: counted only; real: bundled images")] = (
        "stub"
    ),
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", help="a setting of the coordinator, key=value; may be repeated"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Run a whole fleet on virtual time; the same seed gives the same output, byte for byte."""
    from ops.simulate import Plan, parse_learning, run_simulation

    settings = run.with_assignments(assignments or [], {"rounds": rounds})
    plan = Plan(devices, profile, seed, parse_learning(learning), settings)
    run_simulation(plan, as_json=as_json)


def bench_pipelining(
    *,
    windows: Annotated[str, typer.Option(help="e.g. 1,4")] = "1,2,4,8",
    batches: Annotated[int, typer.Option(min=1, help="of a round")] = 100,
    append: Annotated[Path | None, typer.Option(help="append dated rows to this file")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """How busy a device is with so many batches under way, on virtual time."""
    from ops.bench_pipelining import run_bench

    chosen = [int(window) if window.isdecimal() else 0 for window in windows.split(",")]
    if not all(1 <= window <= MAX_WINDOW for window in chosen):
        raise SettingsWrong(f"--windows {windows}: numbers from 1 to {MAX_WINDOW}, e.g. 1,4")
    rows = run_bench(
        chosen,
        batches=batches,
        append=append,
        quiet=as_json,
    )
    if as_json:
        print(json.dumps(rows, indent=1))
