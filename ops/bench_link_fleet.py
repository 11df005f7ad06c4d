"""The processes of ``splitfleet bench inference-link``: a trained fleet over a slow link.

Mosquitto and the coordinator (``splitfleet coordinator --stay``, on a copy of the state folder) are
at the near end of the link, one agent for each trained cut is at the far one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from broker.mosquitto import PORT, START
from coordinator.store import Store
from ops.bench_link_devices import READY_S, Measured, Task
from ops.errors import DiskTrouble, FleetFailed, OpsError
from ops.files import to_toml
from ops.identity import init_fleet
from ops.network_link import End, NetworkLink

STOP_S = 20.0
RESULT_S = 600.0
"""How long a coordinator may take to score its run."""
POLL_S = 0.1
_BROKER = 'exec 3<&0; sh "$1" & broker=$!; { cat <&3 >/dev/null; kill $broker; } & wait $broker'
"""The broker does not end with its standard input, that is with this process; this makes it."""


@dataclass(frozen=True, slots=True)
class TrainedRun:
    """What lies in a coordinator's state folder: a run, its settings, rounds and trained cuts."""

    state_dir: Path
    name: str
    settings: Mapping[str, Any]
    rounds: int
    cuts: tuple[int, ...]

    @classmethod
    def read(cls, state_dir: Path) -> Self:
        """Raises :class:`OpsError` and ``StoreError`` if there is nothing to answer with."""
        if not state_dir.is_dir():
            raise OpsError(f"{state_dir} is not there: name a coordinator's state folder")
        store = Store(state_dir)
        current = store.current()
        checkpoint = None if current is None else store.latest()
        if current is None or checkpoint is None or not checkpoint.trained_cuts:
            raise OpsError(f"no round was closed in {state_dir}: train a fleet first")
        name, settings = current
        if settings.get("dataset") is None:
            raise OpsError(f"the run in {state_dir} has no held-out images: train with a dataset")
        cuts = tuple(sorted(checkpoint.trained_cuts))
        return cls(state_dir, name, settings, checkpoint.round, cuts)

    @property
    def dataset(self) -> str:
        """Whose test images it can be asked about."""
        return str(self.settings["dataset"])

    @property
    def networks(self) -> tuple[str, ...]:
        """Factories that a device has to be allowed."""
        name = str(self.settings["network"]["name"])
        return (name,) if ":" in name else ()


