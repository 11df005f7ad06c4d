from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import pytest

from broker.drive import INBOX, SENDING, Effect, Subscribe, drive
from broker.envelopes import Envelope, down, down_later, encode_message, to_cut, up
from broker.errors import ConnectRefused
from broker.frames import split
from broker.link import Arrival, Link
from broker.memory import MemoryBroker, MemoryTransport
from broker.messages import Command, Parameters, Request, Status
from broker.serving_messages import Prediction
from broker.topics import COORDINATOR, Address, Topics
from tests.tiny import Clock

TOPICS = Topics("fleet")
LIMIT_S = 60.0
Heard = str | int  # a call by its name, a message by its number
Script = Mapping[Heard, Sequence[Effect] | Callable[[], Sequence[Effect] | None]]


def fail() -> Sequence[Effect]:
    raise ArithmeticError


def say(*numbers: int) -> list[Effect]:
    return [down("d", Prediction(request=number, version=0)) for number in numbers]


def say_later(first: Callable[[], object], *numbers: int) -> list[Effect]:
    def make(number: int) -> Prediction:
        first()
        return Prediction(request=number, version=0)

    return [down_later("d", Prediction, partial(make, number)) for number in numbers]


def ask(*numbers: int) -> list[Envelope]:
    return [up("d", Request(what="parameters", version=number)) for number in numbers]


def pause(event: threading.Event) -> None:
    assert event.wait(LIMIT_S), "even a test that went wrong has to end"


class Puppet:
    """A machine that does what its script says and tells the test what it was given."""

    def __init__(self, script: Script | None = None) -> None:
        self.script: Script = script or {}
        self.finished = self.has_work = False
        self.next_tick: float | None = None
        self.threads: set[int] = set()
        self.connected = partial(self._step, "connected")
        self.disconnected = partial(self._step, "disconnected")
        self.tick = partial(self._step, "tick")
        self.work = partial(self._step, "work")
        self._heard: asyncio.Queue[Heard] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    async def heard(self, count: int) -> list[Heard]:
        return [await self._heard.get() for _ in range(count)]

    def receive(self, envelope: Envelope) -> Sequence[Effect]:
        assert isinstance(envelope.message, Request | Parameters)
        return self._step(envelope.message.version)

    def _step(self, what: Heard) -> Sequence[Effect]:
        self.threads.add(threading.get_ident())
        if what == "tick":
            self.next_tick = None
        elif what == "work":
            self.has_work = False
        self._loop.call_soon_threadsafe(self._heard.put_nowait, what)
        does = self.script.get(what, ())
        return (does() if callable(does) else does) or ()


class Wire(MemoryTransport):
    """A client on a slow line, on which nothing moves while ``open`` is not set."""

    def __init__(self, broker: MemoryBroker, client_id: str) -> None:
        super().__init__(broker, client_id)
        self.open, self._line, self._calls = asyncio.Event(), asyncio.Lock(), asyncio.Semaphore(0)
        self.latency_s, self.under_way, self.published = 0.0, 0, 0

    async def publish(self, topic: str, payload: bytes, *, qos: int, retain: bool = False) -> None:
        await self._pass()
        await super().publish(topic, payload, qos=qos, retain=retain)
        self.published += 1

    async def called(self, count: int) -> None:
        for _ in range(count):
            await self._calls.acquire()

    async def subscribe(self, *filters: str, qos: int = 1) -> None:
        await self._pass()
        await asyncio.sleep(self.latency_s)  # it takes longer than a message
        await super().subscribe(*filters, qos=qos)

    async def _pass(self) -> None:
        self.under_way += 1
        self._calls.release()
        try:
            await asyncio.sleep(self.latency_s)
            async with self._line:
                await self.open.wait()
        finally:
            self.under_way -= 1


class Witness:
    """A link's observer: which kinds arrived, and why something was dropped."""

    def __init__(self) -> None:
        self.news: asyncio.Queue[str] = asyncio.Queue()

    def sent(self, address: Address, size: int) -> None: ...

    def received(self, address: Address, size: int) -> None:
        self.news.put_nowait(address.kind)

    def dropped(self, reason: str, device: str | None) -> None:
        self.news.put_nowait(reason)


