"""Places for devices that are containers of one service, and so all alike.

`lay_out` runs once before the others: it writes the broker's configuration, and gives coordinator
and devices their folders, each device's with a password, a name, a cut layer and a share of the
data. `take` is how a container becomes a device: it holds a place that nobody else holds for as
long as its process lives, the same after a restart. The devices' folders are in one volume, so
these are the passwords of a fleet on one machine; on a real device there is only its own.

    FOLDER/broker/             mosquitto.conf, acl, passwords (hashes), data/
    FOLDER/coordinator/        coordinator.toml, state/
    FOLDER/agents/agent-N/     agent.toml, state/, lock
"""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from broker.config import BrokerConfig, load_settings
from broker.mosquitto_passwords import new_password, write_password_config
from broker.topics import COORDINATOR
from ops import run
from ops.errors import DiskTrouble, FleetFailed, OpsError, SettingsWrong
from ops.files import to_toml, write_whole

app = typer.Typer(help=__doc__, add_completion=False, pretty_exceptions_enable=False)


def lay_out(
    folder: Path, *, fleet: str, url: str, places: int, cuts: Sequence[int], shares: int
) -> None:
    """Write what broker, coordinator and ``places`` devices need; who has a password keeps it.

    Place N has cut layer ``cuts[(N - 1) % len(cuts)]`` and share ``(N - 1) % shares`` of the data.
    ``url`` is the broker's as the others see it, ``folder`` the same path for all of them.

    Raises ConfigError or TopicError for a bad ``url`` or ``fleet``, DiskTrouble for files that
    cannot be read or written.
    """
    port = load_settings(BrokerConfig, section="broker", flags={"url": url}).port
    names = [COORDINATOR, *(f"agent-{number}" for number in range(1, places + 1))]
    files = {name: folder / "agents" / name / "agent.toml" for name in names[1:]}
    files[COORDINATOR] = folder / "coordinator" / "coordinator.toml"
    known = {name: _password(file) for name, file in files.items() if file.exists()}
    passwords = {name: known.get(name) or new_password() for name in names}
    try:
        (folder / "broker" / "data").mkdir(parents=True, exist_ok=True)
        for file in files.values():
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for file in (folder / "agents").glob("*/agent.toml"):
            if file.parent.name not in files:
                file.unlink()  # a place that is no more: the broker will not know its password
    except OSError as exc:
        raise DiskTrouble(f"cannot lay out places in {folder}: {exc}") from exc
    for index, name in enumerate(names, start=-1):
        about: dict[str, Any] = {"fleet": fleet, "state_dir": str(files[name].parent / "state")}
        if name != COORDINATOR:
            about |= {"device": name, "cut": cuts[index % len(cuts)], "threads": 1}
            about |= {"share": index % shares, "shares": shares}
        else:
            about["broker_figures"] = True
        login = {"url": url, "username": name, "password": passwords[name]}
        write_whole(files[name], to_toml({"broker": login, files[name].stem: about}))
    write_password_config(
        folder / "broker",
        fleet,
        devices=names[1:],
        passwords=passwords,
        port=port,
        persistence=folder / "broker" / "data",
    )


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


def _password(file: Path) -> str:
    try:
        password = tomllib.loads(file.read_text("utf-8"))["broker"]["password"]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise DiskTrouble(
            f"{file} is not as it was written ({exc!r}); remove it for a new password"
        ) from exc
    return str(password)


@app.command("lay-out")
def lay_out_command(
    folder: Annotated[Path, typer.Argument()],
    *,
    broker: Annotated[str, typer.Option(help="mqtt://HOST:PORT as the others see it")],
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
    lay_out(folder, fleet=fleet, url=broker, places=places, cuts=layers, shares=shares)


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
