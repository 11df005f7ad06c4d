"""The commands ``splitfleet bundle`` and ``splitfleet rollout``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from ops.cli_identity import HERE, AsJson, Folder, open_fleet
from ops.errors import SettingsWrong


def register(app: typer.Typer) -> None:
    """Add them to the command line."""
    app.command()(bundle)
    app.command()(rollout)


def bundle(
    wheels: Annotated[Path, typer.Argument(help="a folder of wheels, one of them splitfleet's")],
    *,
    out: Annotated[Path, typer.Option(help="the bundle")] = Path("bundle.tar"),
    extra: Annotated[
        list[str] | None,
        typer.Option(help="agent, lite or http, as devices have it; may be repeated"),
    ] = None,
    folder: Folder = HERE,
) -> None:
    """Make a signed bundle of wheels, for the devices of this fleet to run."""
    from coordinator.updates.book import RolloutBook
    from ops.bundles import make_bundle
    from ops.units import byte_size

    with open_fleet(folder) as opened:
        fleet = opened.fleet
        signed = RolloutBook(fleet.roster, clock=time.time).next_signed()
        manifest = make_bundle(
            wheels, out, fleet.authority, signed=signed, extras=extra or ["agent"]
        )
    print(f"{out}: version {manifest.version}, {len(manifest.files)} wheels, ", end="")
    print(byte_size(manifest.bytes))


def rollout(
    bundle: Annotated[
        Path | None, typer.Argument(help="what splitfleet bundle made; without one, how it goes")
    ] = None,
    *,
    canary: Annotated[str, typer.Option(help="the first devices, named like a stage")] = "5%",
    stages: Annotated[
        str, typer.Option(help="then these: shares, name patterns (cam-*), class:NAME")
    ] = "25%,100%",
    error_threshold: Annotated[
        str | None,
        typer.Option(
            help="it stops when more of the devices that have ended have failed; else 10%, or "
            "with --resume what it was"
        ),
    ] = None,
    prove: Annotated[
        str, typer.Option(help="how long a new version has to come online: 10min, 1h")
    ] = "10min",
    patience: Annotated[
        str, typer.Option(help="a device at it that says nothing for so long has failed")
    ] = "2h",
    url: Annotated[
        str | None, typer.Option(help="where devices fetch it by HTTP, instead of over MQTT")
    ] = None,
    stop: Annotated[bool, typer.Option("--stop", help="tell no more devices")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="go on with what was stopped")] = False,
    folder: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Bring a bundle to the fleet in stages; without one, say how the last rollout goes."""
    from ops import rollouts

    if stop + resume + (bundle is not None) > 1:
        raise SettingsWrong("give a BUNDLE, --stop or --resume")
    with open_fleet(folder) as opened:
        if bundle is not None:
            rollouts.start(
                opened.fleet,
                bundle,
                stages=[canary, *(stage.strip() for stage in stages.split(",") if stage.strip())],
                error_threshold=error_threshold or "10%",
                prove_s=_seconds(prove, "--prove"),
                patience_s=_seconds(patience, "--patience"),
                url=url,
            )
        elif stop:
            rollouts.stop(opened.fleet)
        elif resume:
            rollouts.resume(opened.fleet, error_threshold=error_threshold)
        rollouts.show(opened.fleet, as_json=as_json)


def _seconds(text: str, flag: str) -> float:
    from ops.units import parse_days

    try:
        return parse_days(text) * 86_400
    except ValueError as exc:
        raise SettingsWrong(f"{flag} {exc}") from None
