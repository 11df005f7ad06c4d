"""The wheels that a device installs: chosen by pip as it would choose them there, pinned by digest.

A wheelhouse is a folder of wheels and may hold those of several machines. It needs pip's own, too:
Debian's Python makes virtual environments without pip.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ops.errors import DiskTrouble, OpsError, SettingsWrong
from ops.flash.classes import DeviceClass

PACKAGE = "splitfleet"
GLIBC = {11: 36, 12: 39, 13: 41}
"""The minor versions of Python and of glibc in Debian 12, Ubuntu 24.04 and Debian 13."""
OLDEST_GLIBC = 17
PIP_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel; ``sha256`` in hexadecimal."""

    name: str
    version: str
    path: Path
    sha256: str


def choose_wheels(wheelhouse: Path, device: DeviceClass) -> list[Wheel]:
    """What the agent of ``device`` needs, pip included, out of a wheelhouse.

    Raises :class:`SettingsWrong` if something is missing, with how to get it.
    """
    if not wheelhouse.is_dir():
        raise SettingsWrong(f"{wheelhouse} is no folder: make a wheelhouse with {_recipe(device)}")
    wanted = f"{PACKAGE}[{device.extra}]"
    options = ["--no-index", "--find-links", str(wheelhouse), *_target(device)]
    # What the user has set up for pip, other folders of wheels say, must not be looked at.
    environ = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    code, out, err = _pip(
        "install", "--dry-run", "--quiet", "--ignore-installed", "--report", "-", *options,
        "--target", "nowhere", wanted, "pip", environ=environ | {"PIP_CONFIG_FILE": os.devnull},
    )  # fmt: skip
    if code:
        reason = [line for line in err.splitlines() if "ERROR" in line][-1:] or [err.strip()[-300:]]
        raise SettingsWrong(
            f"{wheelhouse} does not hold {wanted} for Python {device.python_version} on "
            f"{device.machine} ({reason[0].removeprefix('ERROR: ')}): make it with "
            f"{_recipe(device)}"
        )
    return [_wheel(item) for item in json.loads(out)["install"]]


def fetch_wheels(
    wheelhouse: Path, device: DeviceClass, sources: Sequence[str], indexes: Sequence[str]
) -> None:
    """Put what the agent of ``device`` needs into a wheelhouse, from package indexes.

    ``sources`` are wheels or folders with the project's own; ``indexes`` the first and further
    ones, pip's default without any. Raises :class:`OpsError` with what pip says, DiskTrouble.
    """
    try:
        wheelhouse.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise DiskTrouble(f"cannot make the folder {wheelhouse}: {exc.strerror}") from exc
    links = [option for source in sources for option in ("--find-links", str(source))]
    code, _, err = _pip(
        "download", "--quiet", "--dest", str(wheelhouse), *links, *index_options(indexes),
        *_target(device), f"{PACKAGE}[{device.extra}]", "pip",
    )  # fmt: skip
    if code:
        raise OpsError(f"pip cannot fetch the wheels: {err.strip()[-500:]}")


def index_options(indexes: Sequence[str]) -> list[str]:
    """The options of pip for package indexes: the first replaces its own."""
    flags = ["--index-url", *["--extra-index-url"] * len(indexes)]
    return [option for pair in zip(flags, indexes, strict=False) for option in pair]


def requirements(wheels: Sequence[Wheel]) -> str:
    """A requirements file that takes these wheels and no others."""
    return "".join(f"{one.name}=={one.version} --hash=sha256:{one.sha256}\n" for one in wheels)


def _target(device: DeviceClass) -> list[str]:
    abi = "cp{}{}".format(*device.python)
    newest = GLIBC.get(device.python[1], min(GLIBC.values()))
    platforms = [
        f"manylinux_2_{minor}_{device.machine}" for minor in range(newest, OLDEST_GLIBC - 1, -1)
    ]
    platforms += [f"manylinux2014_{device.machine}", f"linux_{device.machine}"]
    options = ["--only-binary", ":all:", "--implementation", "cp"]
    options += ["--python-version", device.python_version]
    for tag in (abi, "abi3", "none"):
        options += ["--abi", tag]
    for name in platforms:
        options += ["--platform", name]
    return options


def _recipe(device: DeviceClass) -> str:
    return (
        f"`splitfleet wheelhouse FOLDER --machine {device.machine} --python "
        f"{device.python_version} --engine {device.engine}`"
    )


def _pip(*arguments: str, environ: Mapping[str, str] | None = None) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    try:
        done = subprocess.run(
            [*command, *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=PIP_TIMEOUT_S,
            env=environ,
        )
    except subprocess.TimeoutExpired:
        raise OpsError(f"pip has not answered in {PIP_TIMEOUT_S:g} s: try again") from None
    return done.returncode, done.stdout, done.stderr


def _wheel(item: dict[str, dict[str, dict[str, dict[str, str]]]]) -> Wheel:
    metadata: dict[str, str] = item["metadata"]  # type: ignore[assignment]
    place: dict[str, str] = item["download_info"]  # type: ignore[assignment]
    digest = item["download_info"]["archive_info"]["hashes"]["sha256"]
    path = Path(unquote(urlsplit(place["url"]).path))
    return Wheel(metadata["name"], metadata["version"], path, digest)
