from __future__ import annotations

import ast
import io
import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from broker.config import BrokerConfig, load_settings
from broker.errors import ConfigError
from broker.logs import LogFormat, LogLevel, Redaction, Repeats, redact_urls
from ops.logs import MOST_CHARACTERS, Logs

log = logging.getLogger("splitfleet.test")
TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _handlers_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers = root.handlers
    root.handlers = []  # those of pytest shall not be closed
    yield
    root.handlers = handlers


class Log:
    def __init__(self, form: LogFormat = "json", level: LogLevel = "info") -> None:
        self.stream = io.StringIO()
        self.logs = Logs(level, form, stream=self.stream)

    @property
    def text(self) -> str:
        return self.stream.getvalue()

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @property
    def said(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]

    @property
    def messages(self) -> list[str]:
        return [line["message"] for line in self.said]


def test_a_line_for_people_has_time_level_logger_and_message() -> None:
    written = Log("human")
    log.info("cam-1 is online")
    log.warning("round %d is late", 3, extra={"device": "cam-1", "reason": "late"})
    first, second = written.lines
    assert re.fullmatch(f"{TIME} info    splitfleet.test: cam-1 is online", first)
    line = r"warning splitfleet.test: round 3 is late \| device=cam-1 reason=late"
    assert re.fullmatch(f"{TIME} {line}", second)


def test_a_line_for_programs_is_one_json_object() -> None:
    written = Log()
    written.logs.about(lambda: {"run": "r-1", "round": 7})
    log.warning("two\nlines", extra={"device": "cam-1"})
    (said,) = written.said
    assert re.fullmatch(TIME, said.pop("time"))
    assert said == {
        "level": "warning",
        "logger": "splitfleet.test",
        "message": "two\nlines",
        "run": "r-1",
        "round": 7,
        "device": "cam-1",
    }


def test_where_it_is_is_looked_up_for_each_line_and_what_is_unknown_left_out() -> None:
    written = Log()
    place: dict[str, str | int] = {"device": "own", "round": 0}
    written.logs.about(lambda: place)
    log.info("one")
    place["round"] = 2
    log.info("two")
    log.info("three", extra={"device": None})
    assert [(line.get("device"), line.get("round")) for line in written.said] == [
        ("own", None),
        ("own", 2),
        ("own", 2),
    ]


@pytest.mark.parametrize("form", ["human", "json"])
def test_an_exception_stands_with_its_line(form: LogFormat) -> None:
    written = Log(form)
    try:
        int("no good")
    except ValueError:
        log.exception("it failed")
    if form == "json":
        (said,) = written.said
        assert said["message"] == "it failed"
        assert said["exception"].endswith("'no good'")
    else:
        assert written.lines[0].endswith("it failed")
        assert written.lines[1].startswith("Traceback")
        assert written.lines[-1].endswith("'no good'")


def test_text_from_elsewhere_cannot_forge_a_line_or_move_the_cursor() -> None:
    written = Log("human")
    log.warning("dropped: %s", "x\r\n2026-01-01T00:00:00.000Z error y\x1b[2J\u2028\udcff größer")
    (line,) = written.text.split("\n")[:-1]
    assert r"x\r\n2026-01-01T00:00:00.000Z error y\x1b[2J\u2028\udcff größer" in line


def test_levels_hold_for_splitfleet_and_others_only_warn() -> None:
    written = Log(level="debug")
    log.debug("ours")
    logging.getLogger("asyncio").info("theirs")
    logging.getLogger("asyncio").warning("theirs, and it matters")
    assert written.messages == ["ours", "theirs, and it matters"]


def test_a_level_can_be_changed_and_taken_back_while_it_runs() -> None:
    written = Log(level="info")
    log.debug("1")
    written.logs.set_level("debug")
    log.debug("2")
    written.logs.set_level("error")
    log.warning("3")
    logging.getLogger("asyncio").warning("4")
    written.logs.set_level(None)
    log.info("5")
    written.logs.set_level("info")
    log.debug("6")
    assert written.messages == [
        "log level debug from now on",
        "2",
        "log level error from now on",
        "log level info from now on",
        "5",
    ]


# -- what must not be in a log --------------------------------------------------------------------


@pytest.mark.parametrize("form", ["human", "json"])
def test_no_tensor_array_or_payload_is_written_out(form: LogFormat) -> None:
    written = Log(form)
    secret = 123.456
    array = np.full((2, 3), secret, np.float32)
    log.warning("got %s", array)
    log.warning("got %s and %s", torch.full((4,), secret), b"secret bytes")
    log.warning("got %s", {"state": [array, {"deeper": memoryview(b"secret")}]})
    log.warning("got %s", list(range(1000)))
    log.warning("got %(it)s", {"it": array})
    log.warning("a number is none: %.1f of %s", np.float32(0.5), np.array(7))
    assert "123.4" not in written.text
    assert "secret" not in written.text
    for part in (
        "got <float32 2×3>",
        "got <torch.float32 4> and <12 bytes>",
        "{'state': ['<float32 2×3>', {'deeper': '<6 bytes>'}]}",
        "got <list of 1000>",
        "a number is none: 0.5 of 7",
    ):
        assert part in written.text if form == "human" else part in " ".join(written.messages)


def test_a_line_has_an_end() -> None:
    written = Log("human")
    log.warning("%s", "x" * 10**6)
    log.warning("%d", "not a number")
    assert len(written.lines[0]) < MOST_CHARACTERS + 200
    assert "(1000000 characters)" in written.lines[0]
    assert "%d (with arguments that do not fit it)" in written.lines[1]


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("at mqtt://cam:pass@broker:1883/x, now", "at mqtt://***@broker:1883/x, now"),
        ("'mqtts://cam:p@ss/w@h'", "'mqtts://***@h'"),
        ("no user mqtt://broker:1883", "no user mqtt://broker:1883"),
        ("mail a@b.c", "mail a@b.c"),
        ("http://a@b http://c:d@e", "http://***@b http://***@e"),
    ],
)
def test_credentials_in_urls_are_hidden(text: str, redacted: str) -> None:
    assert redact_urls(text) == redacted
    written = Log()
    log.error("%s", text)
    assert written.messages == [redacted]


