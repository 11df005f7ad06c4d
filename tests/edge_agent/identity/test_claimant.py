from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from broker.identity_messages import Certificate, Enrol
from broker.memory import MemoryBroker, MemoryTransport
from broker.topics import ClaimTopics
from broker.transport import Transport
from edge_agent.errors import IdentityError
from edge_agent.identity import claimant
from edge_agent.identity.claimant import Claimant
from edge_agent.identity.clock import ClockFloor
from edge_agent.identity.folder import Credentials, IdentityFolder
from edge_agent.readings import LinkMeters
from tests.device_identity import Desk, Issuer

NEVER = asyncio.Event


@pytest.fixture
def issuer(tmp_path: Path) -> Issuer:
    return Issuer(tmp_path / "authority")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claimant, "AGAIN_S", (0.01, 0.05))
    monkeypatch.setattr(claimant, "REFUSED_S", 0.05)


@asynccontextmanager
async def desk(
    broker: MemoryBroker, *answers: Callable[[Enrol], Certificate] | None
) -> AsyncIterator[Desk]:
    served, ready = Desk(MemoryTransport(broker, "coordinator"), *answers), asyncio.Event()
    task = asyncio.create_task(served.run(ready))
    await ready.wait()
    yield served
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def make_claimant(
    identity: IdentityFolder,
    broker: MemoryBroker,
    device: str = "d",
    transport: Callable[[MemoryBroker, str], Transport] = MemoryTransport,
) -> Claimant:
    def connect(credentials: Credentials) -> Transport:
        return transport(broker, credentials.name)

    return Claimant(
        device,
        identity,
        ClockFloor(identity),
        connect,
        ClaimTopics("fleet"),
        observer=LinkMeters(),
        clock=time.monotonic,
        serial="0000-1",
        device_class="pi4",
        software="splitfleet 0",
    )


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 what is waited for tells nobody
        await asyncio.sleep(0.01)


def with_token(folder: Path, token: bytes) -> IdentityFolder:
    identity = IdentityFolder(folder)
    identity.put_token(token)
    return identity


async def test_a_device_with_a_token_is_enrolled(tmp_path: Path, issuer: Issuer) -> None:
    broker, identity = MemoryBroker(), with_token(tmp_path / "device", issuer.token())
    async with desk(broker, lambda asked: issuer.answer(asked, "d")) as served:
        assert await make_claimant(identity, broker).enrol(NEVER())
    ((claim, asked),) = served.asked
    assert claim == "claim.t"
    assert (asked.wanted, asked.serial, asked.device_class) == ("d", "0000-1", "pi4")
    assert identity.for_fleet().name == "d"
    assert not identity.claim_file.exists()


async def test_a_device_whose_certificate_has_ended_comes_back(
    tmp_path: Path, issuer: Issuer
) -> None:
    broker, identity = MemoryBroker(), issuer.enrolled(tmp_path / "device", "d", days=0.001)
    key, before = identity.key_file.read_bytes(), identity.device_file.read_bytes()
    async with desk(
        broker, lambda asked: issuer.answer(asked, "d", return_certificate=None)
    ) as served:
        assert await make_claimant(identity, broker).enrol(NEVER())
    assert [claim for claim, _ in served.asked] == ["back.d"]
    assert identity.key_file.read_bytes() == key
    assert identity.device_file.read_bytes() != before
    assert identity.return_file.exists()


async def test_a_coordinator_that_is_away_is_waited_for(
    tmp_path: Path, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claimant, "ATTEMPT_S", 0.1)
    broker, identity = MemoryBroker(), with_token(tmp_path / "device", issuer.token())
    device = make_claimant(identity, broker)
    enrolling = asyncio.create_task(device.enrol(NEVER()))
    await until(lambda: device.problem is not None)
    assert device.problem is not None
    assert "does the coordinator run" in device.problem
    async with desk(broker, lambda asked: issuer.answer(asked, "d")):
        assert await enrolling
    assert device.problem is None


