"""The HTTP API as a task of the agent's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from broker.errors import ConfigError
from edge_agent.errors import ListenError, StateError

if TYPE_CHECKING:
    from edge_agent.http_api import HttpApi

log = logging.getLogger("splitfleet.agent")

CONNECTIONS = 64
"""Open at once; further ones are sent away."""
HEAD_S = 10.0
"""How long the head of a request may take to arrive, from the connection or its first byte on."""
SHUTDOWN_S = 3.0
"""How long connections may take to end when the agent stops; its requests end at once."""
TOKEN_LENGTH = (16, 512)


def parse_address(text: str) -> tuple[str, int]:
    """``HOST:PORT`` or ``[IPV6]:PORT``. Raises ``ValueError``."""
    host, separator, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not separator or not host or not (port.isascii() and port.isdecimal()):
        raise ValueError("give HOST:PORT, e.g. 127.0.0.1:8470")
    if int(port[:6]) > 65_535:
        raise ValueError("the port must be 0 to 65535")
    if ":" in host and not text.startswith("["):
        raise ValueError("write an IPv6 address in brackets, e.g. [::1]:8470")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine reach it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_token(path: Path) -> str:
    """The token in a file: one line of printable ASCII. Raises :class:`StateError`."""
    least, most = TOKEN_LENGTH
    try:
        with path.open("rb") as file:
            token = file.read(most + 2).decode("ascii").strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise StateError(f"{path} cannot be read as a token: {exc}") from exc
    if not least <= len(token) <= most or not token.isprintable() or " " in token:
        raise StateError(
            f"{path} must hold one line of {least} to {most} characters without spaces: write one "
            "with, say, openssl rand -hex 32"
        )
    return token


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises :class:`ListenError`, ConfigError for no host."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as exc:
        why = getattr(exc, "strerror", None) or exc
        raise ConfigError(f"agent.http: there is no host {host!r} here ({why})") from exc
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(CONNECTIONS)
    except OSError as exc:
        listening.close()
        raise ListenError(
            f"cannot listen on {host}:{port}: {exc.strerror or exc}; stop what does, or choose "
            "another address with --http"
        ) from exc
    return listening


@contextlib.asynccontextmanager
async def serve_http(api: HttpApi, listening: socket.socket) -> AsyncIterator[int]:
    """Serve the API on a socket; yields the port. Both are closed at the end."""
    import uvicorn

    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    started = asyncio.Event()

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            started.set()

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield  # signals are the agent's business

    config = uvicorn.Config(
        api.app,
        http=_bounded_protocol(),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONNECTIONS,
        backlog=CONNECTIONS,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=int(SHUTDOWN_S),
    )
    server = Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listening]), name="http")

    def ended(_: object) -> None:
        if not server.should_exit:
            log.error("the HTTP API has ended; the agent goes on without it")

    serving.add_done_callback(ended)
    starting = asyncio.create_task(started.wait())
    try:
        await asyncio.wait({serving, starting}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
            raise ListenError("the HTTP server has ended at once: see the log")
        yield int(listening.getsockname()[1])
    finally:
        api.close()
        server.should_exit = True
        done, _ = await asyncio.wait({serving}, timeout=2 * SHUTDOWN_S)
        if not done:
            server.force_exit = True
            serving.cancel()
        starting.cancel()
        await asyncio.gather(serving, starting, return_exceptions=True)
        listening.close()


def _bounded_protocol() -> type[asyncio.Protocol]:
    """HTTP over a connection that ends if no request comes: they are few, and others wait."""
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Bounded(H11Protocol):
        _overdue: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)  # type: ignore[arg-type]
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._forget()

        def _watch(self) -> None:
            if self.conn.their_state is not h11.IDLE:
                self._forget()
            elif self._overdue is None:
                self._overdue = self.loop.call_later(HEAD_S, self._give_up)

        def _give_up(self) -> None:
            self._overdue = None
            if self.conn.their_state is h11.IDLE:
                self.transport.close()

        def _forget(self) -> None:
            if self._overdue is not None:
                self._overdue.cancel()
                self._overdue = None

    return Bounded