SECRETS = st.text(st.characters(exclude_categories=["Cs"]), min_size=6, max_size=40).filter(
    lambda secret: not any(secret in text for text in (_STRUCTURE, "***"))
)
_STRUCTURE = '"exception": "Traceback (most recent call last):\\n  File '


@given(secret=SECRETS, form=st.sampled_from(["human", "json"]))
def test_a_secret_of_the_settings_never_appears(secret: str, form: LogFormat) -> None:
    broker = BrokerConfig(username="cam-1", password=SecretStr(secret))
    assert broker.password is not None
    written = Log(form)
    written.logs.redaction.hide(broker.password.get_secret_value())
    log.warning("settings %s, url mqtt://cam-1:%s@broker", broker, secret)
    log.warning("quoted %r, in a URL %s, in JSON %s", secret, quote(secret), json.dumps(secret))
    log.warning("in a mapping %s", {"password": secret})
    known: dict[str, str] = {}
    try:
        known[secret]
    except KeyError:
        log.exception("nobody knows it")
    shown = written.text
    if form == "json":
        shown = "\n".join(f"{line['message']} {line.get('exception')}" for line in written.said)
    for form_of_it in {secret, quote(secret), repr(secret)[1:-1], json.dumps(secret)[1:-1]}:
        assert form_of_it not in shown


def test_what_is_too_short_for_a_secret_is_not_looked_for() -> None:
    assert Redaction(["a", ""])("abc") == "abc"
    assert Redaction(["abcd"])("xabcdx") == "x***x"


def test_an_error_about_a_url_does_not_repeat_its_password() -> None:
    with pytest.raises(ConfigError, match="credentials do not belong") as caught:
        load_settings(BrokerConfig, section="broker", flags={"url": "mqtt://cam:hunter22@host"})
    assert "hunter22" not in str(caught.value)
    assert "mqtt://***@host" in str(caught.value)


def _log_calls() -> Iterator[tuple[str, ast.Call]]:
    for package in ("broker", "coordinator", "edge_agent", "ops", "tensors"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Attribute)
                    and isinstance(node.func.value, ast.Name)
                    and node.func.value.id in ("log", "logging")
                    and node.func.attr in ("debug", "info", "warning", "error", "exception")
                ):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", node


def test_no_line_of_the_code_logs_a_secret_or_a_tensor() -> None:
    """Lines are constants with arguments, so that they can be told apart and looked through."""
    forbidden = re.compile(
        r"password|passwd|secret|token|credential|private|\bkey\b|payload|tensor|\bstate\b|weights"
    )
    calls = list(_log_calls())
    assert len(calls) > 30
    for where, call in calls:
        template, *arguments = call.args
        assert isinstance(template, ast.Constant), f"{where}: its message is no constant"
        for argument in arguments:
            names = {node.id for node in ast.walk(argument) if isinstance(node, ast.Name)}
            names |= {node.attr for node in ast.walk(argument) if isinstance(node, ast.Attribute)}
            assert not [name for name in names if forbidden.search(name)], f"{where}: {names}"


# -- repeats --------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Sieve:
    def __init__(self) -> None:
        self.clock = Clock()
        self.repeats = Repeats(most=2, every_s=60, clock=self.clock)

    def __call__(
        self, text: str, level: int = logging.WARNING, *args: object, **extra: str
    ) -> int | None:
        """How many were left out before this line; None if it is left out itself."""
        record = log.makeRecord("l", level, "f", 1, text, args, None, extra=extra)
        return getattr(record, "left_out", 0) if self.repeats.filter(record) else None


def test_of_lines_of_one_kind_some_are_let_through_each_minute() -> None:
    say = Sieve()
    assert [say("dropped %d", logging.WARNING, number) for number in range(4)] == [0, 0, None, None]
    say.clock.now = 59.0
    assert say("dropped %d") is None
    say.clock.now = 60.0
    assert [say("dropped %d") for _ in range(3)] == [3, 0, None]


def test_another_device_reason_level_or_text_is_another_kind() -> None:
    say = Sieve()
    kinds: list[Mapping[str, Any]] = [
        {},
        {"device": "a"},
        {"device": "b"},
        {"device": "a", "reason": "late"},
        {"level": logging.ERROR},
    ]
    for kind in kinds:
        assert [say("dropped", **kind) for _ in range(3)] == [0, 0, None]
    assert say("something else") == 0


def test_details_and_information_about_no_device_are_all_let_through() -> None:
    say = Sieve()
    assert [say("detail", logging.DEBUG, device="a") for _ in range(100)] == [0] * 100
    assert [say("round closed", logging.INFO) for _ in range(100)] == [0] * 100
    assert [say("online", logging.INFO, device="a") for _ in range(3)] == [0, 0, None]


def test_kinds_do_not_fill_memory() -> None:
    say = Sieve()
    for number in range(10_000):
        say("dropped", device=f"d{number}")
    assert len(say.repeats._kinds) <= 4096


def test_rubbish_of_a_device_is_logged_a_few_times() -> None:
    written = Log()
    for number in range(100):
        log.warning("dropped number %d", number, extra={"device": "cam-1"})
    log.warning("dropped number %d", 1, extra={"device": "cam-2"})
    assert [line["device"] for line in written.said] == ["cam-1"] * 5 + ["cam-2"]
