from __future__ import annotations

import os
import shutil
import stat
import struct
import subprocess
from pathlib import Path

import pytest

from ops.errors import SettingsWrong
from ops.flash.partitions import SECTOR, boot_partition, check_not_in_use

FAT = b"\xeb\x58\x90" + bytes(79) + b"FAT32   " + bytes(420) + b"\x55\xaa"
START = 2048


def mbr(*entries: tuple[int, int]) -> bytes:
    sector = bytearray(SECTOR)
    for number, (kind, start) in enumerate(entries):
        struct.pack_into("<BxxxBxxxII", sector, 446 + 16 * number, 0, kind, start, 100)
    sector[510:] = b"\x55\xaa"
    return bytes(sector)


def write_disk(path: Path, sectors: dict[int, bytes]) -> Path:
    with path.open("wb") as disk:
        for number, data in sectors.items():
            disk.seek(number * SECTOR)
            disk.write(data)
    return path


def test_the_first_fat_partition_of_an_mbr_is_found(tmp_path: Path) -> None:
    table = mbr((0x83, 64), (0x0C, START), (0x0C, 4096))
    assert boot_partition(write_disk(tmp_path / "a.img", {0: table, START: FAT})) == START


def test_the_fat_partition_of_a_gpt_is_found_whatever_its_type(tmp_path: Path) -> None:
    header = b"EFI PART" + bytes(72) + struct.pack("<II", 128, 128)
    entries = bytearray(128 * 128)
    for place, start in ((0, 100), (128, START)):
        entries[place : place + 16] = b"\x01" * 16
        struct.pack_into("<Q", entries, place + 32, start)
    sectors = {0: mbr((0xEE, 1)), 1: header, 2: bytes(entries), 100: b"ext4", START: FAT}
    assert boot_partition(write_disk(tmp_path / "a.img", sectors)) == START


def test_a_file_system_of_its_own_begins_at_the_beginning(tmp_path: Path) -> None:
    assert boot_partition(write_disk(tmp_path / "a.img", {0: FAT})) == 0


@pytest.mark.parametrize(
    ("first", "says"),
    [
        (b"QFI\xfb", "qemu-img convert"),
        (b"\xfd7zXZ\0", "unxz"),
        (b"\x1f\x8b\x08", "gunzip"),
        (b"", "no FAT partition"),
        (bytes(4096), "no FAT partition"),
        (mbr((0x83, START)), "no FAT partition"),
        (mbr((0x0C, START)), "no FAT partition"),
        (mbr((0xEE, 1)), "no FAT partition"),
    ],
)
def test_what_has_no_boot_partition_is_refused(tmp_path: Path, first: bytes, says: str) -> None:
    with pytest.raises(SettingsWrong, match=says):
        boot_partition(write_disk(tmp_path / "a.img", {0: first}))


@pytest.mark.skipif(shutil.which("sfdisk") is None, reason="needs sfdisk")
def test_tables_are_read_as_sfdisk_writes_them(tmp_path: Path) -> None:
    for label, kind in (("dos", "c"), ("gpt", "U")):
        image = tmp_path / label
        with image.open("wb") as disk:
            disk.truncate(16 << 20)
        table = f"label: {label}\nstart={START}, size=4096, type={kind}\n"
        subprocess.run(["sfdisk", "-q", str(image)], input=table, text=True, check=True)
        with image.open("r+b") as disk:
            disk.seek(START * SECTOR)
            disk.write(FAT)
        assert boot_partition(image) == START


class Machine:
    """``/proc`` and ``/sys`` of a machine with a disk, ``sda``, and a card in a reader, ``sdb``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name, number, removable in (("sda", "8:0", "0"), ("sdb", "8:16", "1")):
            block = root / "sys" / "class" / "block" / name
            (block / f"{name}1").mkdir(parents=True)
            (block / "removable").write_text(f"{removable}\n")
            (block / "dev").write_text(f"{number}\n")
            (block / f"{name}1" / "dev").write_text(f"{number[:-1]}{int(number[-1]) + 1}\n")
        (root / "proc" / "self").mkdir(parents=True)
        self.mount("8:1", "/")

    def mount(self, number: str, place: str) -> None:
        with (self.root / "proc" / "self" / "mountinfo").open("a") as mounts:
            mounts.write(f"22 1 {number} / {place} rw,relatime shared:1 - ext4 /dev/sda1 rw\n")

    def check(self, disk: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """As if the node were a block device."""
        node = self.root / "dev" / disk
        node.parent.mkdir(exist_ok=True)
        node.touch()
        real, found = Path.stat, list(node.stat())
        found[0] = stat.S_IFBLK | 0o660

        def fake(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
            if path == node:
                return os.stat_result(found)
            return real(path, follow_symlinks=follow_symlinks)

        monkeypatch.setattr(Path, "stat", fake)
        try:
            check_not_in_use(node, root=self.root)
        finally:
            monkeypatch.undo()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "root")


def test_a_card_in_a_reader_may_be_written_unless_it_is_mounted(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.check("sdb", monkeypatch)
    machine.mount("8:17", "/media/card")
    with pytest.raises(SettingsWrong, match="mounted at /media/card: unmount it"):
        machine.check("sdb", monkeypatch)


def test_a_disk_of_this_machine_is_refused(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SettingsWrong, match="disk of this machine"):
        machine.check("sda", monkeypatch)


def test_a_partition_is_refused(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsWrong, match="name the whole disk"):
        machine.check("sdb1", monkeypatch)


def test_an_image_that_is_attached_is_refused(tmp_path: Path) -> None:
    image = write_disk(tmp_path / "a.img", {0: FAT})
    loop = tmp_path / "sys" / "block" / "loop7" / "loop"
    loop.mkdir(parents=True)
    (loop / "backing_file").write_text(f"{image.resolve()}\n")
    with pytest.raises(SettingsWrong, match=r"loop7.*losetup -d"):
        check_not_in_use(image, root=tmp_path)
    (loop / "backing_file").write_text("/another.img\n")
    check_not_in_use(image, root=tmp_path)


def test_what_is_neither_file_nor_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsWrong, match="neither a file nor a disk"):
        check_not_in_use(tmp_path)
    with pytest.raises(SettingsWrong, match="No such file"):
        check_not_in_use(tmp_path / "none.img")
