"""What an operator does with a fleet's folder: makes it, takes devices in, shuts them out.

``coordinator.identity.fleet`` says what is in the folder, and keeps it fresh.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cryptography import x509

from broker.config import load_settings
from broker.mosquitto import CLAIMS_PORT, FLEET_CA, PORT
from broker.topics import COORDINATOR, check_name
from coordinator.atomic_files import PRIVATE, make_folder
from coordinator.errors import IdentityError
from coordinator.identity.authority import Authority, check_host, common_name
from coordinator.identity.fleet import (
    SETTINGS,
    Fleet,
    FleetSettings,
    authority_dir,
    state_dir,
    told,
    write,
)
from coordinator.identity.keys import key_to_pem, new_key, to_pem
from coordinator.identity.registration import Applicant, Lifetimes, Registration
from coordinator.identity.roster import FILE, Roster
from coordinator.identity.standing import Expiry
from ops.files import check_output, to_toml
from ops.identity_files import complete


class FleetFolder:
    """A fleet's folder, opened: a context manager, lets go of the roster at its end.

    Methods raise :class:`IdentityError` and TopicError, with what to do instead.
    """

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.folder = fleet.folder

    @classmethod
    def open(
        cls,
        folder: Path,
        passphrase: str | None = None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> FleetFolder:
        """What :func:`init_fleet` made. Raises ConfigError for settings that are wrong, too."""
        return cls(Fleet.open(folder, passphrase, clock=clock))

    def close(self) -> None:
        """Let go of the roster."""
        self.fleet.roster.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def broker_dir(self) -> Path:
        """What the broker is to be started with."""
        return self.fleet.broker_dir

    @property
    def coordinator_config(self) -> Path:
        """The settings of the coordinator."""
        return self.folder / COORDINATOR / "coordinator.toml"

    def device_dir(self, name: str) -> Path:
        """Where :meth:`add_device` writes."""
        return self.folder / "devices" / name

    def add_device(self, name: str) -> Path:
        """Make a device's key and certificates, and settings for its agent; their folder."""
        fleet, folder, key = self.fleet, self.device_dir(name), new_key()
        issued = fleet.registration.add(Applicant(name, key.public_key()))
        agent: dict[str, dict[str, Any]] = {
            "broker": {"url": fleet.settings.broker_url},
            "agent": {
                "fleet": fleet.settings.name,
                "device": name,
                "identity_dir": str(folder.absolute()),
                "claims_port": fleet.settings.claims_port,
                "state_dir": str(folder.absolute() / "state"),
            },
        }
        with told(folder):
            make_folder(folder)
            folder.chmod(0o700)
        write(folder / "key.pem", key_to_pem(key), PRIVATE)
        write(folder / "device.pem", to_pem(issued.certificate))
        write(folder / "return.pem", to_pem(issued.return_certificate))
        write(folder / FLEET_CA, to_pem(fleet.authority.ca("fleet")))
        write(folder / "agent.toml", to_toml(agent).encode())
        return folder

    def token(self, uses: int, days: float) -> bytes:
        """A join token: the fleet's CA, the claim's certificate and its key, as PEM."""
        certificate, key = self.fleet.registration.new_claim(uses, days)
        ca = self.fleet.authority.ca("fleet")
        return to_pem(ca) + to_pem(certificate) + key_to_pem(key)

    def write_token(self, uses: int, days: float, out: Path | None = None) -> Path:
        """A new join token's file, its owner's alone; in ``tokens/`` under its name by default."""
        if out is not None:
            check_output(out)
        pem = self.token(uses, days)
        if out is None:
            claim = common_name(x509.load_pem_x509_certificates(pem)[1])
            out = self.folder / "tokens" / f"{claim}.pem"
        with told(out):
            make_folder(out.parent)
        write(out, pem, PRIVATE)
        return out

    def revoke(self, name: str) -> None:
        """Shut a device, or with ``claim.ID`` a join token, out for good."""
        self.fleet.registration.revoke(name)
        self.refresh()

    def reset(self, name: str) -> None:
        """Let a device enrol again with a new key."""
        self.fleet.registration.reset(name)
        self.refresh()

    def retire(self, name: str) -> None:
        """Take a device off the roster."""
        self.fleet.registration.retire(name)
        self.refresh()

    def refresh(self) -> Expiry:
        """Write what broker and coordinator need anew."""
        return self.fleet.refresh()


def init_fleet(
    folder: Path,
    fleet: str,
    *,
    broker_names: Sequence[str],
    port: int = PORT,
    claims_port: int = CLAIMS_PORT,
    loopback_port: int | None = None,
    lifetimes: Lifetimes | None = None,
    passphrase: str | None = None,
    clock: Callable[[], float] = time.time,
) -> FleetFolder:
    """Make the folder of a new fleet: authorities, roster, what broker and coordinator need.

    ``broker_names`` are all the names and addresses under which clients reach the broker, the one
    they are told first; with ``loopback_port`` whoever is on the broker's machine has the
    coordinator's rights there, without TLS. Raises :class:`IdentityError`, TopicError for a bad
    fleet name, and ConfigError: before anything is made for settings that are wrong, and for the
    broker's files.
    """
    with told(folder):
        _check_new(folder)
    given = {
        "name": check_name(fleet, "fleet name"),
        "broker_names": [check_host(name) for name in broker_names],
        "port": port,
        "claims_port": claims_port,
        "loopback_port": loopback_port,
        **(lifetimes or Lifetimes()).model_dump(),
    }
    settings = load_settings(FleetSettings, section="fleet", flags=given)
    with told(folder):
        make_folder(state_dir(folder))
    authority = Authority.create(authority_dir(folder), fleet, passphrase, clock=clock)
    roster = Roster(state_dir(folder) / FILE, create=True, clock=clock)
    registration = Registration(authority, roster, settings, clock=clock)
    opened = Fleet(folder, settings, registration, clock=clock)
    complete(opened)
    values = settings.model_dump(mode="json", exclude_none=True)
    write(folder / SETTINGS, to_toml({"fleet": values}).encode())
    return FleetFolder(opened)


def _check_new(folder: Path) -> None:
    if (folder / SETTINGS).exists():
        raise IdentityError(f"{folder} is the folder of a fleet already; take another one")
    left = [*authority_dir(folder).glob("*.pem"), *state_dir(folder).glob(f"{FILE}*")]
    if left:
        raise IdentityError(
            f"{folder} has {min(left).relative_to(folder)} of a fleet, but no {SETTINGS}: take "
            f"another folder, restore {SETTINGS} from a backup, or remove {state_dir(folder)} if "
            "making it was interrupted"
        )
