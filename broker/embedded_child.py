"""The process in which `broker.embedded` runs iotcore. Not for anybody else.

Arguments: the process id of the parent, and the configuration as TOML text.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

PARENT_POLL_S = 0.5


def _end_with(parent: int) -> None:
    # Asking for the parent's id works on Linux and macOS, also after kill -9 of the parent.
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_S)
    os._exit(0)


def main(parent: int, configuration: str) -> None:
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    from iotcore.iotcore import IotCoreBroker

    logging.basicConfig(level="WARNING", format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # The broker marks the spans of ordinary packets as errors.
    logging.getLogger("rumqttd").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "broker.toml")
        file.write_text(configuration, encoding="utf-8")
        broker = IotCoreBroker(config_path=str(file))  # reads the file here, once
    broker.run_forever()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
