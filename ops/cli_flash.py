"""The commands ``splitfleet flash`` and ``splitfleet wheelhouse``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ops.errors import SettingsWrong

if TYPE_CHECKING:
    from ops.flash.payload import Wifi

HERE = Path()
Folder = Annotated[
    Path,
    typer.Option(envvar="SPLITFLEET_FLEET_DIR", help="what splitfleet fleet init has made"),
]
Class = Annotated[
    str, typer.Option("--class", help="pi4, zero2 or generic: its system, agent and limits")
]
Machine = Annotated[str | None, typer.Option(help="aarch64 or x86_64, if not that of the class")]
Python = Annotated[str | None, typer.Option(help="of the device, e.g. 3.11, if not the class's")]
Engine = Annotated[str | None, typer.Option(help="torch or onnxruntime, if not that of the class")]
Index = Annotated[
    list[str] | None, typer.Option(help="a package index instead of pip's own; may be repeated")
]


def register(app: typer.Typer) -> None:
    """Add them to the command line."""
    app.command()(flash)
    app.command()(wheelhouse)


def flash(
    device: Annotated[
        str | None, typer.Argument(help="its name; without, it is made of its serial number")
    ] = None,
    *,
    image: Annotated[
        Path | None, typer.Option(help="a card's image, or a card in a reader")
    ] = None,
    boot_dir: Annotated[Path | None, typer.Option(help="a card's mounted boot partition")] = None,
    bundle: Annotated[Path | None, typer.Option(help="a tar.gz for any Linux, to be made")] = None,
    folder: Folder = HERE,
    token: Annotated[
        Path | None, typer.Option(help="file of splitfleet fleet token: the device enrols by it")
    ] = None,
    class_name: Class = "generic",
    machine: Machine = None,
    python: Python = None,
    engine: Engine = None,
    wheelhouse: Annotated[
        Path | None, typer.Option(help="a folder of splitfleet wheelhouse to install from")
    ] = None,
    index: Index = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML with more settings of the agent")
    ] = None,
    wifi: Annotated[str | None, typer.Option(help="name of a wireless network to join")] = None,
    wifi_password_file: Annotated[Path | None, typer.Option()] = None,
    wifi_country: Annotated[str | None, typer.Option(help="two letters, e.g. DE")] = None,
    replace: Annotated[bool, typer.Option(help="replace a seed or bundle that is there")] = False,
    dry_run: Annotated[bool, typer.Option(help="show everything, write nothing")] = False,
) -> None:
    """Write what makes a stock image's first boot a device of the fleet."""
    from ops.flash import flashing
    from ops.flash.classes import device_class

    found = device_class(class_name, machine=machine, python=python, engine=engine)
    files = flashing.files_of_device(
        device,
        fleet_folder=folder,
        token=token,
        device_class=found,
        wheelhouse=wheelhouse,
        indexes=index or (),
        config=config,
    )
    flashing.flash(
        files,
        device=device,
        image=image,
        boot_dir=boot_dir,
        bundle=bundle,
        wifi=_wifi(wifi, wifi_password_file, wifi_country),
        replace=replace,
        dry_run=dry_run,
    )


def wheelhouse(
    folder: Annotated[Path, typer.Argument(help="where the wheels are put; made if need be")],
    *,
    class_name: Class = "generic",
    machine: Machine = None,
    python: Python = None,
    engine: Engine = None,
    source: Annotated[
        list[str] | None,
        typer.Option("--from", help="a wheel or a folder of wheels to take first; repeatable"),
    ] = None,
    index: Index = None,
    torch_index: Annotated[
        str | None,
        typer.Option(
            envvar="SPLITFLEET_TORCH_INDEX",
            help="torch's, PyTorch's own for CPUs by default; '': torch comes as all else does",
        ),
    ] = None,
) -> None:
    """Fetch all wheels that devices of a class install, for `splitfleet flash --wheelhouse`."""
    from ops.flash.classes import device_class
    from ops.flash.wheels import TORCH_INDEX, choose_wheels, fetch_wheels

    found = device_class(class_name, machine=machine, python=python, engine=engine)
    torchs = TORCH_INDEX if torch_index is None else torch_index
    fetch_wheels(folder, found, source or (), index or (), torchs)
    wheels = choose_wheels(folder, found)
    size = sum(wheel.path.stat().st_size for wheel in wheels)
    print(f"{len(wheels)} wheels, {size / 1e6:.0f} MB")


def _wifi(ssid: str | None, password_file: Path | None, country: str | None) -> Wifi | None:
    if ssid is None and password_file is None and country is None:
        return None
    if ssid is None or password_file is None or country is None:
        raise SettingsWrong("--wifi, --wifi-password-file and --wifi-country belong together")
    from ops.flash.payload import Wifi, read

    try:
        password = read(password_file).decode().rstrip("\r\n")
    except UnicodeDecodeError as exc:
        raise SettingsWrong(f"{password_file} holds no text: {exc}") from exc
    if not 1 <= len(ssid.encode()) <= 32 or not 8 <= len(password) <= 63:
        raise SettingsWrong(
            "a wireless network's name has 1 to 32 bytes and its password 8 to 63 characters (WPA)"
        )
    if not (country.isascii() and country.isalpha() and len(country) == 2):
        raise SettingsWrong(f"--wifi-country {country!r}: give two letters, e.g. DE")
    return Wifi(ssid, password, country.upper())
