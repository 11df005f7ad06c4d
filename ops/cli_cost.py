"""The command ``splitfleet bench cost``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from ops.errors import SettingsWrong

Number = TypeVar("Number", int, float)


def register(bench: typer.Typer) -> None:
    """Add it to the benchmarks."""
    bench.command("cost")(bench_cost)


def bench_cost(
    *,
    widths: Annotated[str, typer.Option(help="e.g. 16,64")] = "16,64",
    part: Annotated[str, typer.Option(help="all, device or server")] = "all",
    cuts: Annotated[str | None, typer.Option(help="of devices, e.g. 2,5; default: all")] = None,
    exit_rates: Annotated[str, typer.Option(help="shares of answers by exits")] = "0,0.5,0.9",
    devices: Annotated[str, typer.Option(help="fleets of so many, for the server")] = "4,12,48",
    strategies: Annotated[str, typer.Option(help="of the server")] = "sequential,averaging,cascade",
    batch_size: Annotated[int, typer.Option()] = 32,
    seconds: Annotated[float, typer.Option(help="CPU seconds per measurement")] = 1.0,
    bits: Annotated[float, typer.Option(help="of an activation that goes up")] = 4.0,
    gradient_bits: Annotated[float, typer.Option(help="of a gradient that comes back")] = 6.0,
    device_class: Annotated[str, typer.Option(help="for joules; see docs/cost.md")] = (
        "raspberry-pi-4"
    ),
    radio: Annotated[str, typer.Option(help="for joules: wifi, hsdpa")] = "wifi",
    slower: Annotated[
        float, typer.Option(help="CPU time of the class for that of this machine")
    ] = (1.0),
    energy_table: Annotated[
        Path | None, typer.Option(help="classes and radios of your own")
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or auto")] = "fp32",
    memory_format: Annotated[str, typer.Option(help="contiguous, channels_last or auto")] = (
        "contiguous"
    ),
    append: Annotated[Path | None, typer.Option(help="append dated tables to this file")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """FLOPs, CPU time, peak memory and joules of a cut on its device, and of the server."""
    from ops.bench_cost import Setup, run_bench
    from ops.energy import load_energy_table

    setup = Setup(
        widths=numbers("widths", widths, int),
        part=part,  # type: ignore[arg-type]
        cuts=None if cuts is None else numbers("cuts", cuts, int),
        exit_rates=numbers("exit-rates", exit_rates, float),
        devices=numbers("devices", devices, int),
        strategies=tuple(strategies.split(",")),
        batch_size=batch_size,
        seconds=seconds,
        bits=bits,
        gradient_bits=gradient_bits,
        precision=precision,  # type: ignore[arg-type]
        memory_format=memory_format,  # type: ignore[arg-type]
    )
    rates = load_energy_table(energy_table).rates(device_class, radio, slower=slower)
    tables: dict[str, list[dict[str, Any]]] = run_bench(setup, rates, append=append, quiet=as_json)
    if as_json:
        print(json.dumps(tables, indent=1))


def numbers(flag: str, text: str, kind: Callable[[str], Number]) -> tuple[Number, ...]:
    """The numbers that a flag names, separated by commas. Raises ``SettingsWrong``."""
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as exc:
        raise SettingsWrong(f"--{flag} {text}: numbers, separated by commas") from exc
