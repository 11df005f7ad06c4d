"""Where the processes of the demo meet: a plain broker, or a fleet with all that protects it.

A place is a context manager. It says how coordinator and agents are told where it is, and what its
guards have done.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import ssl
import subprocess
import time
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from ops.errors import BrokerUnreachable, FleetFailed
from ops.files import to_toml, write_whole

FLEET = "demo"
START_S = 30.0
STOP_S = 10.0
GUARDS: dict[str, Any] = {
    "aggregation_rule": "trimmed-mean",
    "upload_clip": 3.0,
    "loss_mads": 6.0,
    "gradient_clip": 3.0,
    "clip_norm": 30.0,
    "noise_std": 0.2,
}
"""What the coordinator of a guarded demo is told beyond its flags (docs/security.md). The noise is
there to be seen; with so little the promise is next to none, and with more nothing is learnt in
minutes."""


class Place(Protocol):
    """Where coordinator and agents meet."""

    @property
    def state_dir(self) -> Path:
        """The coordinator's."""
        ...

    def coordinator_flags(self) -> list[str]: ...

    def agent_flags(self, name: str) -> list[str]: ...

    def watch(self) -> None:
        """Look after it while the fleet trains. Raises :class:`FleetFailed`."""
        ...

    def account(self) -> dict[str, Any]:
        """For the summary."""
        ...


class PlainPlace:
    """A broker that lets everybody in."""

    def __init__(self, out: Path, url: str) -> None:
        self._out = out
        self._url = url
        self.state_dir = out / "coordinator"

    def coordinator_flags(self) -> list[str]:
        """See :class:`Place`."""
        return ["--broker", self._url, "--fleet", FLEET, "--state-dir", str(self.state_dir)]

    def agent_flags(self, name: str) -> list[str]:
        """See :class:`Place`."""
        state = str(self._out / "agents" / name)
        return ["--device", name, "--broker", self._url, "--fleet", FLEET, "--state-dir", state]

    def watch(self) -> None:
        """Nothing has to be looked after."""

    def account(self) -> dict[str, Any]:
        """Nothing is guarded."""
        return {}


@contextlib.contextmanager
def plain(out: Path, url: str | None) -> Iterator[PlainPlace]:
    """The broker at ``url``, or without one the embedded broker."""
    if url is not None:
        yield PlainPlace(out, url)
        return
    from broker.embedded import EmbeddedBroker

    with EmbeddedBroker(log_file=out / "logs" / "broker.log") as broker:
        yield PlainPlace(out, broker.url)


class GuardedPlace:
    """A Mosquitto with certificates; agents enrol with one token, which is good for them alone.

    Raises :class:`BrokerUnreachable` where there is no Mosquitto.
    """

    def __init__(self, out: Path, agents: Sequence[str]) -> None:
        from ops.identity import FleetFolder, init_fleet

        places = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"
        if shutil.which("mosquitto", path=places) is None:
            raise BrokerUnreachable(
                "there is no mosquitto here, which --secure needs; install it, as with "
                "apt-get install mosquitto"
            )
        self._out = out
        self._agents = agents
        folder = out / "fleet"
        if (folder / "fleet.toml").exists():
            self._fleet = FleetFolder.open(folder)
        else:
            ports = _free_port(), _free_port()
            self._fleet = init_fleet(
                folder, FLEET, broker_names=["127.0.0.1"], port=ports[0], claims_port=ports[1]
            )
        self.state_dir = folder / "coordinator" / "state"
        self._log = out / "logs" / "broker.log"
        self._broker: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._write_settings()
        # What an earlier broker kept would tell agents that the run is over, before it goes on.
        for kept in (self._fleet.broker_dir / "data").glob("*"):
            kept.unlink()
        port = self._fleet.fleet.settings.port
        with self._log.open("ab") as log:
            self._broker = subprocess.Popen(
                ["/bin/sh", str(self._fleet.broker_dir / "run.sh")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_S
        while not _listens(port):
            if self._broker.poll() is not None or time.monotonic() > deadline:
                self._stop()
                raise BrokerUnreachable(f"Mosquitto does not start; see {self._log}")
            time.sleep(0.1)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()
        self._fleet.close()

    def coordinator_flags(self) -> list[str]:
        """See :class:`Place`."""
        return ["--config", str(self._out / "fleet" / "demo.toml")]

    def agent_flags(self, name: str) -> list[str]:
        """See :class:`Place`."""
        return ["--config", str(self._out / "agents" / name / "agent.toml")]

    def watch(self) -> None:
        """The broker must not end."""
        assert self._broker is not None
        if self._broker.poll() is not None:
            raise FleetFailed(f"Mosquitto ended; see {self._log}")

    def account(self) -> dict[str, Any]:
        """Who is in, and who was kept out."""
        devices = self._fleet.fleet.roster.devices()
        claims = self._fleet.fleet.roster.claims()
        return {
            "broker": self._fleet.fleet.settings.broker_url,
            "enrolled": [device.name for device in devices if device.state == "active"],
            "token_uses_left": sum(claim.uses - claim.used for claim in claims),
            "stranger": self._try_as_stranger(),
            "guards": GUARDS,
        }

    def _try_as_stranger(self) -> str:
        """What the broker says to somebody who has no certificate."""
        context = ssl.create_default_context(cafile=self._fleet.broker_dir / "fleet-ca.pem")
        at = "127.0.0.1", self._fleet.fleet.settings.port
        try:
            with (
                socket.create_connection(at, timeout=START_S) as plain_socket,
                context.wrap_socket(plain_socket, server_hostname=at[0]) as tls,
            ):
                tls.recv(1)  # with TLS 1.3 the client hears of it only after its handshake
        except ssl.SSLError as exc:
            return f"refused: {exc.reason}"
        except OSError as exc:
            return f"refused: {exc}"
        return "let in"

    def _write_settings(self) -> None:
        from edge_agent.identity.folder import IdentityFolder

        fleet = self._fleet.fleet.settings
        own = tomllib.loads(self._fleet.coordinator_config.read_text("utf-8"))
        own["coordinator"] |= GUARDS | {"network": {"norm": "group"}}
        write_whole(self._out / "fleet" / "demo.toml", to_toml(own))
        identities = {
            name: IdentityFolder(self._out / "agents" / name / "identity") for name in self._agents
        }
        new = [name for name, identity in identities.items() if not identity.enrolled]
        token = self._fleet.token(len(new), days=1) if new else b""
        for name, identity in identities.items():
            place = self._out / "agents" / name
            if name in new:
                identity.put_token(token)
            agent = {
                "fleet": FLEET,
                "device": name,
                "state_dir": str(place / "state"),
                "identity_dir": str(place / "identity"),
                "claims_port": fleet.claims_port,
            }
            text = to_toml({"broker": {"url": fleet.broker_url}, "agent": agent})
            write_whole(place / "agent.toml", text)

    def _stop(self) -> None:
        assert self._broker is not None
        self._broker.send_signal(signal.SIGTERM)
        try:
            self._broker.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._broker.kill()
            self._broker.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
