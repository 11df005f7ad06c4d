"""A device's answers over HTTP, for programs on the same machine; off unless it is asked for.

``POST /predict`` takes one picture as the body, or several as ``multipart/form-data``;
``GET /healthz`` says whether there are parameters to answer with; ``GET /openapi.json`` describes
both. Everything a client can make grow has a bound: bytes of a body, pictures in it, requests at
once, pictures that are decoded at once, and the time all that may take. A client that goes away
takes its request with it.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncGenerator, Awaitable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, TypeVar

import numpy as np
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from numpy.typing import NDArray
from python_multipart.multipart import parse_options_header
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from edge_agent.answer_json import (
    MAX_TOP,
    HealthReport,
    PictureAnswer,
    PictureError,
    Predictions,
    picture_answers,
)
from edge_agent.answers import Answer
from edge_agent.enquiries import Health
from edge_agent.errors import AgentError, InputError, NotReady, Overloaded, Unanswered
from edge_agent.http_description import DESCRIPTION, REQUEST, RESPONSES
from edge_agent.pictures import PictureSpec

LOOPBACK_NAMES = ("127.0.0.1", "localhost", "[::1]")
_EPILOGUE = 1024
_T = TypeVar("_T")

# It logs every malformed form; the client is told.
logging.getLogger("python_multipart").setLevel(logging.ERROR)


class Answerer(Protocol):
    """What answers pictures: a device's agent."""

    @property
    def pictures(self) -> PictureSpec:
        """What pictures are made into."""
        ...

    async def predict(
        self, images: NDArray[np.float32], *, deadline_s: float | None = None
    ) -> Answer:
        """Answer images (N×C×H×W). Raises :class:`AgentError`; cancelling withdraws it."""
        ...

    async def health(self) -> Health:
        """How it is. Raises :class:`Unanswered`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What clients may take."""

    body_bytes: int = 16 << 20
    pictures: int = 32
    """In one request."""
    requests: int = 16
    """At once; further ones are told to come back."""
    decoding: int = 2
    """Pictures at once; each may take some hundred megabytes while it is decoded."""
    body_s: float = 20.0
    """For a body to arrive."""
    answer_s: float = 30.0
    """For its pictures to be answered: by the exit, if nobody else has by then."""
    grace_s: float = 2.0
    """How much later that answer may come."""
    retry_s: int = 1
    """After how long a client that was sent away should come back."""


class _Refused(Exception):
    """This request gets no answer; the status says why."""

    def __init__(self, status: int, error: str, **headers: str) -> None:
        super().__init__(error)
        self.response = JSONResponse({"error": error}, status, headers)


class _Gone(Exception):
    """The client has closed its connection."""


