"""The commands ``splitfleet device …``: on a device, about its identity."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

device = typer.Typer(help="On a device: its identity and its clock.", no_args_is_help=True)
Identity = Annotated[
    Path,
    typer.Option(
        envvar="SPLITFLEET_AGENT_IDENTITY_DIR", help="the identity_dir of the agent's settings"
    ),
]


def register(app: typer.Typer) -> None:
    """Add them to the command line."""
    app.add_typer(device, name="device")


@device.command()
def show(*, identity: Identity, as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """Say who this device is, and until when; what is wrong with its files, if something is."""
    from ops.device import show_identity

    show_identity(identity, as_json=as_json)


@device.command()
def clock(
    *,
    identity: Identity,
    set_it: Annotated[
        bool, typer.Option("--set", help="set the system's clock to it, forward only (root)")
    ] = False,
) -> None:
    """Say which time is certainly past, for devices whose clock stops with their power."""
    from ops.device import show_clock

    show_clock(identity, set_it=set_it)
