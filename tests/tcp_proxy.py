"""A network between a client and its broker that can be cut, healed and made slow."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self

PIECE_BYTES = 4096
PIECES_UNDER_WAY = 256
START_TIMEOUT_S = 60.0


class Proxy:
    """Forwards a port of the loopback interface to another, in a thread of its own.

    ``bytes_per_s`` and ``latency_s`` hold for each direction of each connection.
    """

    def __init__(
        self, target: int, *, bytes_per_s: float | None = None, latency_s: float = 0.0
    ) -> None:
        self._target = target
        self._bytes_per_s = bytes_per_s
        self._latency_s = latency_s
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy")
        self._passing = asyncio.Event()
        self._passing.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._jobs: set[asyncio.Task[None]] = set()
        self.port = 0

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"

    def cut(self) -> None:
        """Nothing gets through, and neither side is told: connections are half open."""
        self._loop.call_soon_threadsafe(self._passing.clear)

    def heal(self) -> None:
        """New connections work; those of before are reset, as by a router that forgot them."""
        self._loop.call_soon_threadsafe(self._heal)

    def _heal(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._passing.set()

    def __enter__(self) -> Self:
        self._thread.start()
        self._do(self._listen())
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, what: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(what, self._loop).result(START_TIMEOUT_S)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        self._server.close()
        for job in self._jobs:
            job.cancel()
        await asyncio.gather(*self._jobs, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        job = asyncio.create_task(self._connect(reader, writer))
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        mine = [writer]
        self._writers.add(writer)
        try:
            await self._passing.wait()
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
            mine.append(far_writer)
            self._writers.add(far_writer)
            async with asyncio.TaskGroup() as directions:
                directions.create_task(self._forward(reader, far_writer))
                directions.create_task(self._forward(far_reader, writer))
        except* OSError:
            pass
        finally:
            for end in mine:
                self._writers.discard(end)
                end.transport.abort()

    async def _forward(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(PIECES_UNDER_WAY)

        async def take_in() -> None:
            while piece := await source.read(PIECE_BYTES):
                if self._bytes_per_s is not None:
                    await asyncio.sleep(len(piece) / self._bytes_per_s)
                await under_way.put((loop.time() + self._latency_s, piece))
            raise ConnectionResetError

        async def give_out() -> None:
            while True:
                due, piece = await under_way.get()
                await asyncio.sleep(due - loop.time())
                await self._passing.wait()
                sink.write(piece)
                await sink.drain()

        async with asyncio.TaskGroup() as both:
            both.create_task(take_in())
            both.create_task(give_out())
