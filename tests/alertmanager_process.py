"""A real Alertmanager for tests, free port, its own folder, gone at the end; and who it tells."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import pytest

from tests.mosquitto_process import free_port

START_TIMEOUT_S = 60.0
PROGRAM = "prometheus-alertmanager"


@contextlib.contextmanager
def alertmanager(folder: Path, configuration: str) -> Iterator[str]:
    """Runs with this alertmanager.yml; its address. Skips the test where it is not installed."""
    path = shutil.which(PROGRAM)
    if path is None:
        pytest.skip(f"{PROGRAM} is not installed: apt-get install {PROGRAM}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "alertmanager.yml").write_text(configuration)
    address = f"127.0.0.1:{free_port()}"
    command = [path, f"--config.file={folder / 'alertmanager.yml'}"]
    command += [f"--storage.path={folder / 'data'}", "--cluster.listen-address="]
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, f"--web.listen-address={address}"], stdout=output, stderr=output
        )
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _ready(address):
            failed = process.poll() is not None or time.monotonic() > deadline
            assert not failed, f"Alertmanager did not start:\n{log.read_text()[-2000:]}"
            time.sleep(0.1)
        yield address
    finally:
        process.kill()
        process.wait(60)


def _ready(address: str) -> bool:
    with contextlib.suppress(OSError):
        urllib.request.urlopen(f"http://{address}/-/ready", timeout=1).close()
        return True
    return False


class Receiver:
    """Alertmanager's webhook: remembers what it is told. To be entered."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._told: list[tuple[str, str]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever)
        self.url = f"http://127.0.0.1:{self._server.server_port}/"

    @property
    def told(self) -> list[tuple[str, str]]:
        """Alert (``name/severity``) and ``firing`` or ``resolved``, in order; with repetitions."""
        with self._lock:
            return list(self._told)

    @property
    def firing(self) -> set[str]:
        """What was told to fire, and not yet that it is over."""
        return {alert for alert, status in dict(self.told).items() if status == "firing"}

    def _hear(self, message: Mapping[str, Any]) -> None:
        with self._lock:
            for alert in message["alerts"]:
                labels = alert["labels"]
                self._told.append((f"{labels['alertname']}/{labels['severity']}", alert["status"]))

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hear = self._hear

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                hear(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        return Handler

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
