"""What is on a disk or in its image: partition tables read, never written."""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterator
from pathlib import Path

from ops.errors import DiskTrouble, SettingsWrong

SECTOR = 512
_FAT_TYPES = frozenset({0x01, 0x04, 0x06, 0x0B, 0x0C, 0x0E, 0xEF})
_GPT = 0xEE
_MOST_ENTRIES = 128
_WRAPPED = {
    b"QFI\xfb": "a QCOW2 image: qemu-img convert -O raw",
    b"\xfd7zXZ": "packed: unxz",
    b"\x1f\x8b": "packed: gunzip",
    b"PK\x03\x04": "packed: unzip",
    b"(\xb5/\xfd": "packed: unzstd",
    b"conectix": "a VHD image: qemu-img convert -O raw",
}


def boot_partition(image: Path) -> int:
    """The first sector of the first FAT partition; 0 if the whole of ``image`` is one.

    Raises :class:`SettingsWrong` if there is none.
    """
    try:
        with image.open("rb") as disk:
            first = disk.read(SECTOR)
            for magic, advice in _WRAPPED.items():
                if first.startswith(magic):
                    raise SettingsWrong(f"{image} is {advice} it first")
            if _is_fat(first):
                return 0
            entries = list(_mbr(first))
            if any(kind == _GPT for kind, _ in entries):
                disk.seek(SECTOR)
                header = disk.read(SECTOR)
                starts = _gpt(disk.read(_MOST_ENTRIES * 128), header)
            else:
                starts = [start for kind, start in entries if kind in _FAT_TYPES]
            for start in starts:
                disk.seek(start * SECTOR)
                if _is_fat(disk.read(SECTOR)):
                    return start
    except OSError as exc:
        raise DiskTrouble(f"cannot read {image}: {exc.strerror}") from exc
    raise SettingsWrong(f"{image} has no FAT partition: it is not the image of a card or a disk")


def check_not_in_use(image: Path, *, root: Path = Path("/")) -> None:
    """Refuse what is mounted, or is a disk that does not come out of this machine.

    ``root`` has ``proc/self/mountinfo`` and ``sys``. Raises :class:`SettingsWrong`.
    """
    try:
        found = image.stat()
    except OSError as exc:
        raise SettingsWrong(f"--image {image}: {exc.strerror}") from exc
    if stat.S_ISREG(found.st_mode):
        for backing in (root / "sys" / "block").glob("loop*/loop/backing_file"):
            if backing.read_text("utf-8").strip() == str(image.resolve()):
                raise SettingsWrong(
                    f"{image} is attached to {backing.parts[-3]}: unmount it and losetup -d it"
                )
        return
    if not stat.S_ISBLK(found.st_mode):
        raise SettingsWrong(f"--image {image} is neither a file nor a disk")
    block = root / "sys" / "class" / "block" / image.resolve().name
    if not (block / "removable").exists():
        raise SettingsWrong(f"--image {image} is a partition: name the whole disk")
    removable = (block / "removable").read_text("utf-8").strip() == "1"
    if not removable and not image.resolve().name.startswith("mmcblk"):
        raise SettingsWrong(
            f"--image {image} is a disk of this machine, not a card in a reader: write to the "
            "image first and copy that to the disk"
        )
    numbers = {_number(block), *(_number(part) for part in block.glob(f"{block.name}*"))}
    mounts = (root / "proc" / "self" / "mountinfo").read_text("utf-8").splitlines()
    for line in mounts:
        _, _, number, _, place, *_ = line.split(" ")
        if number in numbers:
            raise SettingsWrong(f"{image} is mounted at {place}: unmount it first")


def _number(block: Path) -> str:
    try:
        return (block / "dev").read_text("utf-8").strip()
    except OSError:
        return ""


def _is_fat(sector: bytes) -> bool:
    return sector[510:512] == b"\x55\xaa" and (
        sector[82:90] == b"FAT32   " or sector[54:59] in (b"FAT12", b"FAT16")
    )


def _mbr(sector: bytes) -> Iterator[tuple[int, int]]:
    """Types and first sectors of the four entries."""
    if sector[510:512] != b"\x55\xaa":
        return
    for place in range(446, 510, 16):
        kind, start = sector[place + 4], struct.unpack_from("<I", sector, place + 8)[0]
        if kind:
            yield kind, start


def _gpt(table: bytes, header: bytes) -> list[int]:
    """First sectors of the entries; the table is where it always is, after the header."""
    if header[:8] != b"EFI PART":
        return []
    count, size = struct.unpack_from("<II", header, 80)
    starts = []
    for place in range(0, min(count * size, len(table)), max(128, size)):
        entry = table[place : place + 128]
        if len(entry) == 128 and entry[:16] != bytes(16):
            starts.append(struct.unpack_from("<Q", entry, 32)[0])
    return starts
