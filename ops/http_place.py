"""Where something is asked over HTTP: a flag's text as host, port and path."""

from __future__ import annotations

import http.client
from dataclasses import dataclass
from urllib.parse import urlsplit

from ops.errors import SettingsWrong


@dataclass(frozen=True, slots=True)
class Place:
    """Where an HTTP API is."""

    host: str
    port: int
    tls: bool
    path: str

    @property
    def url(self) -> str:
        """For messages."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{self.path}"

    def connect(self, timeout_s: float) -> http.client.HTTPConnection:
        """A connection that is made with its first request; to be closed by the caller."""
        kind = http.client.HTTPSConnection if self.tls else http.client.HTTPConnection
        return kind(self.host, self.port, timeout=timeout_s)


def parse_place(text: str, *, flag: str, default_port: int) -> Place:
    """A URL, HOST:PORT or HOST. A URL that has no port has its scheme's, unless it is a bare host.

    Raises :class:`SettingsWrong` that names ``flag``.
    """
    url = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        (host or "").encode("idna")  # as it will be before it is looked up
    except ValueError as exc:
        raise SettingsWrong(f"{flag}: {exc}") from exc
    if not url.isprintable() or " " in url:
        raise SettingsWrong(f"{flag}: {text!r} has a space or a control character in it")
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.username:
        raise SettingsWrong(f"{flag}: give a name, HOST:PORT, or http(s)://HOST[:PORT]")
    if port is None and url != f"http://{host}":
        port = 443 if parts.scheme == "https" else None
    return Place(host, port or default_port, parts.scheme == "https", parts.path.rstrip("/"))
