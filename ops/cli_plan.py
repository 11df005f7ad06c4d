"""``splitfleet plan``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from ops import run
from ops.errors import SettingsWrong


def register(app: typer.Typer) -> None:
    """Add it to the command line."""
    app.command()(plan)


def plan(
    profile: Annotated[str, typer.Argument(help="lan, home, cellular, mixed, or a TOML file")],
    *,
    devices: Annotated[int, typer.Option(min=1, max=100_000, help="how many")] = 20,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", help="a setting of the coordinator, key=value; may be repeated"),
    ] = None,
    width: Annotated[int | None, typer.Option(min=1, help="of the network; default: 8")] = None,
    size: Annotated[int | None, typer.Option(min=1, help="of images, pixels; default: 28")] = None,
    channels: Annotated[int | None, typer.Option(min=1, help="of images; default: 1")] = None,
    classes: Annotated[int | None, typer.Option(min=2, help="of images; default: 10")] = None,
    cuts: Annotated[str | None, typer.Option(help="cut layers that may be used, e.g. 2-5")] = None,
    by: Annotated[str, typer.Option(help="class: one cut for each class; or device")] = "class",
    slack: Annotated[
        float, typer.Option(min=0, max=10, help="longer rounds, as a share, for deeper cuts")
    ] = 0.05,
    rounds_per_day: Annotated[float, typer.Option(help="for bytes a month")] = 24.0,
    month_gb: Annotated[
        float | None, typer.Option(min=0, help="what a device may send and receive, GB")
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="JSON: device → label → images")] = None,
    dataset: Annotated[str | None, typer.Option(help="whose labels are split")] = None,
    partition: Annotated[str | None, typer.Option(help="iid, dirichlet:ALPHA, lists:FILE")] = None,
    data_root: Annotated[Path | None, typer.Option(help="where public data sets lie")] = None,
    check: Annotated[bool, typer.Option(help="simulate it too")] = False,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Cut layers, round time, memory and bytes of a fleet that is not there yet, and advice."""
    from rich.console import Console

    from ops.planning.assignment import Limits
    from ops.planning.plan import MOST_ROUNDS_PER_DAY, PlanSettings, make_plan
    from ops.planning.show import show

    if by not in ("class", "device"):
        raise SettingsWrong(f"--by {by}: it is class or device")
    if not 0 < rounds_per_day <= MOST_ROUNDS_PER_DAY:
        raise SettingsWrong(
            f"--rounds-per-day {rounds_per_day:g}: it must be above 0 and at most "
            f"{MOST_ROUNDS_PER_DAY:,}"
        )
    first, last = _range(cuts)
    network = {"width": width, "size": size, "channels": channels, "classes": classes}
    asked = PlanSettings(
        profile=profile,
        devices=devices,
        seed=seed,
        settings=run.parse_assignments(assignments or []),
        network={key: value for key, value in network.items() if value is not None},
        by="class" if by == "class" else "device",
        limits=Limits(first, last, slack, None if month_gb is None else 1e9 * month_gb),
        rounds_per_day=rounds_per_day,
        labels=labels,
        dataset=dataset,
        partition=partition,
        data_root=data_root,
        check=check,
    )
    result = make_plan(asked)
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        show(result, Console())


def _range(cuts: str | None) -> tuple[int, int]:
    if cuts is None:
        return 1, 1024
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", cuts.strip())
    if match is None:
        raise SettingsWrong(f"--cuts {cuts}: write a cut layer or a range, e.g. 3 or 2-5")
    first, last = int(match[1]), int(match[2] or match[1])
    if not 1 <= first <= last:
        raise SettingsWrong(f"--cuts {cuts}: from 1 on, and the first not above the last")
    return first, last
