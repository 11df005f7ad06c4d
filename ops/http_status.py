"""The coordinator's HTTP server: ``/metrics`` for Prometheus, ``/status`` and ``/healthz``.

Threads of its own answer, a bounded number at once, each request within a time; nothing a client
does holds up the fleet.
"""

from __future__ import annotations

import errno
import io
import logging
import socket
import socketserver
import threading
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO, TypeAlias
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from prometheus_client import CollectorRegistry, make_wsgi_app

from coordinator.health import Vitals
from ops.errors import PortInUse, SettingsWrong

if TYPE_CHECKING:
    from coordinator.core import CoordinatorCore

log = logging.getLogger("splitfleet.http")

AT_ONCE = 16
"""Requests that are answered together; further ones are sent away."""
REQUEST_S = 10.0
"""How long a client may be silent."""

Page: TypeAlias = Callable[[], tuple[bool, str]]
"""Whether all is well (status 200, else 503), and the JSON to answer with; called in any thread."""


class FleetPages:
    """``/healthz`` and ``/status`` of a coordinator; ``core`` comes when it has been built."""

    def __init__(self, vitals: Vitals) -> None:
        self._vitals = vitals
        self.core: CoordinatorCore | None = None

    def __call__(self) -> dict[str, Page]:
        """By path."""
        return {"/healthz": self._health, "/status": self._status}

    def _health(self) -> tuple[bool, str]:
        health = self._vitals.health()
        return health.ok, health.model_dump_json()

    def _status(self) -> tuple[bool, str]:
        if self.core is None:
            return self._health()
        return True, self.core.status(self._vitals.health()).model_dump_json()


class HttpServer:
    """Serves ``registry`` and ``pages`` (path → page) until closed, or until the process ends."""

    def __init__(
        self, registry: CollectorRegistry, pages: dict[str, Page], host: str, port: int
    ) -> None:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        kind = type("_ServerOfFamily", (_Server,), {"address_family": family})
        self._server: _Server = kind((host, port), _Handler)
        self._server.set_app(_application(registry, pages))
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, name="http", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def serve_http(
    registry: CollectorRegistry, pages: dict[str, Page], host: str, port: int
) -> HttpServer:
    """Serve ``http://host:port/metrics`` and the pages; port 0 takes a free one.

    Raises :class:`SettingsWrong` for a host that this machine is not, :class:`PortInUse`.
    """
    try:
        return HttpServer(registry, pages, host, port)
    except (OSError, UnicodeError) as exc:
        why = getattr(exc, "strerror", None) or exc
        unknown = isinstance(exc, UnicodeError | socket.gaierror)
        if unknown or getattr(exc, "errno", None) == errno.EADDRNOTAVAIL:
            raise SettingsWrong(
                f"metrics_host = {host!r} is no name or address of this machine ({why}): take "
                "127.0.0.1 for this machine alone, 0.0.0.0 for whoever reaches it"
            ) from exc
        raise PortInUse(
            f"metrics cannot be served on {host}:{port} ({why}): stop the program "
            "that listens there, or choose another metrics_port"
        ) from exc


def _application(registry: CollectorRegistry, pages: dict[str, Page]) -> WSGIApplication:
    metrics = make_wsgi_app(registry)
    listing = "\n".join(["/metrics", *pages]) + "\n"

    def answer(environ: WSGIEnvironment, respond: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "/")
        if path == "/metrics":
            exposition: Iterable[bytes] = metrics(environ, respond)
            return exposition
        if path == "/":
            return _text(respond, "200 OK", listing)
        if path not in pages:
            return _text(respond, "404 Not Found", f"there is only:\n{listing}")
        well, content = pages[path]()
        status = "200 OK" if well else "503 Service Unavailable"
        return _text(respond, status, content + "\n", "application/json")

    def application(environ: WSGIEnvironment, respond: StartResponse) -> Iterable[bytes]:
        method = environ["REQUEST_METHOD"]
        if method not in ("GET", "HEAD"):
            return _text(respond, "405 Method Not Allowed", "only GET is answered\n")
        try:
            content = answer(environ | {"REQUEST_METHOD": "GET"}, respond)
        except Exception:
            log.exception("%s cannot be answered", environ.get("PATH_INFO"))
            return _text(respond, "500 Internal Server Error", "see the log of this program\n")
        return content if method == "GET" else []

    return application


def _text(
    respond: StartResponse, status: str, content: str, kind: str = "text/plain; charset=utf-8"
) -> list[bytes]:
    data = content.encode()
    respond(status, [("Content-Type", kind), ("Content-Length", str(len(data)))])
    return [data]


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, *args: Any) -> None:
        self._room = threading.BoundedSemaphore(AT_ONCE)
        super().__init__(*args)

    def server_bind(self) -> None:
        """Without looking up the machine's name, which may take long."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._room.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: a client that went away is its own business."""


class _Handler(WSGIRequestHandler):
    timeout = REQUEST_S

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 the base's name
        """Nothing."""

    def get_stderr(self) -> TextIO:
        """Nowhere: what goes wrong while a reply is written is the client's business."""
        return io.StringIO()
