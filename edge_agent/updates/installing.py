"""Making a virtual environment of a bundle's wheels, without the network."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from edge_agent.errors import BundleError
from edge_agent.updates.bundle import BundleManifest

LONGEST_S = 3600.0
"""An installation that takes longer is given up; an SD card may need many minutes."""


class Installation(Protocol):
    """An installation under way."""

    def poll(self) -> bool:
        """Whether it is done. Raises BundleError when it has failed."""
        ...

    def cancel(self) -> None: ...


class VenvInstallation:
    """Installs ``wheels`` into ``place``, one command after the other, and looks whether it starts.

    ``python`` makes the environment. ``clock`` is monotonic, in seconds. What the commands say is
    in ``install.log`` beside the versions.
    """

    def __init__(
        self,
        manifest: BundleManifest,
        wheels: Path,
        place: Path,
        *,
        clock: Callable[[], float],
        python: str = sys.executable,
    ) -> None:
        self._clock = clock
        self._deadline = clock() + LONGEST_S
        self._log = place.parent.parent / "install.log"
        self._log.unlink(missing_ok=True)
        inside = str(place / "bin" / "python")
        wanted = f"{manifest.requirement}=={manifest.version}"
        pip = ("-m", "pip", "--no-input", "--disable-pip-version-check", "install", "--no-index")
        # What pip wrote must be on the disk before this version can be the one that is started.
        look = (
            "import ops.cli, os, importlib.metadata as m; "
            f"assert m.version('splitfleet') == {manifest.version!r}; os.sync()"
        )
        # pip goes along: Debian's Python cannot make it anew unless python3-venv is installed.
        bring_pip = (
            "import pip, shutil, sys, sysconfig; "
            "there = sysconfig.get_path('purelib', 'venv', {'base': sys.argv[1]}); "
            "shutil.copytree(pip.__path__[0], there + '/pip')"
        )
        self._commands = [
            [python, "-m", "venv", "--without-pip", str(place)],
            [python, "-P", "-c", bring_pip, str(place)],
            [inside, *pip, "--no-cache-dir", "--find-links", str(wheels), wanted],
            [inside, "-P", "-c", look],
        ]
        self._running: subprocess.Popen[bytes] | None = None

    def poll(self) -> bool:
        """See :class:`Installation`."""
        if self._running is not None:
            if self._clock() >= self._deadline:
                self.cancel()
                raise BundleError(f"the installation took longer than {LONGEST_S:g} s")
            code = self._running.poll()
            if code is None:
                return False
            self._running = None
            if code:
                raise BundleError(f"the installation failed: {self._last_words()}")
        if not self._commands:
            return True
        with self._log.open("ab") as log:
            self._running = subprocess.Popen(
                self._commands.pop(0),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        return False

    def cancel(self) -> None:
        """End it."""
        if self._running is not None:
            self._running.kill()
            self._running.wait()
        self._commands.clear()

    def _last_words(self) -> str:
        lines = self._log.read_text("utf-8", "replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
