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
from ops.flash.classes import TORCH, DeviceClass

PACKAGE = "splitfleet"
GLIBC = {11: 36, 12: 39, 13: 41}
"""The minor versions of Python and of glibc in Debian 12, Ubuntu 24.04 and Debian 13."""
OLDEST_GLIBC = 17
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
"""Where builds of torch are that bring no CUDA along, which are gigabytes, on aarch64 too."""
PIP_TIMEOUT_S = 600.0
_DRY = (
    "install", "--dry-run", "--quiet", "--ignore-installed", "--report", "-", "--target", "nowhere"
)  # fmt: skip


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
    environ["PIP_CONFIG_FILE"] = os.devnull
    code, out, err = _pip(*_DRY, *options, wanted, "pip", environ=environ)
    if code:
        reason = [line for line in err.splitlines() if "ERROR" in line][-1:] or [err.strip()[-300:]]
        raise SettingsWrong(
            f"{wheelhouse} does not hold {wanted} for Python {device.python_version} on "
            f"{device.machine} ({reason[0].removeprefix('ERROR: ')}): make it with "
            f"{_recipe(device)}{_hint(err)}"
        )
    return [_wheel(item) for item in json.loads(out)["install"]]


def fetch_wheels(
    wheelhouse: Path,
    device: DeviceClass,
    sources: Sequence[str],
    indexes: Sequence[str],
    torch_index: str,
) -> None:
    """Put what the agent of ``device`` needs into a wheelhouse, from package indexes.

    ``sources`` are wheels or folders with the project's own; ``indexes`` the first and further
    ones, pip's default without any; ``torch_index`` is torch's, "" if it has none of its own.
    Raises :class:`OpsError` with what pip says, DiskTrouble.
    """
    try:
        wheelhouse.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise DiskTrouble(f"cannot make the folder {wheelhouse}: {exc.strerror}") from exc
    links = [option for source in sources for option in ("--find-links", str(source))]
    origins = [*links, *index_options(indexes), *_target(device)]
    into = ["--quiet", "--dest", str(wheelhouse)]
    wanted = [f"{PACKAGE}[{device.extra}]", "pip"]
    if torch_index and device.engine == TORCH:
        pins = _would_install(TORCH, [*origins, *wanted])
        there = [*links, *index_options([torch_index]), *_target(device)]
        code, _, err = _pip("download", *into, "--no-deps", *there, *pins)
        if code:
            raise OpsError(
                f"pip cannot fetch {' '.join(pins)} from {torch_index}: {err.strip()[-500:]}; "
                "--torch-index has another index for it, and --torch-index '' takes it from where "
                "all else comes from, with CUDA"
            )
    code, _, err = _pip("download", *into, "--find-links", str(wheelhouse), *origins, *wanted)
    if code:
        raise OpsError(_no_wheels(err))


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


def _would_install(prefix: str, arguments: Sequence[str]) -> list[str]:
    """What pip would install whose name begins so, without the mark of a local build."""
    code, out, err = _pip(*_DRY, *arguments)
    if code:
        raise OpsError(_no_wheels(err))
    found = (item["metadata"] for item in json.loads(out)["install"])
    return [
        f"{one['name']}=={one['version'].partition('+')[0]}"
        for one in found
        if one["name"].startswith(prefix)
    ]


def _no_wheels(err: str) -> str:
    return f"pip cannot fetch the wheels: {err.strip()[-500:]}{_hint(err)}"


def _hint(err: str) -> str:
    if "requires a different Python" in err:  # it compares with its own: pip 23.2 does, 26.3 not
        return (
            "; this pip cannot choose for another Python than its own: update it with "
            f"{sys.executable} -m pip install --upgrade pip"
        )
    if f"No matching distribution found for {PACKAGE}[" in err:
        return f"; give a wheel of {PACKAGE} with --from (pip wheel --no-deps .)"
    return ""


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
