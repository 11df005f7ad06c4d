"""A real Prometheus for tests: free port, its own folder, gone at the end."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from tests.mosquitto_process import free_port

START_TIMEOUT_S = 60.0


def need(program: str) -> str:
    """Path of a program of Prometheus' package; skips the test where it is not installed."""
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"{program} is not installed: apt-get install prometheus")
    return path


class Prometheus:
    """Scrapes ``jobs``, name → address, every ``interval_s``.

    ``configuration`` is YAML that goes under what this class writes: rule files, alerting.
    """

    def __init__(
        self,
        folder: Path,
        jobs: Mapping[str, str],
        *,
        interval_s: float = 1.0,
        configuration: str = "",
    ) -> None:
        self._program = need("prometheus")
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        every = f"{1000 * interval_s:.0f}ms"
        scraped = [
            {"job_name": job, "static_configs": [{"targets": [address]}]}
            for job, address in jobs.items()
        ]
        own = {
            "global": {"scrape_interval": every, "evaluation_interval": every},
            "scrape_configs": scraped,
        }
        lines = [f"{key}: {json.dumps(value)}" for key, value in own.items()]
        (folder / "prometheus.yml").write_text("\n".join([*lines, configuration]))
        self.address = f"127.0.0.1:{free_port()}"
        self.log = folder / "log"

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that an instant query gives now; raises :class:`BadQuery`."""
        return self._result("query", query=expression)

    def query_range(
        self, expression: str, start: float, end: float, step_s: float
    ) -> list[dict[str, Any]]:
        """The series between two Unix times; raises :class:`BadQuery`."""
        return self._result(
            "query_range", query=expression, start=str(start), end=str(end), step=str(step_s)
        )

    def label_values(self, name: str, label: str) -> list[str]:
        """What a label of a metric has been, as Grafana's variables ask for it."""
        return list(self._get(f"label/{label}/values", **{"match[]": name}))

    def _result(self, kind: str, **arguments: str) -> list[dict[str, Any]]:
        return list(self._get(kind, **arguments)["result"])

    def _get(self, what: str, **arguments: str) -> Any:
        asked = f"{what}?{urllib.parse.urlencode(arguments)}"
        try:
            with urllib.request.urlopen(
                f"http://{self.address}/api/v1/{asked}", timeout=30
            ) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as exc:
            raise BadQuery(json.load(exc)["error"]) from exc

    def __enter__(self) -> Self:
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    self._program,
                    f"--config.file={self._folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={self._folder / 'data'}",
                    f"--web.listen-address={self.address}",
                ],
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._ready():
            failed = self._process.poll() is not None or time.monotonic() > deadline
            assert not failed, f"Prometheus did not start:\n{self.log.read_text()[-2000:]}"
            time.sleep(0.1)
        return self

    def _ready(self) -> bool:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://{self.address}/-/ready", timeout=1).close()
            return True
        return False

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait(60)


class BadQuery(Exception):
    """Prometheus refused an expression."""
