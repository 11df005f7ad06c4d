"""The files of a fleet's folder that can be made again from its authorities and roster."""

from __future__ import annotations

import contextlib
import ipaddress
import tarfile
import tempfile
from pathlib import Path
from typing import BinaryIO

from cryptography import x509

from broker.config import BrokerConfig, load_settings
from broker.errors import ConfigError
from broker.mosquitto import FLEET_CA, write_mosquitto_config
from broker.topics import COORDINATOR
from coordinator.atomic_files import PRIVATE, make_folder
from coordinator.errors import IdentityError
from coordinator.identity.authority import SIDES
from coordinator.identity.fleet import (
    CAS,
    LISTS,
    SERVERS,
    SETTINGS,
    Fleet,
    FleetSettings,
    Server,
    state_dir,
    told,
    write,
)
from coordinator.identity.keys import (
    certificate_from_pem,
    certified_key,
    key_from_pem,
    key_to_pem,
    new_key,
    to_pem,
)
from coordinator.identity.roster import FILE
from edge_agent.identity.keys import issued_by
from edge_agent.settings import AgentSettings
from ops.files import check_output, to_toml


def complete(fleet: Fleet) -> None:
    """Write what broker and coordinator need and do not have, or have of another authority.

    Also mosquitto.conf, as this version of splitfleet writes it; settings of the coordinator stay.
    Raises :class:`IdentityError`, and ConfigError for the broker's files.
    """
    own = fleet.folder / COORDINATOR
    with told(fleet.folder):
        make_folder(state_dir(fleet.folder))
        own.chmod(0o700)
        make_folder(fleet.broker_dir)
        fleet.broker_dir.chmod(0o755)  # Mosquitto is another user
    for side in SIDES:
        ca = fleet.authority.ca(side)
        write(fleet.broker_dir / CAS[side], to_pem(ca))
        _remove_foreign_list(fleet.broker_dir / LISTS[side], ca)
    for server in SERVERS:
        if not _is_ours(fleet, server):
            key = new_key()
            write(_key_file(fleet, server), key_to_pem(key), PRIVATE)
            fleet.sign_server(server, key.public_key())
    fleet.refresh()
    write(own / FLEET_CA, to_pem(fleet.authority.ca("fleet")))
    if not (own / "coordinator.toml").exists():
        write(own / "coordinator.toml", _coordinator_toml(fleet.folder, fleet.settings).encode())
    settings = fleet.settings
    write_mosquitto_config(
        fleet.broker_dir,
        settings.name,
        port=settings.port,
        claims_port=settings.claims_port,
        loopback_port=settings.loopback_port,
    )


def outdated(fleet: Fleet) -> list[str]:
    """What settings in the folder say of the broker that is not so, or not any more: file by file.

    They are made once and then their owner's: another name or port in ``fleet.toml`` does not
    change them.
    """
    settings, found = fleet.settings, []
    own = fleet.folder / COORDINATOR / "coordinator.toml"
    for file in (own, *sorted(fleet.folder.glob("devices/*/agent.toml"))):
        try:
            broker = load_settings(BrokerConfig, section="broker", file=file)
            claims_port = settings.claims_port
            if file != own:
                claims_port = load_settings(AgentSettings, section="agent", file=file).claims_port
        except ConfigError as exc:
            found.append(f"{file}: {exc}")
            continue
        if not _leads_to(settings, broker):
            found.append(f"{file}: broker.url = {broker.url}")
        if claims_port != settings.claims_port:
            found.append(f"{file}: agent.claims_port = {claims_port}")
    return found


def save(fleet: Fleet, stream: BinaryIO) -> None:
    """Write what cannot be made again, as a tar archive to be unpacked in the fleet's folder.

    Checkpoints and roster in it are whole, whatever happens meanwhile. Raises
    :class:`IdentityError`.
    """
    folder, roster = fleet.folder, state_dir(fleet.folder) / FILE
    with told(folder), tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / FILE
        fleet.roster.copy_to(copy)
        with tarfile.open(fileobj=stream, mode="w|") as archive:
            archive.add(copy, roster.relative_to(folder))
            for path in (folder / SETTINGS, *sorted((folder / COORDINATOR).rglob("*"))):
                name = path.relative_to(folder)
                temporary = any(part.startswith(".") for part in name.parts)
                if temporary or path.name.startswith(FILE):
                    continue
                with contextlib.suppress(FileNotFoundError):  # an old checkpoint
                    archive.add(path, name, recursive=False)


def save_to(fleet: Fleet, file: Path) -> None:
    """:func:`save` to a file, its owner's alone, that is there whole or not at all."""
    check_output(file)
    new = file.with_name(f".{file.name}.new")
    with told(file):
        new.unlink(missing_ok=True)
        new.touch(0o600)
        try:
            with new.open("r+b") as stream:
                save(fleet, stream)
            new.replace(file)
        finally:
            new.unlink(missing_ok=True)


def _is_ours(fleet: Fleet, server: Server) -> bool:
    """Whether it has a key and a certificate for it from this authority, for the right names."""
    try:
        pem = fleet.server_file(server).read_bytes()
        key_pem = _key_file(fleet, server).read_bytes()
    except FileNotFoundError:
        return False
    except OSError as exc:
        raise IdentityError(f"cannot read {exc.filename}: {exc.strerror}") from exc
    certificate = certificate_from_pem(pem, str(fleet.server_file(server)))
    key = key_from_pem(key_pem, None, str(_key_file(fleet, server)))
    if server == "broker" and _hosts(certificate) != {
        _plain(name) for name in fleet.settings.broker_names
    }:
        return False
    ca = fleet.authority.ca("fleet")
    return certified_key(certificate) == key.public_key() and issued_by(certificate, ca)


def _hosts(certificate: x509.Certificate) -> set[str]:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    addresses = names.get_values_for_type(x509.IPAddress)
    return {*names.get_values_for_type(x509.DNSName), *map(str, addresses)}


def _plain(host: str) -> str:
    """A name as certificates have it: addresses in the one form there is for each."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host


def _leads_to(settings: FleetSettings, broker: BrokerConfig) -> bool:
    if not broker.tls:
        return broker.port == settings.loopback_port
    hosts = {_plain(name).lower() for name in settings.broker_names}
    return broker.port == settings.port and _plain(broker.host) in hosts


def _key_file(fleet: Fleet, server: Server) -> Path:
    return fleet.server_file(server).with_name(f"{server}-key.pem")


def _remove_foreign_list(path: Path, ca: x509.Certificate) -> None:
    with told(path), contextlib.suppress(FileNotFoundError):
        try:
            listed = x509.load_pem_x509_crl(path.read_bytes())
        except ValueError:
            return  # damaged: it is made anew all the same
        if not listed.is_signature_valid(certified_key(ca)):
            path.unlink()


def _coordinator_toml(folder: Path, settings: FleetSettings) -> str:
    own = (folder / COORDINATOR).absolute()
    return to_toml(
        {
            "broker": {
                "url": settings.broker_url,
                "ca_file": str(own / FLEET_CA),
                "cert_file": str(own / "coordinator.pem"),
                "key_file": str(own / "coordinator-key.pem"),
            },
            "coordinator": {
                "fleet": settings.name,
                "fleet_dir": str(folder.absolute()),
                "state_dir": str(own / "state"),
                "broker_figures": True,
            },
        }
    )
