"""A real Mosquitto for tests: free port, its own folder and configuration, gone at the end."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

START_TIMEOUT_S = 60.0
END_TIMEOUT_S = 60.0
LOWEST_PORT, OWN_PORTS, OWNERS = 10_240, 64, 344  # ends before 32768, where Linux's own begin
_given = itertools.count()


def find_mosquitto() -> str:
    """Path of the broker; a clear failure when it is not installed."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin"
    program = shutil.which("mosquitto", path=path)
    if program is None:
        raise AssertionError(
            "these tests need a real Mosquitto: apt-get install mosquitto (brew on macOS)"
        )
    return program


def free_port() -> int:
    """A port nobody listens on now, nor is given by chance before the caller does.

    It is below those that the kernel hands out, and one of this process's own, as other tests run
    beside this one; only after ``OWN_PORTS`` calls does the same one come again.
    """
    first = LOWEST_PORT + os.getpid() % OWNERS * OWN_PORTS
    for _ in range(OWN_PORTS):
        port = first + next(_given) % OWN_PORTS
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError(f"the ports {first} to {first + OWN_PORTS - 1} are all taken")


class Mosquitto:
    """Runs Mosquitto with the given configuration lines, plus a listener on a free port.

    `file` may be replaced before the start; what it names must listen on `port`.
    """

    def __init__(self, *lines: str) -> None:
        self.host = "127.0.0.1"
        self.port = free_port()
        # Mosquitto started by root becomes another user, who must be able to read this.
        self.folder = Path(tempfile.mkdtemp(prefix="splitfleet-mosquitto-"))
        self.folder.chmod(0o755)
        self.log = self.folder / "log"
        self.file = self.folder / "mosquitto.conf"
        own = [f"listener {self.port} {self.host}", "set_tcp_nodelay true"]
        self.file.write_text("\n".join([*own, *lines]) + "\n")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"mqtt://{self.host}:{self.port}"

    def command(self) -> list[str]:
        """What starts it."""
        return [find_mosquitto(), "-c", str(self.file)]

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command(), stdout=log, stderr=log, start_new_session=True
            )
        self.wait_for(self.port)

    def wait_for(self, port: int) -> None:
        """Until it listens there."""
        assert self._process is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError):
                socket.create_connection((self.host, port), timeout=1).close()
                return
            time.sleep(0.01)
        self.stop()
        raise AssertionError(f"Mosquitto did not start: {self.log.read_text()}")

    def signal(self, number: int) -> None:
        """Send the running broker a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def end(self) -> None:
        """Ask it to end, and wait: what it keeps on disk is written."""
        self.signal(signal.SIGTERM)
        self.wait_ended()

    def wait_ended(self) -> int:
        """Until it has ended; its status."""
        assert self._process is not None
        status = self._process.wait(END_TIMEOUT_S)
        self._process = None
        return status

    def stop(self) -> None:
        """Kill it, and what it started."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(START_TIMEOUT_S)
            self._process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
        shutil.rmtree(self.folder)
