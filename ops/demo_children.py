"""The processes of the demo: started with a pipe, watched, and ended with it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ops.errors import FleetFailed

POLL_S = 0.2
STOP_S = 20.0


@dataclass(frozen=True, slots=True)
class Child:
    """A process that ends when its standard input does."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def last_words(self) -> str:
        """The end of its log, for an error message."""
        try:
            lines = self.log.read_text("utf-8", "replace").strip().splitlines()
        except OSError:
            return ""
        return lines[-1] if lines else "it left no log"


def start(name: str, command: Sequence[str], log: Path, *, share_stderr: bool = False) -> Child:
    """Run a command of splitfleet; it writes to ``log``, or to this process's standard error."""
    with contextlib.ExitStack() as stack:
        errors: IO[bytes] | None = None if share_stderr else stack.enter_context(log.open("ab"))
        process = subprocess.Popen(
            [sys.executable, "-m", "ops.cli", *command, "--until-eof"],
            stdin=subprocess.PIPE,  # closed when this process ends, however it ends
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,  # Ctrl-C reaches this process, which then ends the others
        )
    return Child(name, process, log)


@contextlib.contextmanager
def ending(children: Sequence[Child]) -> Iterator[None]:
    """All of them have ended when this is left."""
    try:
        yield
    finally:
        for child in children:
            if child.process.poll() is None:
                child.process.terminate()
        deadline = time.monotonic() + STOP_S
        for child in children:
            try:
                child.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()


def watch(children: Sequence[Child], interrupted: Sequence[int], look: Callable[[], None]) -> None:
    """Wait for the end of the first, the coordinator; ``look`` is called now and then.

    Raises :class:`FleetFailed` if another comes first.
    """
    coordinator, agents = children[0], children[1:]
    while not interrupted:
        code = coordinator.process.poll()
        if code is not None:
            if code != 0:
                where = (
                    f"see {coordinator.log}" if coordinator.log.exists() else "its error is above"
                )
                raise FleetFailed(f"the coordinator ended with exit code {code}; {where}")
            break
        for agent in agents:
            if agent.process.poll():
                raise FleetFailed(
                    f"{agent.name} ended with exit code {agent.process.returncode}: "
                    f"{agent.last_words()} (all of it in {agent.log})"
                )
        look()
        time.sleep(POLL_S)
    if not interrupted:
        deadline = time.monotonic() + STOP_S
        while any(a.process.poll() is None for a in agents) and time.monotonic() < deadline:
            time.sleep(POLL_S)


def as_flags(values: Mapping[str, object]) -> list[str]:
    """Options of a command line; those without a value are left out."""
    return [
        part
        for key, value in values.items()
        if value is not None
        for part in (f"--{key}", str(value))
    ]
