"""An agent's HTTP API over answers that are made up, on a real port."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import threading
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edge_agent.answers import Answer
from edge_agent.enquiries import Health
from edge_agent.http_api import HttpApi, Limits
from edge_agent.http_server import listen, serve_http
from edge_agent.pictures import PictureSpec

CLASSES = ("dark", "grey", "bright")


@dataclass
class FakeAnswerer:
    """Tells how bright pictures are; sure only of the bright ones.

    Until ``gate`` is set it does not answer; ``error`` is raised instead of an answer.
    """

    gate: asyncio.Event | None = None
    error: Exception | None = None
    ready: bool = True
    asked: list[tuple[int, float | None]] = field(default_factory=list)
    cancelled: int = 0
    pictures: PictureSpec = field(
        default_factory=lambda: PictureSpec(size=8, channels=1, mean=(0.0,), std=(1.0,))
    )

    async def predict(
        self, images: NDArray[np.float32], *, deadline_s: float | None = None
    ) -> Answer:
        self.asked.append((len(images), deadline_s))
        try:
            if self.gate is not None:
                await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        mean = images.mean(axis=(1, 2, 3))
        labels = np.digitize(mean, [1 / 3, 2 / 3]).astype(np.int64)
        probabilities = np.full((len(images), 3), 0.1, np.float32)
        probabilities[np.arange(len(images)), labels] = 0.8
        return Answer(
            labels=labels,
            probabilities=probabilities,
            by=tuple(("server", "fallback", "exit")[label] for label in labels),
            confidence=np.where(labels == 2, 0.9, 0.4),
            reasons=tuple("timeout" if label == 1 else None for label in labels),
            version=7,
            run="run-1",
            seconds={"queue": 0.001, "exit": 0.002, "total": 0.004},
        )

    async def health(self) -> Health:
        if self.error is not None:
            raise self.error
        return Health(
            run="run-1" if self.ready else None,
            version=7 if self.ready else None,
            cut=2,
            online=True,
            waiting=1,
            open=2,
            threshold=0.5,
            threshold_in_force=0.75,
            drift=None,
            expected_round_trip_s=None,
        )


def picture(brightness: int = 255, *, size: int = 20, kind: str = "PNG", mode: str = "L") -> bytes:
    """A picture of one colour."""
    buffer = io.BytesIO()
    Image.new(
        mode, (size, size), color=tuple([brightness] * len(mode)) if len(mode) > 1 else brightness
    ).save(buffer, kind)
    return buffer.getvalue()


@contextlib.asynccontextmanager
async def serving(
    answerer: FakeAnswerer, *, token: str | None = None, limits: Limits | None = None
) -> AsyncIterator[int]:
    """Its port."""
    api = HttpApi(answerer, CLASSES, token=token, limits=limits)
    async with serve_http(api, listen("127.0.0.1", 0)) as port:
        yield port


@contextlib.contextmanager
def serving_in_thread(answerer: FakeAnswerer, **given: Any) -> Iterator[int]:
    """The same for tests that block."""
    ports: list[int] = []
    up = threading.Event()
    stop: list[Any] = []

    async def main() -> None:
        ended = asyncio.Event()
        stop.extend([asyncio.get_running_loop(), ended])
        async with serving(answerer, **given) as port:
            ports.append(port)
            up.set()
            await ended.wait()

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    try:
        assert up.wait(100)
        yield ports[0]
    finally:
        loop, ended = stop
        loop.call_soon_threadsafe(ended.set)
        thread.join(100)
        assert not thread.is_alive()


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


async def request(
    port: int,
    body: bytes = b"",
    *,
    method: str = "POST",
    path: str = "/predict",
    kind: str | None = "image/png",
    **headers: str,
) -> Reply:
    """One request on a connection of its own."""
    lines = {"Host": f"127.0.0.1:{port}", "Connection": "close", "Content-Length": str(len(body))}
    if kind is not None:
        lines["Content-Type"] = kind
    lines |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items())
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head.encode() + b"\r\n" + body)
        return await read_reply(reader)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def read_reply(reader: asyncio.StreamReader) -> Reply:
    head, _, rest = (await reader.read()).partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    pairs = (line.partition(": ") for line in lines)
    return Reply(int(first.split()[1]), {key.lower(): value for key, _, value in pairs}, rest)


def multipart(*parts: tuple[str | None, bytes]) -> tuple[bytes, str]:
    """Body and content type of files by name; a None is a field that is no file."""
    body = b""
    for name, content in parts:
        file = "" if name is None else f'; filename="{name}"'
        body += f'--limit\r\nContent-Disposition: form-data; name="p"{file}\r\n\r\n'.encode()
        body += content + b"\r\n"
    return body + b"--limit--\r\n", "multipart/form-data; boundary=limit"


def post(address: str, body: bytes) -> dict[str, Any]:
    """The answer to one picture; ``by`` is empty and ``error`` says why if there is none."""
    request = urllib.request.Request(
        f"http://{address}/predict", body, {"Content-Type": "image/png"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:  # noqa: S310
            found: dict[str, Any] = json.load(reply)["predictions"][0]
            return found
    except urllib.error.HTTPError as exc:
        with exc:
            return {"by": "", "error": exc.read().decode()}
    except OSError as exc:  # it does not listen yet
        return {"by": "", "error": str(exc)}