@dataclass
class Stage:
    """A driven machine as the coordinator, and a device at the other end of the broker."""

    hub: MemoryBroker
    wire: Wire
    link: Link
    witness: Witness
    device_link: Link
    stop: asyncio.Event
    driving: asyncio.Task[None]

    async def send(self, envelopes: Sequence[Envelope]) -> None:
        for envelope in envelopes:
            await self.device_link.send(envelope)

    async def said(self, count: int) -> list[int]:
        events = [await self.device_link.receive() for _ in range(count)]
        messages = [event.envelope.message for event in events if isinstance(event, Arrival)]
        return [message.request for message in messages if isinstance(message, Prediction)]


@asynccontextmanager
async def driven(
    machine: Puppet,
    *,
    hub: MemoryBroker | None = None,
    clock: Callable[[], float] = time.monotonic,
    flush_s: float = LIMIT_S,
    is_open: bool = True,
    housekeeping_s: float = 3600.0,
    turned: Callable[[], None] = lambda: None,
) -> AsyncIterator[Stage]:
    """Drive ``machine``; nothing of it may be left afterwards."""
    hub, stop, witness = hub or MemoryBroker(), asyncio.Event(), Witness()
    wire, device = Wire(hub, COORDINATOR), MemoryTransport(hub, "d")
    link = Link(wire, TOPICS, observer=witness, clock=clock)
    device_link = Link(device, TOPICS, observer=Witness(), clock=clock)
    async with asyncio.timeout(LIMIT_S), device, wire:
        await MemoryTransport.subscribe(wire, *TOPICS.coordinator_filters())
        await device_link.subscribe(*TOPICS.device_filters("d"))
        await device_link.receive()
        if is_open:
            wire.open.set()
        tasks, threads = asyncio.all_tasks(), set(threading.enumerate())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("broker.drive.HOUSEKEEPING_S", housekeeping_s)
            drives = drive(machine, link, clock=clock, stop=stop, flush_s=flush_s, turned=turned)
            driving = asyncio.create_task(drives)
            try:
                yield Stage(hub, wire, link, witness, device_link, stop, driving)
            finally:
                ended = driving.done()
                stop.set()
                await asyncio.wait([driving])
        if not ended:
            await driving
        assert asyncio.all_tasks() <= tasks
        # Those in which asyncio waited for the others stay until its loop ends.
        left = [thread.name for thread in threading.enumerate() if thread not in threads]
        assert [name for name in left if not name.startswith("asyncio_")] == []
        assert wire.under_way == 0


async def test_it_ends_when_the_machine_has_finished_and_all_is_sent() -> None:
    def farewell() -> Sequence[Effect]:
        machine.finished = True
        return [Subscribe(TOPICS.cut_filters(1)), *say(*range(1, SENDING))]

    machine = Puppet({7: farewell})
    async with driven(machine) as stage:
        stage.wire.latency_s = 0.01
        await stage.send(ask(7))
        await stage.driving
        assert await stage.said(SENDING - 1) == list(range(1, SENDING))


@pytest.mark.parametrize("fails", [False, True])
async def test_when_stopped_the_step_under_way_still_counts_and_no_other(fails: bool) -> None:
    stopped = threading.Event()

    def long_step() -> Sequence[Effect]:
        pause(stopped)
        return fail() if fails else say(*range(2 * SENDING))

    machine = Puppet({0: long_step, 1: long_step})
    async with driven(machine) as stage:
        await stage.send(ask(0, 1))
        assert await machine.heard(2) == ["connected", 0]
        stage.stop.set()
        for _ in range(10):  # it hears of the stop
            await asyncio.sleep(0)
        stopped.set()
        with pytest.raises(ArithmeticError) if fails else nullcontext():
            await stage.driving
        if not fails:
            await stage.link.send(down("d", Prediction(request=99, version=0)))
            assert await stage.said(2 * SENDING + 1) == [*range(2 * SENDING), 99], "then goodbye"


