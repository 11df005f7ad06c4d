"""Where a device's files are written: a boot partition that is mounted, or one within an image.

Both are looked at before anything is written, and refused if they are not what they should be.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path, PurePosixPath
from typing import Protocol

from ops.errors import DiskTrouble, SettingsWrong
from ops.flash.partitions import SECTOR, boot_partition, check_not_in_use

PI_BOOT = "cmdline.txt"
"""On the boot partitions of Raspberry Pi OS and of Ubuntu for the Raspberry Pi."""
SEED_LABEL = "CIDATA"
"""cloud-init looks for its seed on file systems of this label, whatever boots the machine."""
MTOOLS_TIMEOUT_S = 600.0


class Target(Protocol):
    """A file system; paths are relative to its root, with forward slashes."""

    def read(self, path: str) -> bytes | None:
        """A file's bytes; None if there is none."""
        ...

    def below(self, folder: str) -> set[str]:
        """The files below a folder."""
        ...

    @property
    def free(self) -> int:
        """Bytes that can still be written."""
        ...

    def write(self, path: str, data: bytes) -> None:
        """Write or replace a file, with the folders above it. Raises :class:`DiskTrouble`."""
        ...

    def remove(self, path: str) -> None:
        """Remove a file. Raises :class:`DiskTrouble`."""
        ...


class BootFolder:
    """A mounted boot partition.

    Raises :class:`SettingsWrong` for a folder that does not look like one, or is this machine's.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        if not root.is_dir():
            raise SettingsWrong(f"--boot-dir {root} is no folder: mount the boot partition there")
        own = ("/", "/boot", "/boot/firmware", "/boot/efi")
        if any(os.path.exists(place) and root.samefile(place) for place in own):  # noqa: PTH110
            raise SettingsWrong(f"--boot-dir {root} is this machine's own: name the card's")
        names = {path.name for path in root.iterdir()}
        if not names & {PI_BOOT, "meta-data"} and not (os.path.ismount(root) and not names):
            raise SettingsWrong(
                f"--boot-dir {root} does not look like a boot partition: it has neither {PI_BOOT} "
                "nor meta-data, nor is it a mounted, empty file system; is the card mounted?"
            )

    def read(self, path: str) -> bytes | None:
        """See :class:`Target`."""
        try:
            return (self.root / path).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise DiskTrouble(f"cannot read {self.root / path}: {exc.strerror}") from exc

    def below(self, folder: str) -> set[str]:
        """See :class:`Target`."""
        found = (self.root / folder).rglob("*")
        return {path.relative_to(self.root).as_posix() for path in found if not path.is_dir()}

    @property
    def free(self) -> int:
        """See :class:`Target`."""
        return shutil.disk_usage(self.root).free

    def write(self, path: str, data: bytes) -> None:
        """See :class:`Target`."""
        file = self.root / path
        temporary = file.with_name(f".{file.name}.new")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            with open(os.open(temporary, flags, 0o600), "wb") as out:  # noqa: PTH123 of a descriptor
                out.write(data)
                out.flush()
                os.fsync(out.fileno())
            temporary.replace(file)
        except OSError as exc:
            temporary.unlink(missing_ok=True)
            raise DiskTrouble(f"cannot write {file}: {exc.strerror}") from exc

    def remove(self, path: str) -> None:
        """See :class:`Target`."""
        try:
            (self.root / path).unlink()
        except OSError as exc:
            raise DiskTrouble(f"cannot remove {self.root / path}: {exc.strerror}") from exc


class BootPartition:
    """The FAT boot partition of a disk image, or of a card in a reader, written by mtools.

    Nothing is mounted, and it takes no privileges but to write to the image.

    Raises :class:`SettingsWrong` for an image that has none, or that is in use.
    """

    def __init__(self, image: Path) -> None:
        if shutil.which("mcopy") is None:
            raise SettingsWrong("--image needs mtools: install the package mtools")
        check_not_in_use(image)
        self.image = image
        self._folders: set[PurePosixPath] = set()
        self._drive = f"{image}@@{boot_partition(image) * SECTOR}"
        if self.read(PI_BOOT) is None and self._label() != SEED_LABEL:
            raise SettingsWrong(
                f"the FAT partition of {image} is not where cloud-init looks for a seed: it has no "
                f"{PI_BOOT} and is not labelled {SEED_LABEL}; write to an image of its own for "
                f"this one (mkfs.vfat -C -n {SEED_LABEL} seed.img 524288) and attach both"
            )

    def read(self, path: str) -> bytes | None:
        """See :class:`Target`."""
        done = self._mtools("mcopy", "-n", _fat(path), "-", check=False)
        return done.stdout if done.returncode == 0 else None

    def below(self, folder: str) -> set[str]:
        """See :class:`Target`."""
        done = self._mtools("mdir", "-/", "-b", "-a", _fat(folder), check=False)
        lines = done.stdout.decode("utf-8", "replace").splitlines()
        names = (line.removeprefix("::").lstrip("/") for line in lines)
        return {name for name in names if name and not name.endswith("/")}

    @property
    def free(self) -> int:
        """See :class:`Target`."""
        said = self._mtools("mdir", _fat("")).stdout.decode("utf-8", "replace")
        line = next(line for line in said.splitlines() if line.endswith("bytes free"))
        return int("".join(char for char in line if char.isdecimal()))

    def write(self, path: str, data: bytes) -> None:
        """See :class:`Target`."""
        for parent in reversed(PurePosixPath(path).parents[:-1]):
            if parent not in self._folders:
                self._mtools("mmd", "-D", "s", _fat(str(parent)), check=False)
                self._folders.add(parent)
        self._mtools("mcopy", "-o", "-", _fat(path), data=data)

    def remove(self, path: str) -> None:
        """See :class:`Target`."""
        self._mtools("mdel", _fat(path))

    def _label(self) -> str:
        said = self._mtools("mlabel", "-s", "::", check=False).stdout.decode("utf-8", "replace")
        return said.rpartition(" is ")[2].split("(")[0].strip().upper()

    def _mtools(
        self, program: str, *arguments: str, data: bytes = b"", check: bool = True
    ) -> subprocess.CompletedProcess[bytes]:
        try:
            done = subprocess.run(
                [program, "-i", self._drive, *arguments],
                input=data,
                capture_output=True,
                check=False,
                timeout=MTOOLS_TIMEOUT_S,
                # An image need not have the size that its partitions were made for.
                env=os.environ | {"MTOOLS_SKIP_CHECK": "1", "LC_ALL": "C.UTF-8"},
            )
        except subprocess.TimeoutExpired:
            raise DiskTrouble(
                f"{program} has not finished in {MTOOLS_TIMEOUT_S:g} s on {self.image}"
            ) from None
        if check and done.returncode:
            said = done.stderr.decode("utf-8", "replace").strip()
            raise DiskTrouble(f"{program} on {self.image}: {said}")
        return done


def _fat(path: str) -> str:
    return f"::/{path}"
