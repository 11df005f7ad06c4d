"""What is written for a device, whatever it is written to.

    splitfleet/install.sh               makes a machine a device
    splitfleet/start.sh                 starts the agent's current version
    splitfleet/about                    the version, and the machine and Python it is for
    splitfleet/agent.toml               the agent's settings, and its unit for systemd
    splitfleet/requirements.txt         with wheels/, or the package indexes to install from
    splitfleet/identity/                key and certificates, or a join token taken apart
    vendor-data meta-data user-data     cloud-init's NoCloud seed, which runs install.sh
    network-config                      if a wireless network was named

The seed is the vendor's data, so what a person wrote as user-data (accounts, keys) stays.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from string import Template
from typing import Any

from broker.config import BrokerConfig, load_settings
from coordinator.identity.fleet import read_settings
from edge_agent.settings import AUTO, AgentSettings, check_broker_of_identity
from edge_agent.updates.start import START
from ops.errors import DiskTrouble, SettingsWrong
from ops.files import to_toml
from ops.flash.classes import TORCH, DeviceClass
from ops.flash.wheels import PACKAGE, Wheel, index_options, requirements

FOLDER = "splitfleet"
MARK = "splitfleet flash"
"""In each file of the seed that is ours alone."""
STATE = Path("/var/lib/splitfleet")
_TEMPLATES = Path(__file__).parent / "device"
_PASSWORD = re.compile(r"://[^/\s@]*:[^/\s@]*@")
"""A part of the URL of a package index that is not to be shown."""
_NO_USER_DATA = b"#cloud-config\n{}\n"


@dataclass(frozen=True, slots=True)
class File:
    """A file to be written; ``path`` is below the target's root, with forward slashes."""

    path: str
    content: bytes | Path
    secret: bool = False

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    def read(self) -> bytes:
        """Its bytes. Raises :class:`SettingsWrong` or :class:`DiskTrouble`."""
        return self.content if isinstance(self.content, bytes) else read(self.content)


@dataclass(frozen=True, slots=True)
class Wifi:
    """A wireless network; ``country`` is whose rules of the air hold, ISO 3166."""

    ssid: str
    password: str
    country: str


def agent_settings(
    fleet_folder: Path, device: str | None, device_class: DeviceClass, config: Path | None
) -> str:
    """The settings of the agent as TOML: of ``config``, and what the fleet and the class make so.

    Raises :class:`SettingsWrong` or ConfigError for settings an agent would not take and those of
    another fleet, IdentityError for a folder that is no fleet's.
    """
    fleet = read_settings(fleet_folder)
    sections = _sections(config)
    given = {name: sections.get(name, {}) for name in ("broker", "agent")}
    usual: dict[str, Any] = {"threads": device_class.threads} if device_class.threads else {}
    if device_class.engine != TORCH:
        usual["engine"] = device_class.engine
    usual["device_class"] = device_class.label
    fixed: dict[str, dict[str, Any]] = {
        "broker": {"url": fleet.broker_url},
        "agent": {
            "fleet": fleet.name,
            "device": device or AUTO,
            "identity_dir": str(STATE / "identity"),
            "state_dir": str(STATE / "state"),
            "updates_dir": str(STATE / "updates"),
            "claims_port": fleet.claims_port,
        },
    }
    for name, values in fixed.items():
        for key in values.keys() & given[name].keys():
            if given[name][key] != values[key]:
                raise SettingsWrong(
                    f"in {config}, {name}.{key} = {given[name][key]!r}, but here it is "
                    f"{values[key]!r}: leave it out; another fleet is named with --folder, another "
                    "device as the argument"
                )
    agent = usual | given["agent"] | fixed["agent"]
    added = {key: value for key, value in agent.items() if key not in given["agent"]}
    load_settings(AgentSettings, section="agent", file=config, flags=added)
    broker = load_settings(BrokerConfig, section="broker", file=config, flags=fixed["broker"])
    check_broker_of_identity(broker)
    return to_toml({"broker": given["broker"] | fixed["broker"], "agent": agent})


