"""The command ``splitfleet exits``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ops import run


def register(app: typer.Typer) -> None:
    """Add it to the command line."""
    app.command()(exits)


def exits(
    state_dir: Annotated[Path, typer.Argument(help="a coordinator's --state-dir")],
    *,
    dataset: Annotated[
        str | None, typer.Option(help="held-out images; default: those of the run")
    ] = None,
    data_root: Annotated[Path | None, typer.Option(help="where public data sets lie")] = None,
    download: Annotated[bool | None, typer.Option(help="fetch a public data set")] = None,
    accuracy: Annotated[
        float | None, typer.Option(help="wanted of device and server together, e.g. 0.9")
    ] = None,
    offload: Annotated[
        float | None, typer.Option(help="wanted share of images to ask the server for, e.g. 0.3")
    ] = None,
    level: Annotated[
        float | None, typer.Option(help="promise it with this probability, e.g. 0.95")
    ] = None,
    cuts: Annotated[str | None, typer.Option(help="e.g. 2,3; default: all trained")] = None,
    rule: Annotated[str | None, typer.Option(help="entropy, max_softmax or margin")] = None,
    version: Annotated[str, typer.Option(help="a number, best or latest")] = "latest",
    seed: Annotated[int | None, typer.Option(help="of the split of the held-out images")] = None,
    plot: Annotated[Path | None, typer.Option(help="write the curves here, as SVG")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Choose the thresholds of a run's exits on held-out images and judge them on others."""
    from ops.bench_codec import parse_cuts
    from ops.exit_report import run_exits
    from ops.exits import ExitSettings

    flags = {"accuracy": accuracy, "offload": offload, "level": level, "rule": rule, "seed": seed}
    run_exits(
        state_dir,
        settings=run.settings_of(ExitSettings, "exits", None, flags),
        dataset=dataset,
        data_root=data_root,
        download=download,
        cuts=None if cuts is None else parse_cuts(cuts),
        version=version,
        plot=plot,
        as_json=as_json,
    )
