"""The log of a service: one line for each event on standard error, for people or for programs."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from typing import IO

from broker.logs import LogFormat, LogLevel, Redaction, Repeats, without_data

LOGGER = "splitfleet"
MOST_CHARACTERS = 4096
"""Of a message; of an exception four times as many."""

log = logging.getLogger("splitfleet.logs")

_FIELDS = ("run", "round", "device", "reason", "left_out")


class Logs:
    """Takes over the log of this process; a :class:`~broker.logs.LogControl`.

    ``level`` is that of splitfleet; other libraries only warn.
    """

    def __init__(self, level: LogLevel, form: LogFormat, *, stream: IO[str] | None = None) -> None:
        self.redaction = Redaction()
        self._formatter = (_Json if form == "json" else _Human)(self.redaction)
        handler = logging.StreamHandler(sys.stderr if stream is None else stream)
        handler.setFormatter(self._formatter)
        handler.addFilter(Repeats())
        root = logging.getLogger()
        for former in root.handlers[:]:
            root.removeHandler(former)
            former.close()
        root.addHandler(handler)
        self._own = self._level = level
        self._apply()

    def about(self, place: Callable[[], Mapping[str, str | int]]) -> None:
        """Every line from now on says what ``place`` finds then: run, round, device."""
        self._formatter.place = place

    def set_level(self, level: LogLevel | None) -> None:
        """From now on; None is the level it began with. May be called from any thread."""
        wanted = self._own if level is None else level
        if wanted == self._level:
            return
        quieter = _number(wanted) > _number(self._level)
        if quieter:
            log.info("log level %s from now on", wanted)
        self._level = wanted
        self._apply()
        if not quieter:
            log.info("log level %s from now on", wanted)

    def _apply(self) -> None:
        number = _number(self._level)
        logging.getLogger(LOGGER).setLevel(number)
        logging.getLogger().setLevel(max(logging.WARNING, number))


def _number(level: LogLevel) -> int:
    return logging.getLevelNamesMapping()[level.upper()]


def _nowhere() -> Mapping[str, str | int]:
    return {}


class _Formatter(logging.Formatter):
    """What a line says; how is up to the two below. It has no line breaks, secrets or tensors."""

    def __init__(self, redaction: Redaction) -> None:
        super().__init__()
        self.place = _nowhere
        self._redact = redaction

    def said(self, record: logging.LogRecord) -> dict[str, str | int]:
        """Time, level, logger and message, then whatever else is known."""
        whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        said: dict[str, str | int] = {
            "time": f"{whole}.{int(record.created % 1 * 1000):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _cut(self._redact(_message(record)), MOST_CHARACTERS),
        }
        place, own = self.place(), record.__dict__
        found = {name: own.get(name) or place.get(name) for name in _FIELDS}
        return said | {name: value for name, value in found.items() if value}

    def exception(self, record: logging.LogRecord) -> str:
        """Traceback and stack, if there are any."""
        parts = []
        if record.exc_info:
            parts.append(self.formatException(record.exc_info))
        if record.stack_info:
            parts.append(self.formatStack(record.stack_info))
        text = self._redact("\n".join(parts))
        return text[-4 * MOST_CHARACTERS :]


class _Json(_Formatter):
    """One object in one line; an exception is a string of it."""

    def format(self, record: logging.LogRecord) -> str:
        said = self.said(record)
        if text := self.exception(record):
            said["exception"] = text
        return json.dumps(said)


class _Human(_Formatter):
    """Time, level, logger and message, then what else is known; an exception below it."""

    def format(self, record: logging.LogRecord) -> str:
        said = self.said(record)
        moment, level, logger, message = (said.pop(key) for key in tuple(said)[:4])
        rest = "".join(f" {name}={value}" for name, value in said.items())
        line = f"{moment} {level:<7} {logger}: {_in_one_line(str(message))}"
        if rest:
            line += f" |{_in_one_line(rest)}"
        text = self.exception(record)
        return f"{line}\n{text}" if text else line


def _message(record: logging.LogRecord) -> str:
    text = str(record.msg)
    if not record.args:
        return text
    args = record.args
    if isinstance(args, Mapping):
        known: object = {name: without_data(value) for name, value in args.items()}
    else:
        known = tuple(without_data(value) for value in args)
    try:
        return text % known
    except (TypeError, ValueError, KeyError):
        return f"{text} (with arguments that do not fit it)"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}… ({len(text)} characters)"


def _in_one_line(text: str) -> str:
    """What would end a line or move a cursor is written as in Python."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