def device_files(
    device_class: DeviceClass, agent_toml: str, wheels: Sequence[Wheel], indexes: Sequence[str]
) -> list[File]:
    """All but identity and seed; without ``wheels`` the device installs from ``indexes``."""
    if wheels:
        release = next(one.version for one in wheels if one.name == PACKAGE)
        needed = "--no-index\n--find-links wheels\n" + requirements(wheels)
    else:
        try:
            release = version(PACKAGE)
        except PackageNotFoundError:
            raise SettingsWrong(
                "this splitfleet runs from its sources, of which no package index has a version: "
                "give --wheelhouse instead of --index"
            ) from None
        options = index_options(indexes)
        pairs = zip(options[::2], options[1::2], strict=True)
        needed = "".join(f"{flag} {url}\n" for flag, url in pairs)
        needed += f"{PACKAGE}[{device_class.extra}]=={release}\n"
    unit = Template((_TEMPLATES / "splitfleet-agent.service").read_text("utf-8")).substitute(
        device_class=device_class.label,
        memory_max=device_class.memory_max,
        watchdog_s=device_class.watchdog_s,
    )
    about = {
        "version": release,
        "machine": device_class.machine,
        "python": device_class.python_version,
    }
    texts = {
        "install.sh": (_TEMPLATES / "install.sh").read_text("utf-8"),
        "start.sh": START.read_text("utf-8"),
        "about": "".join(f"{key}={value}\n" for key, value in about.items()),
        "agent.toml": agent_toml,
        "splitfleet-agent.service": unit,
        "requirements.txt": needed,
    }
    return [
        *(File(f"{FOLDER}/wheels/{one.path.name}", one.path) for one in wheels),
        *(
            File(f"{FOLDER}/{name}", text.encode(), secret=bool(_PASSWORD.search(text)))
            for name, text in texts.items()
        ),
    ]


def seed_files(
    *,
    instance: str,
    device: str | None,
    wifi: Wifi | None,
    meta_data: bytes | None,
    user_data: bytes | None,
) -> list[File]:
    """The seed that has the rest installed; ``meta_data`` and ``user_data`` are there already.

    A machine with another ``instance`` than at its last boot is a new one to cloud-init.
    """
    own = {"instance-id": instance}
    if device is not None:
        # Quoted: to YAML some names are numbers. Marked: the next device may have none.
        own["local-hostname"] = f'"{device.replace("_", "-").lower()}"  # {MARK}'
    kept = [
        line
        for line in (meta_data or b"").decode("utf-8", "replace").splitlines()
        if line.partition(":")[0].strip().replace("_", "-") not in own and MARK not in line
    ]
    meta = "".join(f"{line}\n" for line in [*kept, *(f"{k}: {v}" for k, v in own.items())])
    seed = [File("user-data", _NO_USER_DATA)] if user_data is None else []
    if wifi is not None:
        seed.append(File("network-config", _network_config(wifi).encode(), secret=True))
    seed.append(File("vendor-data", (_TEMPLATES / "first-boot.sh").read_bytes()))
    seed.append(File("meta-data", meta.encode()))
    return seed


def _network_config(wifi: Wifi) -> str:
    """Netplan's, as JSON, which is YAML; the key is derived as IEEE 802.11 derives it."""
    key = hashlib.pbkdf2_hmac("sha1", wifi.password.encode(), wifi.ssid.encode(), 4096, 32).hex()
    wireless = {
        "dhcp4": True,
        "optional": True,
        "regulatory-domain": wifi.country,
        "access-points": {wifi.ssid: {"password": key}},
    }
    wired = {"dhcp4": True, "optional": True}
    content = {"version": 2, "ethernets": {"eth0": wired}, "wifis": {"wlan0": wireless}}
    return f"# {MARK}\n{json.dumps({'network': content}, indent=2)}\n"


def _sections(config: Path | None) -> dict[str, Any]:
    if config is None:
        return {}
    try:
        sections = tomllib.loads(read(config).decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise SettingsWrong(f"the settings file {config} is not valid TOML: {exc}") from exc
    for name, values in sections.items():
        if not isinstance(values, dict):
            raise SettingsWrong(f"in {config}, {name!r} must be a table: write [{name}] above it")
    return sections


def read(path: Path) -> bytes:
    """A file's bytes. Raises :class:`SettingsWrong` where there is none, :class:`DiskTrouble`."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as exc:
        raise SettingsWrong(f"{path} is not a file ({exc.strerror}): name one that is") from exc
    except OSError as exc:
        raise DiskTrouble(f"cannot read {path}: {exc.strerror}") from exc
