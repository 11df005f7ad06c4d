"""The commands ``splitfleet model …``."""

from __future__ import annotations

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
