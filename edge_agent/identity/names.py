"""What a device calls itself before anybody has named it: by the serial number of its board."""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass
from pathlib import Path

from edge_agent.errors import IdentityError

# Where boards say their serial number: the firmware of ARM boards, and of PCs (readable by root).
_SERIALS = ("proc/device-tree/serial-number", "sys/class/dmi/id/product_serial")
_MACHINE_ID = "etc/machine-id"
# What PCs say that were never given one.
_PLACEHOLDERS = re.compile(
    r"[0.\- ]*|x+|none|n/?a|empty|unknown|0?123456789a?|not (specified|available|applicable)"
    r"|default string|(system )?serial( number)?|to be filled by o\.?e\.?m\.?",
    re.IGNORECASE,
)
_MAX_SERIAL = 128
MAX_NAME = 59
_APPLICATION = b"splitfleet device name"


@dataclass(frozen=True, slots=True)
class Board:
    """``serial`` tells this machine from all others; ``from_board``: its maker gave it."""

    serial: str
    from_board: bool

    def device_name(self, prefix: str) -> str:
        """A name of at most 59 characters, which a certificate has room for (``back.NAME``).

        Serial numbers that differ only in characters no name may have get different names.
        """
        readable = re.sub(r"[^a-z0-9]+", "-", self.serial.lower()).strip("-")
        if readable != self.serial.lower() or len(prefix) + len(readable) > MAX_NAME:
            digest = hashlib.sha256(self.serial.encode()).hexdigest()[:12]
            readable = f"{readable[: MAX_NAME - len(prefix) - 13]}-{digest}".strip("-")
        return prefix + readable


def read_board(root: Path = Path("/")) -> Board:
    """The serial number of the machine whose files are in ``root``.

    Where its maker gave none, one is derived from its machine-id, which is not told itself
    (machine-id(5) asks for that).

    Raises :class:`IdentityError` if there is neither.
    """
    for name in _SERIALS:
        serial = _read(root / name)
        if serial and not _PLACEHOLDERS.fullmatch(serial):
            return Board(serial[:_MAX_SERIAL], from_board=True)
    machine_id = _read(root / _MACHINE_ID)
    if not re.fullmatch(r"[0-9a-f]{32}", machine_id):
        raise IdentityError(
            "this machine has neither a serial number nor a machine-id; name it in the settings, "
            "device = NAME, or make one with systemd-machine-id-setup"
        )
    digest = hmac.new(bytes.fromhex(machine_id), _APPLICATION, hashlib.sha256)
    return Board(digest.hexdigest()[:16], from_board=False)


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()[:1024]
    except OSError:
        return ""
    text = data.decode("ascii", errors="replace").strip("\0 \t\r\n")
    return text if text.isprintable() else ""
