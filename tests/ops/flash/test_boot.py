"""From an image to a device of the fleet: flashed by the product, booted without any help."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from ops.flash.partitions import SECTOR
from ops.flash.targets import BootPartition
from ops.identity import FleetFolder, init_fleet
from tests.fleet_listener import Listener
from tests.mosquitto_process import free_port
from tests.ops.flash.debian_image import (
    BOOT_SECTORS,
    BOOT_START,
    copy_image,
    debian_image,
    missing_programs,
)
from tests.ops.flash.virtual_machine import HOST, QEMU, VirtualMachine

FLEET = "lab"
DEBIAN = ["--class", "generic", "--machine", "x86_64", "--python", "3.11"]
COMMAND_TIMEOUT_S = 600.0
ONLINE_S = float(os.environ.get("SPLITFLEET_TEST_BOOT_S", "900"))
"""It takes four minutes on a machine that has nothing else to do."""
WIPED_S = 300.0

missing = missing_programs(QEMU)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(ONLINE_S + WIPED_S + 1800),
    pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}"),
    pytest.mark.skipif(os.getuid() != 0, reason="only root can lay out a Debian system"),
]


def command(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ops.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=COMMAND_TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr


@contextmanager
def running(log: Path, *arguments: str) -> Iterator[None]:
    with log.open("wb") as out:
        process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    try:
        yield
    finally:
        process.terminate()
        process.wait(100)


def wait_for(condition: Callable[[], bool], machine: VirtualMachine, what: str, s: float) -> None:
    deadline = time.monotonic() + s
    while not condition():
        assert machine.running, f"it has ended:\n{machine.said()}"
        assert time.monotonic() < deadline, f"not {what} after {s:.0f} s:\n{machine.said()}"
        time.sleep(0.5)


def boot_partition_of(disk: Path) -> bytes:
    with disk.open("rb") as file:
        file.seek(BOOT_START * SECTOR)
        return file.read(BOOT_SECTORS * SECTOR)


@pytest.fixture(scope="module")
def wheelhouse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheels of a lite agent, and the project's own as it is here."""
    folder = tmp_path_factory.mktemp("wheels")
    own = folder / "own"
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(own)]
    project = Path(__file__).parents[3]
    subprocess.run([*build, str(project)], check=True, timeout=COMMAND_TIMEOUT_S)
    house = folder / "house"
    lite = [*DEBIAN, "--engine", "onnxruntime"]
    command("wheelhouse", str(house), *lite, "--from", str(own))
    return house


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[FleetFolder]:
    """A fleet whose broker and coordinator run on this machine."""
    port = free_port()
    with ExitStack() as stack:
        made = stack.enter_context(
            init_fleet(
                tmp_path / "fleet",
                FLEET,
                broker_names=[HOST, "127.0.0.1"],
                port=port,
                claims_port=free_port(),
                loopback_port=free_port(),
            )
        )
        stack.enter_context(running(tmp_path / "broker.log", str(made.broker_dir / "run.sh")))
        own = ["coordinator", "--config", str(made.coordinator_config)]
        own += ["--broker", f"mqtts://127.0.0.1:{port}", "--min-devices", "2"]
        stack.enter_context(
            running(tmp_path / "coordinator.log", sys.executable, "-m", "ops.cli", *own)
        )
        yield made


def test_a_flashed_image_boots_enrols_comes_online_and_keeps_no_secret(
    tmp_path: Path, fleet: FleetFolder, wheelhouse: Path
) -> None:
    image, disk = debian_image(), tmp_path / "disk.img"
    copy_image(image.disk, disk)
    token = fleet.write_token(uses=2, days=1, out=tmp_path / "token.pem")
    secret = token.read_text().rpartition("KEY")[0].splitlines()[-3].encode()
    flash = ["flash", "--image", str(disk), "--folder", str(fleet.folder), "--token", str(token)]
    command(*flash, *DEBIAN, "--engine", "onnxruntime", "--wheelhouse", str(wheelhouse))
    assert secret in boot_partition_of(disk)

    url = f"mqtt://127.0.0.1:{fleet.fleet.settings.loopback_port}"
    with (
        Listener(url, FLEET) as hears,
        VirtualMachine(image, disk, tmp_path / "serial.log", serial="LAB0042") as machine,
    ):
        wait_for(lambda: bool(hears.status), machine, "online", ONLINE_S)
        (device,) = hears.status
        assert hears.state_of(device) == "online"
        assert [member.name for member in fleet.fleet.roster.devices()] == [device]
        wait_for(
            lambda: machine.says(["Finished splitfleet-first-boot"]), machine, "wiped", WIPED_S
        )
    partition = BootPartition(disk)
    assert partition.below("splitfleet") == set()
    assert partition.read("cmdline.txt") is not None
    assert secret not in boot_partition_of(disk)
