"""``splitfleet doctor``: what a machine, a broker and a data folder need, checked one by one."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import platform
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from broker.config import BrokerConfig
from broker.embedded import EmbeddedBroker
from broker.errors import EmbeddedBrokerError
from broker.fields import Name
from edge_agent.identity.folder import IdentityFolder
from ops import run
from ops.doctor_broker import examine_broker
from ops.finding import Finding, State
from tensors.datasets import load_dataset
from tensors.errors import DataError

PYTHON = (3, 11)
TORCH = "2.13."
TORCHVISION = "0.28."
DISK_WANTED = 2_000_000_000
DISK_NEEDED = 200_000_000

_SIGNS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "failed": ("✗", "red")}


class Subject(BaseModel):
    """What a service of this machine would use; its other settings are of no interest here."""

    model_config = ConfigDict(frozen=True)

    fleet: Name = "fleet"
    dataset: str = "fashion-mnist-small"
    data_root: Path | None = None
    state_dir: Path = Path()

    @classmethod
    def resolve(cls, file: Path | None, flags: Mapping[str, Any]) -> Self:
        """From ``[coordinator]`` of a file, else its ``[agent]``; flags count before both."""
        section = "coordinator"
        if file is not None:
            sections = tomllib.loads(file.read_text(encoding="utf-8"))
            if "coordinator" not in sections and "agent" in sections:
                section = "agent"
        return run.settings_of(cls, section, file, flags)


async def examine(
    broker: BrokerConfig | None,
    *,
    dataset: str,
    data_root: Path | None = None,
    state_dir: Path,
    fleet: str = "fleet",
) -> list[Finding]:
    """Check everything; without ``broker`` the embedded one is started and checked.

    Takes some seconds: every wait for a broker is bounded. Nothing is left behind.
    """

    def on_this_machine() -> list[Finding]:
        return [
            check_python(),
            check_torch(),
            check_torchvision(),
            check_dataset(dataset, data_root),
            check_state_dir(state_dir),
            check_disk(state_dir),
        ]

    findings = await asyncio.to_thread(on_this_machine)
    if broker is not None:
        return findings + await examine_broker(broker, fleet=fleet)
    try:
        async with EmbeddedBroker() as embedded:
            config = BrokerConfig(url=embedded.url)
            return findings + await examine_broker(config, fleet=fleet)
    except EmbeddedBrokerError as exc:
        advice = "install splitfleet again, or use Mosquitto and give its --broker URL"
        return [*findings, Finding("embedded broker", "failed", str(exc), advice)]


def with_identity(broker: BrokerConfig, config: Path | None) -> BrokerConfig:
    """``broker`` with the files of the agent's identity, if ``config`` names one."""
    if config is None:
        return broker
    folder = tomllib.loads(config.read_text("utf-8")).get("agent", {}).get("identity_dir")
    if folder is None:
        return broker
    own = IdentityFolder(Path(folder))
    files = {"ca_file": own.ca_file, "cert_file": own.device_file, "key_file": own.key_file}
    return broker.model_copy(update=files)


def show(findings: Sequence[Finding], *, as_json: bool) -> None:
    """Print the findings: for people as lines, or ``{"ok": …, "checks": […]}``."""
    if as_json:
        ok = all(finding.state != "failed" for finding in findings)
        checks = [finding.as_dict() for finding in findings]
        print(json.dumps({"ok": ok, "checks": checks}, indent=1))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for finding in findings:
        sign, colour = _SIGNS[finding.state]
        detail = Text(finding.detail)
        if finding.advice:
            detail.append(f"\n→ {finding.advice}", style=colour)
        table.add_row(Text(sign, style=colour), Text(finding.name, style="bold"), detail)
    Console().print(table)


def check_python(running: tuple[int, int] = sys.version_info[:2]) -> Finding:
    """Python is new enough."""
    detail = f"{platform.python_version()} at {sys.executable}"
    if running >= PYTHON:
        return Finding("Python", "ok", detail)
    wanted = ".".join(map(str, PYTHON))
    return Finding("Python", "failed", detail, f"make an environment with Python {wanted} or newer")


def check_torch() -> Finding:
    """torch can be imported and is of the series that splitfleet is tested with.

    Where onnxruntime is in its place, this is to be a device that does not train.
    """
    install = f"pip install 'torch=={TORCH}*', or splitfleet[agent] / splitfleet[coordinator]"
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError) as exc:
        try:
            runtime = importlib.import_module("onnxruntime")
        except (ImportError, OSError):
            return Finding("torch", "failed", _one_line(exc), install)
        detail = f"missing; onnxruntime {runtime.__version__} is enough for splitfleet agent --lite"
        return Finding("torch", "warning", detail, f"for anything else: {install}")
    device = "CPU and CUDA" if torch.cuda.is_available() else "CPU"
    detail = f"{torch.__version__} on {device}, {torch.get_num_threads()} threads"
    return _judge_version("torch", torch.__version__, TORCH, detail, install)


def check_torchvision() -> Finding:
    """torchvision can be imported; only reading and fetching public data sets needs it."""
    install = f"pip install 'torchvision=={TORCHVISION}*'; only public data sets need it"
    try:
        compat = importlib.import_module("tensors.torchvision_compat")
        compat.torchvision_module()
        installed = version("torchvision")
    except (ImportError, OSError, RuntimeError, PackageNotFoundError) as exc:
        return Finding("torchvision", "warning", _one_line(exc), install)
    return _judge_version("torchvision", installed, TORCHVISION, installed, install)


def check_dataset(name: str, root: Path | None) -> Finding:
    """Both splits of the data set can be read."""
    try:
        train, test = (len(load_dataset(name, split, root=root)) for split in ("train", "test"))
    except DataError as exc:
        what, _, todo = str(exc).partition(": ")
        return Finding("data set", "failed", what, todo or "choose another --dataset")
    return Finding("data set", "ok", f"{name}: {train:,} training and {test:,} test images")


def check_state_dir(folder: Path) -> Finding:
    """Files can be made in the state folder, or the folder itself can."""
    place = _existing(folder)
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".splitfleet-doctor-") as file:
            file.write(b"written")
            file.flush()
            os.fsync(file.fileno())
    except OSError as exc:
        advice = f"give this user the right to write to {place}, or choose another --state-dir"
        return Finding("state folder", "failed", f"{folder}: {exc.strerror}", advice)
    return Finding("state folder", "ok", f"{folder.absolute()} can be written")


def check_disk(
    folder: Path, free_bytes: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free
) -> Finding:
    """There is room for checkpoints."""
    free = free_bytes(_existing(folder))
    detail = f"{free / 1e9:.1f} GB free for {folder.absolute()}"
    if free >= DISK_WANTED:
        return Finding("disk space", "ok", detail)
    state: State = "warning" if free >= DISK_NEEDED else "failed"
    advice = "free some space, or choose a --state-dir on another disk"
    return Finding("disk space", state, detail, advice)


def _judge_version(name: str, installed: str, series: str, detail: str, install: str) -> Finding:
    if installed.startswith(series):
        return Finding(name, "ok", detail)
    return Finding(name, "warning", f"{detail}; tested is {series}*", install)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above that exists."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return place


def _one_line(exc: BaseException) -> str:
    lines = str(exc).strip().splitlines()
    return lines[0] if lines else type(exc).__name__
