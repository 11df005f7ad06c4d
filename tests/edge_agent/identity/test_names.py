from __future__ import annotations

from pathlib import Path

import pytest

from broker.topics import check_device
from edge_agent.errors import IdentityError
from edge_agent.identity.names import MAX_NAME, Board, read_board

PI, PC = "proc/device-tree/serial-number", "sys/class/dmi/id/product_serial"
MACHINE_ID = "0123456789abcdef0123456789abcdef"


def machine(root: Path, **files: bytes) -> Path:
    for name, content in {PI: files.get("pi"), PC: files.get("pc")}.items():
        if content is not None:
            (root / name).parent.mkdir(parents=True)
            (root / name).write_bytes(content)
    (root / "etc").mkdir()
    (root / "etc/machine-id").write_bytes(files.get("machine_id", f"{MACHINE_ID}\n".encode()))
    return root


def test_a_raspberry_pi_is_called_by_its_serial_number(tmp_path: Path) -> None:
    board = read_board(machine(tmp_path, pi=b"10000000A1B2C3D4\0"))
    assert board == Board("10000000A1B2C3D4", from_board=True)
    assert board.device_name("pi-") == "pi-10000000a1b2c3d4"


def test_a_pc_is_called_by_the_serial_number_of_its_firmware(tmp_path: Path) -> None:
    assert read_board(machine(tmp_path, pc=b"PF2ABC9K\n")).device_name("") == "pf2abc9k"


@pytest.mark.parametrize(
    "serial",
    [
        b"",
        b"\0",
        b"0000000000000000\0",
        b"To Be Filled By O.E.M.\n",
        b"Default string\n",
        b"System Serial Number",
        b"Not Specified",
        b"None",
        b"123456789",
        b"bell\x07",
    ],
)
def test_what_no_maker_has_given_is_no_serial_number(tmp_path: Path, serial: bytes) -> None:
    board = read_board(machine(tmp_path, pc=serial))
    assert not board.from_board
    assert MACHINE_ID not in board.serial


def test_a_machine_id_gives_the_same_name_every_time_and_another_to_others(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = read_board(machine(tmp_path / "a"))
    other = read_board(machine(tmp_path / "b", machine_id=b"f" * 32))
    assert first == read_board(tmp_path / "a")
    assert first.device_name("d-") != other.device_name("d-")


@pytest.mark.parametrize("machine_id", [b"", b"uninitialized\n", b"zz"])
def test_a_machine_without_either_says_what_to_do(tmp_path: Path, machine_id: bytes) -> None:
    with pytest.raises(IdentityError, match="device = NAME"):
        read_board(machine(tmp_path, machine_id=machine_id))


@pytest.mark.parametrize(
    "serial", ["VMware-56 4d 3a/77", "x" * 300, "ABC/1", "ABC 1", "ABC-1", "--", "é"]
)
@pytest.mark.parametrize("prefix", ["", "device-", "p" * 32])
def test_any_serial_number_makes_a_name_that_a_certificate_can_bear(
    serial: str, prefix: str
) -> None:
    name = Board(serial, from_board=True).device_name(prefix)
    assert check_device(name) == name
    assert len(name) <= MAX_NAME
    assert name.startswith(prefix)


def test_serial_numbers_that_look_alike_in_a_name_stay_apart() -> None:
    serials = ["ABC/1", "ABC 1", "ABC_1", "abc-1", "x" * 100, "x" * 101]
    assert len({Board(s, from_board=True).device_name("d-") for s in serials}) == len(serials)