class LinkFleet:
    """Broker and coordinator at the near end of a link, devices at the far one.

    ``folder`` is the fleet's own, for everything that it writes. Each device is asked about the
    first ``images`` of its share of the test images, ``images_per_s`` in the mean.
    """

    def __init__(
        self,
        run: TrainedRun,
        link: NetworkLink,
        folder: Path,
        *,
        images: int,
        images_per_s: float,
        data_root: Path | None,
    ) -> None:
        self._run = run
        self._link = link
        self._folder = folder
        self._images = images
        self._images_per_s = images_per_s
        self._data_root = None if data_root is None else str(data_root.absolute())
        self._fleet = str(run.settings["fleet"])
        self._names = tuple(f"cut-{cut}" for cut in run.cuts)
        self._url = f"mqtts://{link.near.address}:{PORT}"
        self._stack = contextlib.ExitStack()
        self._identities: tuple[str, ...] = ()
        self._connection: Mapping[str, Any] = {}

    def __enter__(self) -> Self:
        """Start the broker. Raises :class:`OpsError` without Mosquitto, :class:`DiskTrouble`."""
        if shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin") is None:
            raise OpsError("mosquitto is not installed: apt-get install mosquitto")
        try:
            self._folder.chmod(0o755)  # Mosquitto gives up root's rights before it reads its files
            shutil.copytree(self._run.state_dir, self._folder / "coordinator")
        except (OSError, shutil.Error) as exc:
            raise DiskTrouble(f"cannot copy {self._run.state_dir}: {exc}; free space") from exc
        with init_fleet(
            self._folder / "fleet", self._fleet, broker_names=[self._link.near.address]
        ) as fleet:
            self._identities = tuple(str(fleet.add_device(name)) for name in self._names)
            self._connection = tomllib.loads(fleet.coordinator_config.read_text())["broker"]
            command = ["sh", "-c", _BROKER, "sh", str(fleet.broker_dir / START)]
        self._broker = self._stack.enter_context(self._process("broker", self._link.near, command))
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def measure(self, threshold: float) -> Measured:
        """Answer all images with this threshold. Raises :class:`FleetFailed`."""
        task = Task(
            url=self._url,
            fleet=self._fleet,
            names=self._names,
            identities=self._identities,
            cuts=self._run.cuts,
            state_dir=str(self._folder / "devices"),
            dataset=self._run.dataset,
            data_root=self._data_root,
            networks=self._run.networks,
            images=self._images,
            images_per_s=self._images_per_s,
            threshold=threshold,
            interface=self._link.far.interface,
        )
        limit_s = 2 * (READY_S + self._images / self._images_per_s)
        command = [*self._link.far.command, *_python("ops.bench_link_devices")]
        with self._coordinator(threshold), self._log("devices") as log:
            try:
                done = subprocess.run(
                    command,
                    input=json.dumps(dataclasses.asdict(task)).encode(),
                    stdout=subprocess.PIPE,
                    stderr=log,
                    timeout=limit_s,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                raise FleetFailed(f"no answers in {limit_s:.0f} s\n{self._last_words()}") from None
        if done.returncode:
            raise FleetFailed(f"the devices have failed\n{self._last_words()}")
        return Measured.read(done.stdout.decode())

    @contextlib.contextmanager
    def _coordinator(self, threshold: float) -> Iterator[None]:
        """It goes on with the finished run, and answers with this threshold."""
        settings = {
            **{key: value for key, value in self._run.settings.items() if value is not None},
            "state_dir": str(self._folder / "coordinator"),
            "rounds": self._run.rounds,
            "stay": True,
            "inference": False,
            "exit_policy": "threshold",
            "threshold": threshold,
            "calibration_images": 0,
            "audit_share": 0.0,
            "precision": "fp32",
            "memory_format": "contiguous",
        }
        if self._data_root is not None:
            settings["data_root"] = self._data_root
        file = self._folder / "coordinator.toml"
        connection = {**self._connection, "backoff_max_s": 1.0}
        file.write_text(to_toml({"broker": connection, "coordinator": settings}), encoding="utf-8")
        command = _python("ops.cli", "coordinator", "--config", str(file), "--quiet")
        command.append("--until-eof")
        result = self._folder / "coordinator" / self._run.name / "result.json"
        result.unlink(missing_ok=True)
        with self._process("coordinator", self._link.near, command) as process:
            # It scores the finished run again before it listens, and then writes this.
            end = time.monotonic() + RESULT_S
            while not result.exists():
                ended = [child.poll() is not None for child in (self._broker, process)]
                if any(ended) or time.monotonic() > end:
                    raise FleetFailed(f"the coordinator does not serve\n{self._last_words()}")
                time.sleep(POLL_S)
            yield

    @contextlib.contextmanager
    def _process(
        self, name: str, end: End, command: Sequence[str]
    ) -> Iterator[subprocess.Popen[bytes]]:
        with self._log(name) as log:
            process = subprocess.Popen(
                [*end.command, *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.communicate(timeout=STOP_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()

    def _log(self, name: str) -> IO[bytes]:
        return (self._folder / f"{name}.log").open("ab")

    def _last_words(self) -> str:
        logs = sorted(self._folder.glob("*.log"))
        said = [(log.stem, log.read_text("utf-8", "replace").splitlines()[-5:]) for log in logs]
        return "\n".join(f"{name}: {line}" for name, lines in said for line in lines)


def _python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]
