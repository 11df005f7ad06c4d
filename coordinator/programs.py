"""Programs for devices that compute their half of the network without torch, and never train it.

A program has no parameters in it: those are sent as to everybody else, so one is enough for a run.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any

import msgpack

from broker.envelopes import Envelope, down
from broker.fields import MAX_PROGRAM_BYTES
from broker.messages import Program
from coordinator.errors import ProgramUnavailable
from tensors.networks import NetworkSpec

log = logging.getLogger("splitfleet.coordinator")

MAKING_S = 600.0
"""How long the making of a program may take."""

Making = Callable[[int], "Future[dict[str, Any]]"]
"""Begins to make the program for a cut: its ``graph`` and ``parameters`` as in :class:`Program`.

The future raises :class:`ProgramUnavailable`.
"""


class Programs:
    """The programs of a run, each made when the first device asks for it."""

    def __init__(self, run: str, make: Making) -> None:
        self._run = run
        self._make = make
        self._made: dict[int, Future[dict[str, Any]]] = {}

    def answer(self, device: str, cut: int) -> list[Envelope]:
        """The program for a cut; nothing while it is being made, for the device asks again."""
        if cut not in self._made:
            self._made[cut] = self._make(cut)
        making = self._made[cut]
        if not making.done():
            return []
        try:
            found = Program(run=self._run, cut=cut, **making.result())
        except ProgramUnavailable as exc:
            log.error("no program for %s: %s", device, exc, extra={"device": device})  # noqa: TRY400
            found = Program(run=self._run, cut=cut, refused=str(exc)[:256])
        return [down(device, found)]


def make_in_child(spec: NetworkSpec) -> Making:
    """Makes programs of this network in a process of their own; see ``tensors.programs``."""

    def begin(cut: int) -> Future[dict[str, Any]]:
        making: Future[dict[str, Any]] = Future()

        def wait() -> None:
            try:
                making.set_result(_make(spec, cut))
            except BaseException as exc:  # noqa: BLE001 the future's to raise
                making.set_exception(exc)

        log.info("making the program for cut layer %d", cut)
        threading.Thread(target=wait, name=f"program-{cut}", daemon=True).start()
        return making

    return begin


def make_none(cut: int) -> Future[dict[str, Any]]:
    """For a coordinator whose network is none of torch's."""
    making: Future[dict[str, Any]] = Future()
    making.set_exception(ProgramUnavailable(f"its network has none for cut layer {cut}"))
    return making


def _make(spec: NetworkSpec, cut: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tensors.programs", str(cut)]
    where = {"PYTHONPATH": os.pathsep.join(place for place in sys.path if place)}
    try:
        done = subprocess.run(
            command,
            input=json.dumps(asdict(spec)).encode(),
            capture_output=True,
            env=os.environ | where,
            timeout=MAKING_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise ProgramUnavailable(f"it cannot be made: {exc}") from exc
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise ProgramUnavailable(lines[-1] if lines else f"exit code {done.returncode}")
    made: dict[str, Any] = msgpack.unpackb(done.stdout)
    if len(made["graph"]) > MAX_PROGRAM_BYTES:
        raise ProgramUnavailable(f"it has {len(made['graph'])} bytes, {MAX_PROGRAM_BYTES} at most")
    return made