@pytest.mark.parametrize("at", ["connected", "disconnected", "message", "tick", "work", "making"])
async def test_what_the_machine_raises_comes_out_and_nothing_is_left(at: str) -> None:
    answer = say_later(fail, 1) if at == "making" else say(1)
    machine = Puppet({7: answer, 8 if at == "message" else at: fail})
    async with driven(machine, is_open=False) as stage:
        await stage.send(ask(7))
        if at == "disconnected":
            await stage.wire.called(1)
            stage.wire.drop()
        machine.next_tick, machine.has_work = 0.0, True
        await stage.send(ask(8))
        with pytest.raises(ArithmeticError):
            await stage.driving


async def test_a_broker_that_refuses_this_client_ends_it() -> None:
    machine = Puppet()
    async with driven(machine) as stage:
        await machine.heard(1)
        async with MemoryTransport(stage.hub, COORDINATOR):
            with pytest.raises(ConnectRefused):
                await stage.driving


@pytest.mark.parametrize("cancel", [False, True])
@pytest.mark.parametrize("effects", [say(*range(40)), [Subscribe(TOPICS.cut_filters(1))]])
async def test_what_is_never_answered_is_given_up(effects: list[Effect], cancel: bool) -> None:
    async with driven(Puppet({"connected": effects}), is_open=False, flush_s=0.01) as stage:
        await stage.wire.called(1)
        (stage.driving.cancel if cancel else stage.stop.set)()
        await asyncio.wait([stage.driving])
        assert stage.driving.cancelled() == cancel


async def test_messages_are_sent_in_order_and_the_machine_has_one_thread_of_its_own() -> None:
    count = 3 * SENDING
    machine = Puppet({n: say(*range(n * count, (n + 1) * count)) for n in range(3)})
    async with driven(machine) as stage:
        await stage.send(ask(0, 1, 2))
        assert await stage.said(3 * count) == list(range(3 * count))
        assert await machine.heard(4) == ["connected", 0, 1, 2]
    assert len(machine.threads) == len(machine.threads - {threading.get_ident()}) == 1


async def test_a_subscription_is_made_before_what_follows_and_replaces_only_the_last_one() -> None:
    cut = [TOPICS.cut_filters(layer) for layer in range(2 * SENDING)]
    wanted = [*map(Subscribe, cut), Subscribe((*cut[1], *cut[2])), Subscribe(cut[2])]
    machine = Puppet({"connected": [*wanted, *say(0)]})
    async with driven(machine) as stage:
        stage.wire.latency_s = 0.001
        await stage.wire.called(len(wanted))
        news = [Parameters(run="r", version=n, cut=2, state=b"") for n in range(len(cut))]
        await stage.send([*map(to_cut, range(len(cut)), news), *ask(99)])
        assert await stage.said(1) == [0]
        assert await machine.heard(3) == ["connected", 2, 99]


async def test_the_machine_and_the_link_go_on_while_messages_are_made() -> None:
    heard = threading.Event()

    def make() -> None:
        machine._step("making")
        pause(heard)

    machine = Puppet({7: [*say_later(make, 0), *say_later(int, 1, 2)], 8: heard.set})
    async with driven(machine) as stage:
        await stage.send(ask(7))
        assert await machine.heard(3) == ["connected", 7, "making"]
        await stage.send(ask(8))
        assert await stage.said(3) == [0, 1, 2]


async def test_a_machine_that_never_stops_talking_waits_for_a_slow_link() -> None:
    made = most = 0

    def talk() -> Sequence[Effect]:
        nonlocal made, most
        machine.has_work = made < 200 * SENDING
        made += 1
        most = max(most, made - stage.wire.published)
        return say(made - 1)

    machine = Puppet({"connected": talk, "work": talk})
    async with driven(machine, is_open=False) as stage:
        await stage.wire.called(SENDING)
        stage.wire.open.set()
        assert await stage.said(10 * SENDING) == list(range(10 * SENDING))
        stage.stop.set()
        await stage.driving
        assert most <= SENDING + 1, "one more is made before it finds no room"
        assert await stage.said(made - 10 * SENDING) == list(range(10 * SENDING, made))


