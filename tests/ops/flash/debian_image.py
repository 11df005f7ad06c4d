"""A Debian image as a Raspberry Pi's is: a FAT boot partition with the seed, and an ext4 root.

Made once from Debian's packages and kept in ``~/.cache/splitfleet-flash``, without a loop mount.
QEMU gets kernel and initial RAM disk by hand: this image has no boot loader.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

SUITE = "bookworm"
PACKAGES = (
    "ca-certificates,cloud-init,dbus,e2fsprogs,iproute2,kmod,linux-image-cloud-amd64,python3,"
    "systemd-resolved,systemd-sysv,systemd-timesyncd,udev"
)
PROGRAMS = {
    "mmdebstrap": "mmdebstrap",
    "mkfs.ext4": "e2fsprogs",
    "mkfs.vfat": "dosfstools",
    "mcopy": "mtools",
    "sfdisk": "fdisk",
}
SECTOR = 512
BOOT_START, BOOT_SECTORS = 2048, 256 * 2048
ROOT_START, ROOT_SECTORS = BOOT_START + BOOT_SECTORS, 4096 * 2048
MAKING_TIMEOUT_S = 1200.0
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

FILES = {
    "etc/fstab": "LABEL=rootfs / ext4 rw 0 1\nLABEL=bootfs /boot/firmware vfat rw,umask=0022 0 2\n",
    # What Raspberry Pi OS has; cloud-init 22.4 does not add the last slash itself.
    "etc/cloud/cloud.cfg.d/99_raspberry-pi.cfg": (
        "datasource_list: [ NoCloud, None ]\n"
        "datasource:\n  NoCloud:\n    seedfrom: file:///boot/firmware/\n"
        "network: {config: disabled}\n"
    ),
    "etc/systemd/network/80-wired.network": "[Match]\nType=ether\n[Network]\nDHCP=yes\n",
    "etc/hostname": "raspberrypi\n",
    "boot/firmware/.keep": "",
}
SERVICES = (
    ("multi-user.target", "systemd-networkd.service"),
    ("network-online.target", "systemd-networkd-wait-online.service"),
)
BOOT_FILES = {
    "cmdline.txt": "console=serial0,115200 root=PARTUUID=00000000-02 rootwait\n",
    "config.txt": "arm_64bit=1\n",
    "meta-data": "instance_id: rpios-image\n",
    "network-config": "# an example\n",
    "user-data": "#cloud-config\n# an example\n",
}


@dataclass(frozen=True)
class DebianImage:
    """Paths; ``disk`` is to be copied before it is written to."""

    disk: Path
    kernel: Path
    initrd: Path


def missing_programs(*more: str) -> list[str]:
    """Those of the programs needed that this machine lacks."""
    wanted = [*PROGRAMS, *more]
    return [program for program in wanted if shutil.which(program, path=PATH) is None]


def debian_image() -> DebianImage:
    """The image of the cache, made first if need be."""
    recipe = Path(__file__).read_bytes()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "splitfleet-flash"
    folder = cache / hashlib.sha256(recipe).hexdigest()[:16]
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as building:
            whole = Path(building) / "whole"
            whole.mkdir()
            _make(whole, Path(building) / "root")
            whole.rename(folder)
    return DebianImage(folder / "disk.img", folder / "vmlinuz", folder / "initrd.img")


def copy_image(source: Path, target: Path) -> None:
    """Copy a disk image and leave its holes holes."""
    _run("cp", "--sparse=always", str(source), str(target))


def _make(folder: Path, root: Path) -> None:
    _run(
        "mmdebstrap",
        "--quiet",
        "--variant=minbase",
        f"--include={PACKAGES}",
        '--aptopt=Acquire::Languages "none"',
        "--dpkgopt=path-exclude=/usr/share/doc/*",
        "--dpkgopt=path-exclude=/usr/share/locale/*",
        "--dpkgopt=path-exclude=/usr/share/man/*",
        SUITE,
        str(root),
    )
    for name, text in FILES.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    units = root / "etc/systemd/system"
    for target, unit in SERVICES:
        (units / f"{target}.wants").mkdir(exist_ok=True)
        (units / f"{target}.wants" / unit).symlink_to(f"/lib/systemd/system/{unit}")
    for name in ("vmlinuz", "initrd.img"):
        shutil.copyfile(next(root.glob(f"boot/{name}-*")), folder / name)
    _write_disk(folder / "disk.img", root)


def _write_disk(disk: Path, root: Path) -> None:
    with disk.open("wb") as file:
        file.truncate((ROOT_START + ROOT_SECTORS) * SECTOR)
    table = (
        "label: dos\n"
        f"start={BOOT_START}, size={BOOT_SECTORS}, type=c\n"
        f"start={ROOT_START}, size={ROOT_SECTORS}, type=83\n"
    )
    _run("sfdisk", "--quiet", str(disk), text=table)
    fat = ["mkfs.vfat", "-F", "32", "-s", "4", "-n", "bootfs", f"--offset={BOOT_START}"]
    _run(*fat, str(disk), str(BOOT_SECTORS * SECTOR // 1024))
    for name, text in BOOT_FILES.items():
        _run("mcopy", "-i", f"{disk}@@{BOOT_START * SECTOR}", "-", f"::{name}", text=text)
    ext4 = ["mkfs.ext4", "-q", "-F", "-L", "rootfs", "-d", str(root)]
    place = ["-E", f"offset={ROOT_START * SECTOR},lazy_itable_init=1"]
    _run(*ext4, *place, str(disk), f"{ROOT_SECTORS * SECTOR // 1024}k")


def _run(*command: str, text: str | None = None) -> None:
    done = subprocess.run(
        command,
        input=text,
        stdin=subprocess.DEVNULL if text is None else None,
        capture_output=True,
        text=True,
        timeout=MAKING_TIMEOUT_S,
        env=os.environ | {"PATH": PATH},
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
