"""The command ``splitfleet experiment``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ops.errors import SettingsWrong

UNFINISHED = 75
"""Exit code for "come again": what is finished is kept."""


def register(app: typer.Typer) -> None:
    """Add it to the command line."""
    app.command()(experiment)


def experiment(
    file: Annotated[str, typer.Argument(help="a TOML file, or the name of a bundled one")],
    *,
    out: Annotated[Path | None, typer.Option(help="default: runs/experiments/NAME")] = None,
    arms: Annotated[str | None, typer.Option(help="only these, e.g. centralized,averaging")] = None,
    seeds: Annotated[str | None, typer.Option(help="instead of the file's, e.g. 0")] = None,
    jobs: Annotated[int, typer.Option(help="trainings at a time, one core each")] = 1,
    minutes: Annotated[
        float | None, typer.Option(help="stop after the rounds that are running then")
    ] = None,
    data_root: Annotated[Path | None, typer.Option(help="where public data sets lie")] = None,
    download: Annotated[bool, typer.Option(help="fetch what is missing there")] = False,
    device: Annotated[str | None, typer.Option(help="instead of the file's, e.g. cuda")] = None,
    rehearse: Annotated[
        bool, typer.Option(help="two tiny rounds of every arm, on the CPU unless --device is given")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print all results")] = False,
    quiet: Annotated[bool, typer.Option(help="no progress")] = False,
) -> None:
    """Train the arms of an experiment, or go on with it, and write tables and plots."""
    from ops.experiment import run_experiment

    complete = run_experiment(
        file,
        out=out,
        arms=None if arms is None else [name.strip() for name in arms.split(",")],
        seeds=None if seeds is None else _numbers(seeds),
        jobs=jobs,
        minutes=minutes,
        data_root=data_root,
        download=download,
        device=device,
        rehearse=rehearse,
        quiet=quiet,
        as_json=as_json,
    )
    if not complete:
        raise typer.Exit(UNFINISHED)


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise SettingsWrong(f"--seeds {text}: whole numbers, e.g. 0,1,2")
    return [int(part) for part in parts]
