from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from broker.branches import Branches
from broker.drive import Call
from broker.envelopes import Envelope, down, to_all
from broker.link import Link
from broker.logs import LogLevel
from broker.memory import MemoryBroker, MemoryTransport
from broker.messages import Command
from broker.topics import COORDINATOR, Topics
from coordinator import watching
from coordinator.errors import StoreError
from coordinator.log_levels import (
    FILE,
    LogLevels,
    order,
    orders,
    read_log_levels,
    write_log_levels,
)
from coordinator.service import new_vitals
from coordinator.serving import ANSWERING, TRAINING, route
from coordinator.traffic import Traffic
from tests.fake_coordinator import Harness, every, only
from tests.tiny import make_hello


def test_a_devices_own_level_counts_before_that_of_all() -> None:
    levels = LogLevels().for_all_devices("error").with_device("a", "debug")
    assert (levels.of("a"), levels.of("b")) == ("debug", "error")
    assert levels.with_device("a", None).of("a") == "error"
    assert levels.for_all_devices("info") == LogLevels(all_devices="info")
    assert levels.coordinator is None


def test_only_devices_whose_level_changes_are_told() -> None:
    none = LogLevels()
    one = none.with_device("a", "debug")
    assert orders(none, none) == []
    assert orders(none, LogLevels(coordinator="debug")) == []
    assert orders(none, one) == [down("a", order("debug"))]
    assert orders(one, none) == [down("a", order(None))]
    assert orders(one, one.with_device("b", "info")) == [down("b", order("info"))]


def test_all_are_told_at_once_and_then_those_with_a_level_of_their_own() -> None:
    one = LogLevels(devices={"a": "debug"})
    mixed = LogLevels(all_devices="error", devices={"a": "debug", "b": "error"})
    assert orders(one, mixed) == [to_all(order("error")), down("a", order("debug"))]
    assert orders(mixed, one) == [to_all(order(None)), down("a", order("debug"))]
    same = LogLevels(all_devices="error")
    assert orders(mixed, same) == [down("a", order("error"))]


def test_what_was_written_is_read(tmp_path: Path) -> None:
    assert read_log_levels(tmp_path) == LogLevels()
    levels = LogLevels("warning", "error", {"cam-1": "debug"})
    write_log_levels(tmp_path, levels)
    assert read_log_levels(tmp_path) == levels


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b'{"coordinator": "loud"}',
        b'{"devices": {"no/name": "info"}}',
        b'{"devicse": {}}',
        b'{"devices": {' + b", ".join(b'"d%d": "info"' % i for i in range(1001)) + b"}}",
        b" " * (1 << 19),
        b"\xff" * 10,
        b"[" * 100_000,
    ],
)
def test_a_file_that_makes_no_sense_is_an_error_that_names_it(
    content: bytes, tmp_path: Path
) -> None:
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(StoreError, match=f"{FILE}.*remove it"):
        read_log_levels(tmp_path)


def test_a_folder_in_its_place_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    with pytest.raises(StoreError, match=FILE):
        read_log_levels(tmp_path)
    with pytest.raises(StoreError, match=FILE):
        write_log_levels(tmp_path, LogLevels())


def test_a_device_that_comes_later_is_told_with_its_assignment() -> None:
    server = Harness(min_devices=3)
    server.join("a", 2)
    assert server.core.follow(LogLevels(devices={"b": "debug"})) == [down("b", order("debug"))]
    assert only(Command, server.join("b", 2), "b") == Command(command="log_level", level="debug")
    assert not every(Command, server.hear("a", make_hello()))


class Noted:
    """A ``LogControl`` that remembers."""

    def __init__(self) -> None:
        self.levels: list[LogLevel | None] = []
        self.place: Callable[[], Mapping[str, str | int]] = dict

    def about(self, place: Callable[[], Mapping[str, str | int]]) -> None:
        self.place = place

    def set_level(self, level: LogLevel | None) -> None:
        self.levels.append(level)


async def until(condition: Callable[[], bool]) -> None:
    while True:
        if condition():
            return
        await asyncio.sleep(0.01)


async def test_a_running_coordinator_follows_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watching, "CHOICE_S", 0.01)
    server, noted = Harness(tmp_path, min_devices=2), Noted()
    settings = server.settings
    server.join("a", 2)

    async with MemoryTransport(MemoryBroker(), COORDINATOR) as transport:
        link = Link(
            transport, Topics("fleet"), observer=Traffic(lambda reason: None), clock=time.monotonic
        )
        branches = Branches(link, (TRAINING, ANSWERING), route)

        async def told() -> list[Envelope]:
            """What comes of the next calls, until something is to be said."""
            while True:
                event = await branches[TRAINING].receive()
                assert isinstance(event, Call)
                if said := [each for each in event.run() if isinstance(each, Envelope)]:
                    return said

        watch = asyncio.create_task(
            watching.watch(server.core, branches, new_vitals(settings), noted, settings)
        )
        try:
            async with asyncio.timeout(100):
                write_log_levels(tmp_path, LogLevels("debug", "error"))
                assert await told() == [to_all(order("error"))]
                (tmp_path / FILE).write_text("rubbish")
                await until(lambda: FILE in caplog.text)
                write_log_levels(tmp_path, LogLevels(all_devices="error", devices={"a": "info"}))
                assert await told() == [down("a", order("info"))]
                (tmp_path / FILE).unlink()
                assert await told() == [to_all(order(None))]
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
    assert noted.levels == ["debug", None, None]
    assert caplog.text.count(FILE) < 4, "one complaint, not one each time"
    assert noted.place() == {"run": server.round.run, "round": 0}
