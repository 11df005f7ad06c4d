"""The commands ``splitfleet model …``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

model = typer.Typer(
    help="The versions of a run: which are kept, which one answers devices, and as files.",
    no_args_is_help=True,
)

StateDir = Annotated[Path, typer.Option(help="a coordinator's --state-dir")]
Version = Annotated[str, typer.Argument(help="a number, best or latest")]
AsJson = Annotated[bool, typer.Option("--json")]
DEFAULT_STATE = Path("coordinator-state")


class Format(StrEnum):
    """What can be exported."""

    model = "model"
    pt2 = "pt2"
    onnx = "onnx"


def register(app: typer.Typer) -> None:
    """Add them to the command line."""
    app.add_typer(model, name="model")


@model.command("list")
def list_(*, state_dir: StateDir = DEFAULT_STATE, as_json: AsJson = False) -> None:
    """The versions that are kept, what they score, and which one serves."""
    from ops.models import list_versions

    list_versions(state_dir, as_json=as_json)


@model.command()
def show(
    version: Annotated[str, typer.Argument(help="a number, best, latest or serving")] = "serving",
    *,
    state_dir: StateDir = DEFAULT_STATE,
    as_json: AsJson = False,
) -> None:
    """All there is to say of one version; its files are verified."""
    from ops.models import show_version

    show_version(state_dir, version, as_json=as_json)


@model.command()
def promote(version: Version, *, state_dir: StateDir = DEFAULT_STATE) -> None:
    """Let this version answer devices, whatever is trained; latest follows the training again.

    A running coordinator follows within a second, one that is started later at its start.
    """
    from ops import models

    models.promote(state_dir, version)


@model.command()
def rollback(*, state_dir: StateDir = DEFAULT_STATE) -> None:
    """Undo the last promote."""
    from ops import models

    models.rollback(state_dir)


@model.command()
def export(
    version: Annotated[str, typer.Argument(help="a number, best, latest or serving")] = "serving",
    *,
    to: Annotated[Path, typer.Option(help="the file to write")],
    kind: Annotated[
        Format,
        typer.Option(
            "--format",
            help="model: the whole network, for splitfleet predict; pt2 (torch.export) and onnx: "
            "the device's half with its exit",
        ),
    ] = Format.model,
    cut: Annotated[int | None, typer.Option(help="of a device's half")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="τ of every exit; default: those it served with")
    ] = None,
    accuracy: Annotated[float | None, typer.Option(help="calibrate to it, e.g. 0.9")] = None,
    offload: Annotated[float | None, typer.Option(help="calibrate to it, e.g. 0.3")] = None,
    level: Annotated[
        float | None, typer.Option(help="promise it with this probability, e.g. 0.95")
    ] = None,
    rule: Annotated[str | None, typer.Option(help="entropy, max_softmax or margin")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="class names, scale, held-out images; default: the run's")
    ] = None,
    data_root: Annotated[Path | None, typer.Option(help="where public data sets lie")] = None,
    download: Annotated[bool | None, typer.Option(help="fetch a public data set")] = None,
    state_dir: StateDir = DEFAULT_STATE,
) -> None:
    """Write a version to a file that answers without a fleet, checked against PyTorch."""
    from ops import export as exporting
    from ops.errors import SettingsWrong
    from ops.exits import ExitSettings
    from ops.run import settings_of

    if threshold is not None and not 0 <= threshold <= 1:
        raise SettingsWrong(f"--threshold {threshold:g}: confidence lies between 0 and 1")
    flags = {"accuracy": accuracy, "offload": offload, "level": level}
    checked = settings_of(ExitSettings, "exits", None, flags | {"rule": rule})
    if threshold is not None and any(value is not None for value in flags.values()):
        raise SettingsWrong("--threshold says it all: leave --accuracy, --offload, --level out")
    exporting.export(
        exporting.Source(
            state_dir=state_dir,
            version=version,
            dataset=dataset,
            data_root=data_root,
            download=download,
        ),
        to,
        kind.value,
        cut=cut,
        wishes=exporting.Wishes(
            threshold=threshold,
            accuracy=accuracy,
            offload=offload,
            level=level,
            rule=None if rule is None else checked.rule,
        ),
    )