async def test_a_refused_message_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    refused = [down("d", Command(command="stop")) for _ in range(2 * SENDING)]
    hub = MemoryBroker(allow=lambda client, access, topic: not topic.endswith("command"))
    async with driven(Puppet({"connected": [*refused, *say(0)]}), hub=hub) as stage:
        assert await stage.said(1) == [0]
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert ["down/command" in record.getMessage() for record in errors] == [True] * len(refused)


async def test_a_flood_of_messages_is_held_back_and_none_is_lost() -> None:
    go = threading.Event()
    machine = Puppet({0: lambda: pause(go)})
    async with driven(machine) as stage:
        await stage.send(ask(0))
        assert await machine.heard(2) == ["connected", 0]
        await stage.send(ask(*range(1, 5 * INBOX)))
        assert stage.witness.news.qsize() == 1 + INBOX
        go.set()
        assert await machine.heard(5 * INBOX - 1) == list(range(1, 5 * INBOX))


async def test_the_machine_hears_of_the_connection_and_outlives_it() -> None:
    machine = Puppet({"connected": say(99), "disconnected": say(*range(3 * SENDING))})
    async with driven(machine) as stage:
        assert await stage.said(1) == [99]
        stage.hub.stop()
        await stage.wire.called(1 + 3 * SENDING)
        stage.hub.start()
        while await stage.said(1) != [99]:
            pass
        assert await machine.heard(2) == ["connected", "disconnected"]


async def test_messages_come_first_then_time_then_work() -> None:
    go, clock = threading.Event(), Clock()

    def wait() -> None:
        pause(go)
        machine.next_tick, machine.has_work = clock(), True

    machine = Puppet({"connected": wait})
    async with driven(machine, clock=clock) as stage:
        await stage.send(ask(0, 1))
        assert [await stage.witness.news.get() for _ in range(2)] == ["request", "request"]
        go.set()
        assert await machine.heard(5) == ["connected", 0, 1, "tick", "work"]


async def test_a_tick_comes_when_it_is_due_and_not_before() -> None:
    due = time.monotonic() + 0.2

    def check() -> None:
        assert time.monotonic() >= due

    machine = Puppet({"tick": check})
    machine.next_tick = due
    async with driven(machine) as stage:
        while time.monotonic() < due - 0.1:
            await stage.send(ask(7))
        while await machine.heard(1) != ["tick"]:
            pass


async def test_now_and_then_it_looks_for_work_and_for_what_stays_incomplete() -> None:
    machine, clock = Puppet(), Clock()
    async with driven(machine, clock=clock, housekeeping_s=0.01) as stage:
        first, _ = split(encode_message(Status(state="online", connection="c")), 1, 30)
        await stage.wire.publish(TOPICS.up("d", "status"), first, qos=1)
        assert await stage.witness.news.get() == "status"
        clock.advance(61)
        assert await stage.witness.news.get() == "reassembly_timeout"
        machine.has_work = True
        assert await machine.heard(2) == ["connected", "work"]


async def test_a_thread_with_nothing_to_do_turns() -> None:
    turns = threading.Semaphore(0)
    async with driven(Puppet(), housekeeping_s=0.001, turned=turns.release):
        for _ in range(10):
            assert await asyncio.to_thread(turns.acquire, timeout=LIMIT_S)


async def test_a_thread_that_waits_for_the_link_turns() -> None:
    turns = threading.Semaphore(0)
    machine = Puppet({"connected": lambda: say(*range(SENDING + 1))})
    async with driven(machine, is_open=False, turned=turns.release) as stage:
        assert await asyncio.to_thread(turns.acquire, timeout=LIMIT_S)
        stage.wire.open.set()


async def test_a_thread_that_is_stuck_in_a_step_does_not_turn() -> None:
    turns, stuck, released = threading.Semaphore(0), threading.Event(), threading.Event()

    def hang() -> None:
        stuck.set()
        pause(released)

    machine = Puppet({"work": hang})
    machine.has_work = True
    async with driven(machine, housekeeping_s=0.001, turned=turns.release):
        assert await asyncio.to_thread(stuck.wait, LIMIT_S)
        while turns.acquire(blocking=False):
            pass
        assert not await asyncio.to_thread(turns.acquire, timeout=0.05)
        released.set()
        assert await asyncio.to_thread(turns.acquire, timeout=LIMIT_S)
