"""Where an agent listens for HTTP: opened before anything else, so that a wrong address is said."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from edge_agent.http_server import listen, parse_address, read_token, serve_http
from edge_agent.settings import AgentSettings
from ops.errors import SettingsWrong

if TYPE_CHECKING:
    from edge_agent.http_api import Answerer

log = logging.getLogger("splitfleet.agent")


class Door:
    """The socket, the token and the libraries of an agent's HTTP API; use it as a context.

    Raises :class:`SettingsWrong` without the libraries, ``ListenError`` where it cannot listen,
    ``StateError`` for a token file that cannot be used.
    """

    def __init__(self, settings: AgentSettings) -> None:
        assert settings.http is not None
        try:
            from edge_agent import http_api
        except ImportError as exc:
            raise SettingsWrong(
                f"--http needs libraries that are not here ({exc}): pip install 'splitfleet[http]'"
            ) from exc
        self._api = http_api
        self._limits = http_api.Limits(answer_s=settings.answer_deadline_s)
        file = settings.http_token_file
        self.token = None if file is None else read_token(file)
        self._socket: socket.socket = listen(*parse_address(settings.http))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._socket.close()

    @contextlib.asynccontextmanager
    async def open(self, answerer: Answerer, classes: Sequence[str]) -> AsyncIterator[int]:
        """Serve as long as the context lasts; yields the port."""
        api = self._api.HttpApi(answerer, classes, token=self.token, limits=self._limits)
        async with serve_http(api, self._socket) as port:
            log.info("pictures are answered at http://%s:%d", self._socket.getsockname()[0], port)
            yield port