async def test_the_same_question_is_asked_until_it_is_answered(
    tmp_path: Path, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claimant, "ATTEMPT_S", 0.1)
    broker, identity = MemoryBroker(), with_token(tmp_path / "device", issuer.token())
    async with desk(broker, None, None, lambda asked: issuer.answer(asked, "d")) as served:
        assert await make_claimant(identity, broker).enrol(NEVER())
    assert len(served.asked) == 3
    assert len({asked.nonce for _, asked in served.asked}) == 1


async def test_a_broker_that_is_away_is_waited_for(tmp_path: Path, issuer: Issuer) -> None:
    broker, identity = MemoryBroker(), with_token(tmp_path / "device", issuer.token())
    async with desk(broker, lambda asked: issuer.answer(asked, "d")):
        broker.stop()
        device = make_claimant(identity, broker)
        enrolling = asyncio.create_task(device.enrol(NEVER()))
        await until(lambda: device.problem is not None)
        broker.start()
        assert await enrolling


async def test_a_refusal_is_logged_and_asked_again(
    tmp_path: Path, issuer: Issuer, caplog: pytest.LogCaptureFixture
) -> None:
    broker, identity = MemoryBroker(), with_token(tmp_path / "device", issuer.token())

    def refuse(asked: Enrol) -> Certificate:
        return Certificate(nonce=asked.nonce, device="d", now=0.0, refused="the token is used up")

    with caplog.at_level(logging.WARNING):
        async with desk(broker, refuse, lambda asked: issuer.answer(asked, "d")) as served:
            assert await make_claimant(identity, broker).enrol(NEVER())
    assert "the token is used up" in caplog.text
    first, second = (asked for _, asked in served.asked)
    assert first.nonce != second.nonce


async def test_a_wrong_answer_is_not_taken(
    tmp_path: Path, issuer: Issuer, caplog: pytest.LogCaptureFixture
) -> None:
    broker, identity = MemoryBroker(), with_token(tmp_path / "device", issuer.token())
    with caplog.at_level(logging.WARNING):
        async with desk(
            broker,
            lambda asked: issuer.answer(asked, "other"),
            lambda asked: issuer.answer(asked, "d"),
        ):
            assert await make_claimant(identity, broker).enrol(NEVER())
    assert "no certificate of d" in caplog.text


async def test_an_answer_to_another_with_the_same_token_is_not_taken(
    tmp_path: Path, issuer: Issuer
) -> None:
    broker, identity = MemoryBroker(), with_token(tmp_path / "device", issuer.token())

    def to_another(asked: Enrol) -> Certificate:
        return issuer.answer(asked, "d", nonce="another")

    async with desk(broker, to_another) as served:
        stop = asyncio.Event()
        enrolling = asyncio.create_task(make_claimant(identity, broker).enrol(stop))
        await until(lambda: bool(served.asked))
        stop.set()
        assert not await enrolling
    assert not identity.enrolled


async def test_devices_with_one_token_throw_each_other_out_and_all_get_in(
    tmp_path: Path, issuer: Issuer
) -> None:
    broker, token = MemoryBroker(), issuer.token()
    names = [f"d{number}" for number in range(6)]
    folders = {name: with_token(tmp_path / name, token) for name in names}
    async with desk(broker, lambda asked: issuer.answer(asked, asked.wanted)):
        claimants = [make_claimant(folders[name], broker, name) for name in names]
        assert all(await asyncio.gather(*(one.enrol(NEVER()) for one in claimants)))
    assert [folders[name].for_fleet().name for name in names] == names


async def test_a_device_that_is_told_to_stop_stops(tmp_path: Path, issuer: Issuer) -> None:
    broker, identity = MemoryBroker(), with_token(tmp_path / "device", issuer.token())
    stop = asyncio.Event()
    enrolling = asyncio.create_task(make_claimant(identity, broker).enrol(stop))
    await asyncio.sleep(0)
    stop.set()
    assert not await enrolling


async def test_without_token_there_is_nothing_to_wait_for(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="fleet token"):
        await make_claimant(IdentityFolder(tmp_path), MemoryBroker()).enrol(NEVER())
