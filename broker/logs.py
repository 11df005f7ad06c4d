"""What both ends share of logging: levels, what is left out of a log, who sets it up.

The packages log to ``splitfleet.*`` and leave the rest to the program around them. A line about one
device has ``extra={"device": name}``, one about something refused ``"reason"`` beside it.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Protocol
from urllib.parse import quote

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["human", "json"]

HIDDEN = "***"
SHORTEST_SECRET = 4
"""Anything shorter is found in every other word."""
REPEATS = 5
REPEATS_S = 60.0
_MOST_KINDS = 4096
_MOST_ITEMS = 64


class LogControl(Protocol):
    """The log of a process, as far as its service has a hand in it."""

    def about(self, place: Callable[[], Mapping[str, str | int]]) -> None:
        """Every line from now on says what ``place`` finds then: run, round, device."""
        ...

    def set_level(self, level: LogLevel | None) -> None:
        """From now on; None is the level of its settings."""
        ...


class Untouched:
    """A :class:`LogControl` for programs that look after their log themselves."""

    def about(self, place: Callable[[], Mapping[str, str | int]]) -> None:
        """Nothing."""

    def set_level(self, level: LogLevel | None) -> None:
        """Nothing."""


class Repeats(logging.Filter):
    """For a handler: of lines of one kind it lets only some through each minute.

    Of one kind are lines of the same logger, level and unformatted message, device and reason. The
    first one after that minute has ``left_out``, how many were not let through. Details for
    debugging are always let through, and information that is not about one device.
    """

    def __init__(
        self,
        *,
        most: int = REPEATS,
        every_s: float = REPEATS_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self._most = most
        self._every_s = every_s
        self._clock = clock
        self._lock = threading.Lock()
        self._kinds: OrderedDict[tuple[object, ...], tuple[float, int]] = OrderedDict()

    def filter(self, record: logging.LogRecord) -> bool:
        device, reason = getattr(record, "device", None), getattr(record, "reason", None)
        if record.levelno < (logging.WARNING if device is None else logging.INFO):
            return True
        kind = (record.name, record.levelno, str(record.msg), device, reason)
        now = self._clock()
        with self._lock:
            since, count = self._kinds.get(kind, (now, 0))
            if now - since >= self._every_s:
                record.left_out = max(0, count - self._most)
                del self._kinds[kind]
                since, count = now, 0
            self._kinds[kind] = since, count + 1
            if len(self._kinds) > _MOST_KINDS:
                self._kinds.popitem(last=False)
        return count < self._most


class Redaction:
    """Takes what must not be read out of a text: credentials in URLs, and known secrets."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._forms: list[str] = []
        for secret in secrets:
            self.hide(secret)

    def hide(self, secret: str) -> None:
        """Also how it looks quoted, in a URL, in Python or in JSON."""
        if len(secret) < SHORTEST_SECRET:
            return
        plain, ascii_only = (json.dumps(secret, ensure_ascii=only)[1:-1] for only in (False, True))
        forms = {secret, quote(secret, safe=""), quote(secret), repr(secret)[1:-1]}
        forms |= {plain, ascii_only, ascii(secret)[1:-1]}
        self._forms = sorted({*self._forms, *forms}, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        for form in self._forms:
            text = text.replace(form, HIDDEN)
        return redact_urls(text)


def redact_urls(text: str) -> str:
    """Without the credentials of URLs: ``mqtt://user:password@host`` → ``mqtt://***@host``."""
    return _WORD.sub(_without_credentials, text) if "://" in text else text


_WORD = re.compile(r"\S+")


def _without_credentials(word: re.Match[str]) -> str:
    scheme, separator, rest = word[0].partition("://")
    if not separator or "@" not in rest:
        return word[0]
    return f"{scheme}://{HIDDEN}@{rest.rpartition('@')[2]}"


def without_data(value: Any) -> Any:
    """An argument of a log line; bytes, arrays and long lists are only said to be there."""
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value)} bytes>"
    shape = getattr(value, "shape", None)
    if shape is not None and hasattr(value, "dtype"):
        return f"<{value.dtype} {'×'.join(map(str, shape))}>" if len(shape) else value
    if isinstance(value, list | tuple | set | frozenset | dict):
        if len(value) > _MOST_ITEMS:
            return f"<{type(value).__name__} of {len(value)}>"
        items = value.items() if isinstance(value, dict) else value
        return type(value)(without_data(item) for item in items)
    return value
