"""Places for devices that are containers of one service, and so all alike.

`lay_out` runs once before the others: it makes the folder of a fleet (``ops.identity``), and gives
devices their folders, each device's with an identity, a name, a cut layer and a share of the data.
`take` is how a container becomes a device: it holds a place that nobody else holds for as long as
its process lives, the same after a restart. The devices' folders are in one volume, so these are
the keys of a fleet on one machine; on a real device there is only its own.

    FOLDER/fleet.toml, broker/, coordinator/
    FOLDER/devices/agent-N/     agent.toml, its identity, state/, lock
"""

from __future__ import annotations

import fcntl
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from cryptography import x509

from broker.mosquitto import CLAIMS_PORT, PORT
from coordinator.identity.fleet import SETTINGS, find_passphrase
from coordinator.identity.keys import certified_key, fingerprint
from coordinator.identity.roster import Member
from edge_agent.identity.keys import issued_by
from ops import run
from ops.errors import DiskTrouble, FleetFailed, OpsError, SettingsWrong
from ops.files import to_toml, write_whole
from ops.identity import FleetFolder, init_fleet
from ops.identity_files import complete

app = typer.Typer(help=__doc__, add_completion=False, pretty_exceptions_enable=False)


def lay_out(
    folder: Path,
    *,
    fleet: str,
    broker_names: Sequence[str],
    port: int = PORT,
    claims_port: int = CLAIMS_PORT,
    loopback_port: int | None = None,
    places: int,
    cuts: Sequence[int],
    shares: int,
    passphrase: str | None = None,
) -> None:
    """Write what broker, coordinator and ``places`` devices need; who has an identity keeps it.

    Place N has cut layer ``cuts[(N - 1) % len(cuts)]`` and share ``(N - 1) % shares`` of the data.
    The broker is reached under the first of ``broker_names``; ``folder`` is the same path for all;
    ``passphrase`` is that of the authorities' keys.

    Raises :class:`SettingsWrong` where there is another fleet, ConfigError, TopicError or
    ``IdentityError`` for what cannot be made, DiskTrouble for files that cannot be read or written.
    """
    about: dict[str, Any] = {"name": fleet, "broker_names": tuple(broker_names)}
    about |= {"port": port, "claims_port": claims_port, "loopback_port": loopback_port}
    with _opened(folder, about, passphrase) as opened:
        names = [f"agent-{number}" for number in range(1, places + 1)]
        for index, name in enumerate(names):
            _give_identity(opened, name)
            own = opened.device_dir(name)
            agent: dict[str, Any] = {"fleet": fleet, "device": name, "identity_dir": str(own)}
            agent |= {"state_dir": str(own / "state"), "claims_port": claims_port, "threads": 1}
            agent |= {"cut": cuts[index % len(cuts)], "share": index % shares, "shares": shares}
            broker = {"url": opened.fleet.settings.broker_url}
            write_whole(own / "agent.toml", to_toml({"broker": broker, "agent": agent}))
        for own in (folder / "devices").glob("agent-*"):
            if own.name not in names:
                _shut_out(opened, own)


def _opened(folder: Path, about: dict[str, Any], passphrase: str | None) -> FleetFolder:
    """The fleet's folder, with all that belongs to it but the devices."""
    if not (folder / SETTINGS).exists():
        return init_fleet(folder, about.pop("name"), passphrase=passphrase, **about)
    opened = FleetFolder.open(folder, passphrase)
    settings = opened.fleet.settings
    changed = {k: getattr(settings, k) for k, v in about.items() if getattr(settings, k) != v}
    if changed:
        opened.close()
        raise SettingsWrong(
            f"{folder} is of a fleet with {changed}: ask for the same, "
            f"or change {folder / SETTINGS}"
        )
    complete(opened.fleet)
    return opened


def _give_identity(opened: FleetFolder, name: str) -> None:
    """A key and certificates, unless it has them from this authority and is on the roster."""
    certificate = opened.device_dir(name) / "device.pem"
    member = opened.fleet.roster.device(name)
    if member is not None and member.state == "revoked":
        return
    if member is not None and member.state == "active":
        if certificate.exists() and _is_of(opened, member, certificate):
            return
        opened.reset(name)
    try:
        certificate.unlink(missing_ok=True)
        opened.add_device(name)
    except OSError as exc:
        raise DiskTrouble(f"cannot write {certificate}: {exc.strerror}") from exc


