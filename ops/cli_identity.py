"""The commands ``splitfleet fleet …``: who belongs to a fleet."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from broker.mosquitto import CLAIMS_PORT, PORT
from coordinator.identity.registration import Lifetimes

if TYPE_CHECKING:
    from ops.identity import FleetFolder

fleet = typer.Typer(
    help="Who belongs to a fleet: its authorities, its devices and their certificates.",
    no_args_is_help=True,
)
Folder = Annotated[
    Path,
    typer.Option(envvar="SPLITFLEET_FLEET_DIR", help="what splitfleet fleet init has made"),
]
Device = Annotated[str, typer.Argument(help="a device's name")]
AsJson = Annotated[bool, typer.Option("--json")]
HERE = Path()
DEFAULTS = Lifetimes()


def register(app: typer.Typer) -> None:
    """Add them to the command line."""
    app.add_typer(fleet, name="fleet")


@fleet.command()
def init(
    folder: Annotated[Path, typer.Argument(help="is made; holds the keys to everything")],
    *,
    name: Annotated[str, typer.Option("--fleet", help="its name in the topic tree")] = "fleet",
    broker_name: Annotated[
        list[str],
        typer.Option(help="name or address of the broker; more are allowed, the first is told"),
    ],
    port: Annotated[int, typer.Option(help="of the broker, for devices")] = PORT,
    claims_port: Annotated[int, typer.Option(help="for those who enrol")] = CLAIMS_PORT,
    loopback_port: Annotated[
        int | None,
        typer.Option(help="lets in all programs on the broker's machine, with all rights"),
    ] = None,
    device_days: Annotated[
        float, typer.Option(min=0.01, max=3650, help="life of a device's certificate")
    ] = DEFAULTS.device_days,
) -> None:
    """Make a fleet: authorities, roster, and what broker and coordinator need.

    With SPLITFLEET_CA_PASSPHRASE (or …_FILE) set, the authorities' keys are encrypted.
    """
    from ops.identity import init_fleet

    made = init_fleet(
        folder,
        name,
        broker_names=broker_name,
        port=port,
        claims_port=claims_port,
        loopback_port=loopback_port,
        lifetimes=Lifetimes(device_days=device_days),
        passphrase=_passphrase(),
    )
    with made:
        print(f"the broker:       {made.broker_dir / 'run.sh'}")
        print(f"the coordinator:  splitfleet coordinator --config {made.coordinator_config}")
        print(f"devices:          splitfleet fleet add DEVICE --folder {folder}, or …")
        print(f"                  splitfleet fleet token --folder {folder}")


@fleet.command()
def add(device: Device, *, folder: Folder = HERE) -> None:
    """Make a device's key and certificates here; prints the folder that goes to the device."""
    with open_fleet(folder) as opened:
        print(opened.add_device(device))


@fleet.command()
def token(
    *,
    uses: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="how many devices may enrol with it")
    ] = 1,
    expires: Annotated[str, typer.Option(help="7d, 12h, 30min, 2w")] = "7d",
    out: Annotated[
        Path | None, typer.Option(help="the file; default: FOLDER/tokens/ID.pem")
    ] = None,
    folder: Folder = HERE,
) -> None:
    """Make a join token, with which devices enrol by themselves; prints the file's name."""
    from ops.errors import SettingsWrong
    from ops.units import parse_days

    try:
        days = parse_days(expires)
    except ValueError as exc:
        raise SettingsWrong(f"--expires {exc}") from None
    with open_fleet(folder) as opened:
        print(opened.write_token(uses, days, out))


@fleet.command("list")
def list_(*, folder: Folder = HERE, as_json: AsJson = False) -> None:
    """The devices on the roster, and how long their certificates are good for."""
    from ops.identity_table import show_devices

    with open_fleet(folder) as opened:
        show_devices(opened.fleet, as_json=as_json)


@fleet.command()
def status(*, folder: Folder = HERE, as_json: AsJson = False) -> None:
    """What ends when: certificates, lists, tokens; who runs what it should not; the last events."""
    from ops.identity_table import show_status

    with open_fleet(folder) as opened:
        show_status(opened.fleet, opened.refresh(), as_json=as_json)


@fleet.command()
def revoke(
    name: Annotated[str, typer.Argument(help="a device's name, or claim.ID of a token")],
    *,
    folder: Folder = HERE,
) -> None:
    """Shut a device or a token out for good; who is connected is cut off within seconds."""
    with open_fleet(folder) as opened:
        opened.revoke(name)


@fleet.command()
def reset(device: Device, *, folder: Folder = HERE) -> None:
    """Let a device enrol again with a new key, as after its card has been replaced."""
    with open_fleet(folder) as opened:
        opened.reset(device)


@fleet.command()
def retire(device: Device, *, folder: Folder = HERE) -> None:
    """Take a device off the roster: its certificates end, the coordinator forgets it."""
    with open_fleet(folder) as opened:
        opened.retire(device)


@fleet.command()
def repair(*, folder: Folder = HERE) -> None:
    """Write what broker and coordinator have lost, and mosquitto.conf as this version has it.

    Settings of coordinator and devices stay; those that do not lead to the broker are named.
    """
    from ops.identity_files import complete, outdated

    with open_fleet(folder) as opened:
        complete(opened.fleet)
        left, settings = outdated(opened.fleet), opened.fleet.settings
    if left:
        print(f"the broker is at {settings.broker_url}, for those who enrol at port", end=" ")
        print(f"{settings.claims_port}; change by hand, also where devices have copies (those that")
        print("were flashed in /etc/splitfleet/agent.toml):")
        print(*(f"  {line}" for line in left), sep="\n")


@fleet.command()
def backup(
    file: Annotated[Path, typer.Argument(help="a tar archive; - is the standard output")],
    *,
    folder: Folder = HERE,
) -> None:
    """Save runs, roster and authorities, also while the coordinator runs; keep it like their keys.

    Unpack it in FOLDER to restore them, then splitfleet fleet repair.
    """
    import sys

    from ops.identity_files import save, save_to

    with open_fleet(folder) as opened:
        if file == Path("-"):
            save(opened.fleet, sys.stdout.buffer)
        else:
            save_to(opened.fleet, file)


def open_fleet(folder: Path) -> FleetFolder:
    """The folder of a fleet; its authorities' passphrase is looked for in the environment."""
    from ops.identity import FleetFolder

    return FleetFolder.open(folder, _passphrase())


def _passphrase() -> str | None:
    import os

    from coordinator.identity.fleet import find_passphrase

    return find_passphrase(os.environ)