class HttpApi:
    """The application over an :class:`Answerer`; ``classes`` are the names of its labels.

    :meth:`close` it when it serves no more.

    With a ``token`` clients must show it (``Authorization: Bearer TOKEN``). Without one, requests
    must name a loopback address as their host: a page in a browser must not reach what listens
    there under a name of its own (DNS rebinding).
    """

    def __init__(
        self,
        answerer: Answerer,
        classes: Sequence[str],
        *,
        token: str | None = None,
        limits: Limits | None = None,
    ) -> None:
        self._answerer = answerer
        self._classes = classes
        self._token = token
        self._limits = limits or Limits()
        self._active = 0
        self._working: set[asyncio.Future[Any]] = set()
        self._closed = False
        self._decoders = ThreadPoolExecutor(self._limits.decoding, "decode")
        self.app = FastAPI(
            title="splitfleet agent",
            summary="What is in the picture? Answered by this device, or by its fleet.",
            version="1",
            docs_url=None,  # these pages load scripts from elsewhere; devices are often offline
            redoc_url=None,
        )
        self.app.add_exception_handler(RequestValidationError, _wrong_parameter)
        self.app.add_exception_handler(HTTPException, _elsewhere)
        self.app.add_api_route(
            "/predict",
            self._predict,
            methods=["POST"],
            response_model=Predictions,
            summary="Answer one or several pictures",
            description=DESCRIPTION,
            responses=RESPONSES,
            openapi_extra=REQUEST,
        )
        self.app.add_api_route(
            "/healthz",
            self._healthz,
            methods=["GET"],
            response_model=HealthReport,
            summary="Whether this device can answer",
            responses={503: {"model": HealthReport, "description": "Not yet"}},
        )

    def close(self) -> None:
        """Answer nobody any more, those who wait neither; let its threads go."""
        self._closed = True
        for work in self._working:
            work.cancel()
        self._decoders.shutdown(wait=False, cancel_futures=True)

    async def _healthz(self, request: Request) -> Response:
        try:
            self._check_host(request)
        except _Refused as exc:
            return exc.response
        try:
            found = await self._answerer.health()
        except Unanswered:
            return JSONResponse(HealthReport(ready=False).model_dump(), 503)
        report = HealthReport(
            ready=found.version is not None,
            run=found.run,
            version=found.version,
            cut=found.cut,
            online=found.online,
            waiting=found.waiting,
            asked=found.open,
            threshold=found.threshold,
            threshold_in_force=found.threshold_in_force,
        )
        return JSONResponse(report.model_dump(), 200 if report.ready else 503)

    async def _predict(
        self,
        request: Request,
        top: Annotated[int, Query(ge=1, le=MAX_TOP, description="classes for each picture")] = 3,
        timeout_s: Annotated[
            float | None, Query(gt=0, le=600, description="answer within this time")
        ] = None,
    ) -> Response:
        try:
            self._admit(request)
            self._active += 1
            try:
                found = await self._answer(request, top, timeout_s)
            finally:
                self._active -= 1
        except _Refused as exc:
            return exc.response
        except _Gone:
            return Response(status_code=499)  # nobody reads it
        return JSONResponse(found.model_dump())

    @property
    def _retry_after(self) -> dict[str, str]:
        return {"Retry-After": str(self._limits.retry_s)}

    @property
    def _stopping(self) -> _Refused:
        return _Refused(503, "this agent stops: come back later", **self._retry_after)

    def _admit(self, request: Request) -> None:
        self._authorize(request)
        if self._closed:
            raise self._stopping
        if self._active >= self._limits.requests:
            raise _Refused(429, "too many requests at once: come back later", **self._retry_after)

    def _authorize(self, request: Request) -> None:
        if self._token is None:
            self._check_host(request)
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        known = hmac.compare_digest(given.strip().encode(), self._token.encode())
        if scheme.lower() != "bearer" or not known:
            raise _Refused(
                401, "show the token of --http-token-file: Authorization: Bearer TOKEN",
                **{"WWW-Authenticate": "Bearer"},
            )  # fmt: skip

    def _check_host(self, request: Request) -> None:
        host = request.headers.get("host", "").lower()
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if self._token is None and name not in LOOPBACK_NAMES:
            raise _Refused(403, "this device answers under 127.0.0.1 and localhost only")

    async def _answer(self, request: Request, top: int, timeout_s: float | None) -> Predictions:
        try:
            async with asyncio.timeout(self._limits.body_s):
                pictures = await self._pictures(request)
        except ClientDisconnect as exc:
            raise _Gone from exc
        except TimeoutError:
            raise _Refused(408, "the pictures took too long to arrive: send less at once") from None
        limits = self._limits
        within = min(timeout_s or limits.answer_s, limits.answer_s)
        try:
            async with asyncio.timeout(within + limits.grace_s):
                return await self._unless_gone(request, self._answered(pictures, top, within))
        except TimeoutError:
            raise _Refused(504, "no answer in time: allow more, or ask less at once") from None
        except InputError as exc:
            raise _Refused(422, str(exc)) from exc
        except NotReady as exc:
            raise _Refused(503, str(exc), **self._retry_after) from exc
        except Overloaded as exc:
            raise _Refused(429, str(exc), **self._retry_after) from exc
        except Unanswered as exc:
            raise _Refused(503, str(exc), **self._retry_after) from exc
        except AgentError as exc:
            raise _Refused(500, str(exc)) from exc

    async def _pictures(self, request: Request) -> list[tuple[str, bytes]]:
        """Names and contents of the pictures in a request."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        several = kind == "multipart/form-data"
        if not (several or kind.startswith("image/") or kind in ("", "application/octet-stream")):
            raise _Refused(
                415, f"{kind} is not taken: send a picture (image/png), or multipart/form-data"
            )
        body = await self._body(request)
        if not several:
            return [("picture", body)]
        return await self._parts(request, body)

    async def _body(self, request: Request) -> bytes:
        most = self._limits.body_bytes
        too_long = _Refused(413, f"at most {most} bytes are taken: send less at once")
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > most:
            raise too_long
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > most:
                raise too_long
        return bytes(body)

    async def _parts(self, request: Request, body: bytes) -> list[tuple[str, bytes]]:
        async def whole() -> AsyncGenerator[bytes, None]:
            yield body

        limits = self._limits
        _, options = parse_options_header(request.headers["content-type"])
        if b"--" + options.get(b"boundary", b"\r") + b"--" not in body[-_EPILOGUE:]:
            raise _Refused(422, "this is no multipart/form-data, or its end is missing")
        parser = MultiPartParser(request.headers, whole(), max_files=limits.pictures, max_fields=0)
        try:
            form = await parser.parse()
        except (MultiPartException, ValueError, KeyError) as exc:
            why = getattr(exc, "message", str(exc))
            raise _Refused(
                422,
                f"this is no multipart/form-data of 1 to {limits.pictures} files ({why})",
            ) from exc
        try:
            found = []
            for index, (field, part) in enumerate(form.multi_items()):
                if isinstance(part, str):
                    raise _Refused(422, f"the part {field!r} is no file: send each with a filename")
                found.append((part.filename or f"picture {index + 1}", await part.read()))
        finally:
            await form.close()
        if not found:
            raise _Refused(422, "there is no picture in this request: add at least one file")
        return found

    async def _unless_gone(self, request: Request, work: Awaitable[_T]) -> _T:
        """The result of ``work``, which is cancelled when the client closes its connection."""

        async def gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
        self._working.add(working)
        try:
            await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
            if working.cancelled():
                raise self._stopping
            if not working.done():
                raise _Gone
            return working.result()
        finally:
            self._working.discard(working)
            for task in (working, watching):
                task.cancel()
            await asyncio.gather(working, watching, return_exceptions=True)

    async def _answered(
        self, pictures: list[tuple[str, bytes]], top: int, within_s: float
    ) -> Predictions:
        spec = self._answerer.pictures
        loop = asyncio.get_running_loop()
        end = loop.time() + within_s
        images: dict[int, NDArray[np.float32]] = {}
        entries: list[PictureAnswer | PictureError | None] = [None] * len(pictures)
        async with asyncio.timeout_at(end):
            for index, (name, data) in enumerate(pictures):
                try:
                    images[index] = await loop.run_in_executor(self._decoders, spec.read, data)
                except InputError as exc:
                    if len(pictures) == 1:
                        raise
                    entries[index] = PictureError(file=name, error=str(exc))
        if not images:
            raise InputError("none of these is a picture: " + _errors(entries))
        left = end - loop.time()
        if left <= 0:
            raise TimeoutError
        answer = await self._answerer.predict(np.stack(list(images.values())), deadline_s=left)
        names = [pictures[index][0] for index in images]
        answered = picture_answers(answer, names, self._classes, top)
        for index, entry in zip(images, answered, strict=True):
            entries[index] = entry
        return Predictions(
            run=answer.run,
            version=answer.version,
            predictions=[entry for entry in entries if entry is not None],
        )


async def _wrong_parameter(_: Request, exc: Exception) -> Response:
    assert isinstance(exc, RequestValidationError)
    found = (f"{error['loc'][-1]}: {error['msg']}" for error in exc.errors()[:3])
    return JSONResponse({"error": "; ".join(found)}, 422)


async def _elsewhere(_: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    return JSONResponse({"error": exc.detail}, exc.status_code, exc.headers)


def _errors(entries: Sequence[PictureAnswer | PictureError | None]) -> str:
    found = [entry for entry in entries if isinstance(entry, PictureError)]
    return "; ".join(f"{entry.file}: {entry.error}" for entry in found[:3])
