"""Getting the bytes of a bundle, in pieces from the coordinator or by HTTP."""

from __future__ import annotations

import hashlib
import http.client
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from broker.maps import Buffer
from broker.update_messages import Update
from edge_agent.errors import BundleError

BLOCK = 1 << 20
HTTP_TIMEOUT_S = 30.0
_ONCE_MORE = (408, 425, 429)
"""What a client did wrong (4xx), but need not do wrong again."""


class PartialBundle:
    """A bundle as far as it has come: a file in ``folder``, named after its digest.

    ``resumed``: an earlier process has fetched some of it.
    """

    def __init__(self, folder: Path, update: Update) -> None:
        self._update = update
        self.path = folder / f"{update.sha256}.bundle"
        folder.mkdir(parents=True, exist_ok=True)
        for other in folder.glob("*.bundle"):
            if other != self.path:
                other.unlink()
        if self.size > update.size:
            self.path.unlink()
        self.resumed = self.size > 0

    @property
    def size(self) -> int:
        """Bytes that are there."""
        return self.path.stat().st_size if self.path.exists() else 0

    @property
    def complete(self) -> bool:
        """Whether all bytes are there."""
        return self.size == self._update.size

    def add(self, offset: int, data: Buffer) -> bool:
        """Append bytes; False, and nothing added, for others than the next.

        Raises BundleError for more than were announced.
        """
        if offset != self.size:
            return False
        if offset + len(data) > self._update.size:
            raise BundleError("the bundle is longer than was announced")
        with self.path.open("ab") as file:
            file.write(data)
        return True

    def check(self) -> None:
        """Raises BundleError, with the file removed, if it is not the bundle that was announced."""
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != self._update.sha256:
            self.remove()
            raise BundleError("the bundle that came is not the one that was announced (checksum)")

    def remove(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)


class Response(Protocol):
    """What ``urlopen`` gives back, as far as it is used here."""

    def read1(self, size: int, /) -> bytes: ...

    def close(self) -> None: ...


class HttpDownload:
    """Reads a bundle from its URL, what has come at a time, from where the partial one ends."""

    def __init__(
        self,
        update: Update,
        partial: PartialBundle,
        *,
        urlopen: Callable[..., Response] = urllib.request.urlopen,
    ) -> None:
        assert update.url is not None
        self._url = update.url
        self._partial = partial
        self._urlopen = urlopen
        self._response: Response | None = None

    def step(self) -> None:
        """Read what has come. Raises OSError when it cannot, to be tried again; and BundleError."""
        try:
            if self._response is None:
                self._response = self._open()
            block = self._response.read1(BLOCK)
            if not block and not self._partial.complete:
                raise ConnectionError(f"{self._url} ended after {self._partial.size} bytes")
            self._partial.add(self._partial.size, block)
        except (OSError, http.client.HTTPException) as exc:
            self.close()
            if isinstance(exc, urllib.error.HTTPError) and _is_final(exc.code):
                raise BundleError(f"{self._url} says {exc.code} {exc.reason}") from exc
            raise OSError(str(exc)) from exc
        except (ValueError, OverflowError) as exc:  # what urllib makes of an address that is none
            self.close()
            raise BundleError(f"{self._url} cannot be fetched: {exc}") from exc

    def close(self) -> None:
        """Let go of the connection."""
        if self._response is not None:
            self._response.close()
            self._response = None

    def _open(self) -> Response:
        start = self._partial.size
        request = urllib.request.Request(self._url, headers={"Range": f"bytes={start}-"})  # noqa: S310 http and https only: broker.update_messages
        response = self._urlopen(request, timeout=HTTP_TIMEOUT_S)
        if start and getattr(response, "status", 206) != 206:
            self._partial.remove()  # a server that cannot resume sends all of it
        return response


def _is_final(code: int) -> bool:
    return 400 <= code < 500 and code not in _ONCE_MORE
