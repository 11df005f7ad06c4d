"""Commands about the switches of the learning: ``splitfleet bench batch-norm``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def register(bench: typer.Typer) -> None:
    """Add them to the command line."""
    bench.command("batch-norm")(bench_batch_norm)


def bench_batch_norm(
    *,
    state_dir: Annotated[Path, typer.Option(help="of a coordinator: its last run is taken")],
    dataset: Annotated[str | None, typer.Option(help="default: that of the run")] = None,
    data_root: Annotated[Path | None, typer.Option(help="where public data sets lie")] = None,
    images: Annotated[int, typer.Option(min=100, help="to estimate statistics from")] = 5000,
    append: Annotated[Path | None, typer.Option(help="append dated rows to this file")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """What BatchNorm statistics of its own for each cut could bring to a trained network."""
    from ops.bench_batch_norm import run_bench

    rows = run_bench(
        state_dir,
        dataset=dataset,
        data_root=data_root,
        images=images,
        append=append,
        quiet=as_json,
    )
    if as_json:
        print(json.dumps(rows, indent=1))
