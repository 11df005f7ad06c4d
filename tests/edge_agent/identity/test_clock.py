from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest

from edge_agent.disk import make_folder
from edge_agent.errors import IdentityError
from edge_agent.identity.clock import RELEASED, ClockFloor
from edge_agent.identity.folder import IdentityFolder
from tests.device_identity import DAY_S, Issuer

NOW = RELEASED + 300 * DAY_S


def floor_of(folder: Path, wall: float = 0.0) -> ClockFloor:
    return ClockFloor(IdentityFolder(folder), wall=lambda: wall)


def test_no_clock_is_before_the_release_of_this_software(tmp_path: Path) -> None:
    assert floor_of(tmp_path, wall=1000.0).now() == RELEASED


def test_a_clock_that_is_later_counts(tmp_path: Path) -> None:
    assert floor_of(tmp_path, wall=NOW).now() == NOW


def test_a_device_with_a_token_knows_that_it_was_made_before(tmp_path: Path) -> None:
    identity = IdentityFolder(tmp_path / "device")
    identity.put_token(Issuer(tmp_path / "authority", wall=lambda: NOW).token())
    assert NOW - DAY_S < floor_of(identity.folder).now() <= NOW


def test_a_device_with_a_certificate_knows_when_it_began(tmp_path: Path) -> None:
    identity = Issuer(tmp_path / "authority", wall=lambda: NOW).enrolled(tmp_path / "device", "d")
    assert NOW - DAY_S < floor_of(identity.folder).now() <= NOW


def test_what_the_coordinator_told_outlives_the_process(tmp_path: Path) -> None:
    floor_of(tmp_path).confirm(NOW)
    assert floor_of(tmp_path).now() == NOW


def test_a_time_that_cannot_be_is_not_believed(tmp_path: Path) -> None:
    floor = floor_of(tmp_path, wall=NOW)
    floor.confirm(2.0**53)
    assert floor.now() == NOW
    (tmp_path / "clock").write_text("99999999999999999999\n")
    assert floor_of(tmp_path).now() == RELEASED


def test_the_floor_never_falls(tmp_path: Path) -> None:
    floor = floor_of(tmp_path, wall=NOW)
    floor.confirm()
    floor.confirm(NOW - DAY_S)
    assert floor_of(tmp_path).now() == NOW


def test_the_card_is_not_written_for_seconds(tmp_path: Path) -> None:
    floor = floor_of(tmp_path)
    floor.confirm(NOW)
    floor.confirm(NOW + 30.0)
    assert floor.now() == NOW + 30.0
    assert floor_of(tmp_path).now() == NOW
    floor.confirm(NOW + 61.0)
    assert floor_of(tmp_path).now() == NOW + 61.0


@pytest.mark.parametrize("content", [b"", b"soon", b"nan", b"inf", b"\xff\xfe", b"-5"])
def test_a_damaged_file_is_no_floor(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "clock").write_bytes(content)
    assert floor_of(tmp_path).now() == RELEASED


def test_a_full_disk_is_only_complained_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    floor = floor_of(tmp_path / "gone")
    with caplog.at_level(logging.WARNING):
        floor.confirm(NOW)
    assert "floor is not kept" in caplog.text
    assert floor.now() == NOW
    make_folder(tmp_path / "gone")
    floor.confirm(NOW)
    assert floor_of(tmp_path / "gone").now() == NOW


def test_the_system_clock_is_set_forward_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[float] = []
    monkeypatch.setattr(time, "clock_settime", lambda _clock, value: told.append(value))
    assert floor_of(tmp_path, wall=0.0).set_system_clock()
    assert not floor_of(tmp_path, wall=NOW).set_system_clock()
    assert told == [RELEASED]


def test_who_may_not_set_the_clock_hears_who_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_clock: int, _value: float) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(time, "clock_settime", refuse)
    with pytest.raises(IdentityError, match="ExecStartPre"):
        floor_of(tmp_path).set_system_clock()