def _is_of(opened: FleetFolder, member: Member, certificate: Path) -> bool:
    """Whether it is a certificate of this authority for the key on the roster."""
    try:
        found = x509.load_pem_x509_certificate(certificate.read_bytes())
    except (OSError, ValueError) as exc:
        raise DiskTrouble(
            f"{certificate} is not as it was written ({exc}); remove it for a new identity"
        ) from exc
    ours = issued_by(found, opened.fleet.authority.ca("fleet"))
    return ours and fingerprint(certified_key(found)) == member.key


def _shut_out(opened: FleetFolder, own: Path) -> None:
    """A place that is no more: who comes with its certificate is not let in."""
    member = opened.fleet.roster.device(own.name)
    if member is not None and member.state != "retired":
        opened.retire(own.name)
    try:
        for file in own.glob("*.pem"):
            file.unlink()
        (own / "agent.toml").unlink(missing_ok=True)
    except OSError as exc:
        raise DiskTrouble(f"cannot remove the files in {own}: {exc.strerror}") from exc


def take(agents: Path, holder: str) -> tuple[Path, int]:
    """The folder of a place, this process's (also after ``exec``) until the descriptor is closed.

    It is the one that ``holder`` had before, else the first that nobody holds. Raises
    :class:`FleetFailed` when all are held.
    """
    places = sorted(agents.glob("agent-*/agent.toml"), key=_number)
    for file in sorted(places, key=lambda file: _last_holder(file.parent) != holder):
        lock = os.open(file.parent / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        os.ftruncate(lock, 0)
        os.write(lock, holder.encode())
        os.set_inheritable(lock, True)  # noqa: FBT003 it takes no names
        return file.parent, lock
    raise FleetFailed(
        f"all {len(places)} places in {agents} are held: start fewer agents, or lay out more places"
    )


def _number(file: Path) -> int:
    _, _, number = file.parent.name.rpartition("-")
    return int(number) if number.isdecimal() else sys.maxsize


def _last_holder(place: Path) -> str:
    lock = place / "lock"
    return lock.read_text("utf-8", "replace") if lock.exists() else ""


@app.command("lay-out")
def lay_out_command(
    folder: Annotated[Path, typer.Argument()],
    *,
    broker_name: Annotated[
        list[str], typer.Option(help="the broker's, as the others see it; more may follow")
    ],
    port: Annotated[int, typer.Option(min=1, max=65_535)] = PORT,
    claims_port: Annotated[int, typer.Option(min=1, max=65_535)] = CLAIMS_PORT,
    loopback_port: Annotated[
        int | None, typer.Option(help="where the broker's own machine needs no certificate")
    ] = None,
    fleet: Annotated[str, typer.Option()] = "fleet",
    places: Annotated[int, typer.Option(min=1, max=10_000)] = 64,
    cuts: Annotated[str, typer.Option(help="cut layers of the places in turn")] = "2,3,4,5",
    shares: Annotated[int, typer.Option(min=1, help="parts of the data, in turn")] = 8,
) -> None:
    """Write what broker, coordinator and devices need, where it is not there yet."""
    try:
        layers = [int(cut) for cut in cuts.split(",")]
    except ValueError:
        raise SettingsWrong(f"--cuts {cuts!r}: give cut layers like 2,3,5") from None
    lay_out(
        folder,
        fleet=fleet,
        broker_names=broker_name,
        port=port,
        claims_port=claims_port,
        loopback_port=loopback_port,
        places=places,
        cuts=layers,
        shares=shares,
        passphrase=find_passphrase(os.environ),
    )


@app.command("take", context_settings={"ignore_unknown_options": True})
def take_command(
    agents: Annotated[Path, typer.Argument()],
    options: Annotated[list[str] | None, typer.Argument(help="more options of the agent")] = None,
) -> None:
    """Take a place and become its agent."""
    place, _ = take(agents, socket.gethostname())
    config = str(place / "agent.toml")
    agent = [sys.executable, "-m", "ops.cli", "agent", "--config", config, *(options or [])]
    os.execv(sys.executable, agent)  # noqa: S606 a shell would have nothing to do


if __name__ == "__main__":
    try:
        with run.plain_errors():
            app()
    except OpsError as error:
        print(f"splitfleet: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
