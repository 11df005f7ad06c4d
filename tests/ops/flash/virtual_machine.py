"""A virtual machine in QEMU that boots a disk image as a board boots its card."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.ops.flash.debian_image import DebianImage

QEMU = "qemu-system-x86_64"
JOURNAL = "systemd.journald.forward_to_console=1"
HOST = "10.0.2.2"
"""This machine, as the virtual one sees it."""


class VirtualMachine:
    """Runs ``disk``, which it writes to; what it says on its serial line is in ``log``.

    Its processor is emulated: it takes minutes where a board takes seconds.
    """

    def __init__(self, image: DebianImage, disk: Path, log: Path, *, serial: str) -> None:
        self.log = log
        self._command = [
            QEMU, "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "1024",
            "-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot",
            "-smbios", f"type=1,serial={serial}",
            "-kernel", str(image.kernel), "-initrd", str(image.initrd),
            "-append", f"console=ttyS0 no_timer_check root=/dev/vda2 rw quiet {JOURNAL}",
            "-drive", f"file={disk},format=raw,if=virtio,cache=unsafe",
            "-nic", "user,model=virtio-net-pci",
            "-device", "virtio-rng-pci",
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    @property
    def running(self) -> bool:
        """Whether it has not ended by itself."""
        return self._process is not None and self._process.poll() is None

    def said(self, lines: int = 60) -> str:
        """The last it said."""
        return "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-lines:])

    def says(self, words: Sequence[str]) -> bool:
        """Whether it has said all of these."""
        text = self.log.read_text("utf-8", "replace")
        return all(word in text for word in words)
