"""Answers for the program around an agent: from its event loop, awaited, bounded, cancellable."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from broker.branches import Branch
from broker.config import BrokerConfig
from broker.drive import Effect
from broker.messages import Assignment
from broker.transport import Transport
from edge_agent.answers import Answer, Answers, Bounds, Predictor
from edge_agent.data import DeviceData, load_device_data
from edge_agent.enquiries import Enquiry, Health
from edge_agent.errors import AgentError, InputError, NotReady, Overloaded, Stopped
from edge_agent.exit_policy import ExitPolicy, Limits
from edge_agent.identity.keeper import IdentityKeeper, with_name
from edge_agent.pictures import PictureSpec
from edge_agent.privacy import Privacy
from edge_agent.served import DiskServed, ServedStore
from edge_agent.service import last_will, make_learners, new_boot, run_agent
from edge_agent.serving import Build, ServingMachine, State
from edge_agent.settings import AgentSettings
from edge_agent.snapshots import DiskSnapshots

PATIENCE_S = 5.0
"""How much longer than promised an answer is waited for, before its machine is given up."""
HEALTH_S = 5.0
_POLL_S = 0.05
_FIRST_MESSAGES = 2**52

T = TypeVar("T")


class EdgeService:
    """Hands requests to the machine that answers, and its answers to who awaits them.

    It belongs to one event loop. Give it to ``run_agent``, which opens it while the agent runs.
    ``pictures`` is what the network takes, ``build`` and ``store`` are the engine's and the state
    folder's unless others are given.
    """

    def __init__(
        self,
        settings: AgentSettings,
        pictures: PictureSpec,
        *,
        build: Build | None = None,
        store: ServedStore | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pictures = pictures
        self._clock = clock
        self._deadline_s = settings.answer_deadline_s
        policy = ExitPolicy(
            Limits(
                requests_per_h=settings.offload_requests_per_h,
                bytes_per_h=settings.offload_bytes_per_h,
                burst_s=settings.offload_burst_s,
                latency_s=settings.latency_s,
            ),
            seed=zlib.crc32(settings.device.encode()),
            clock=clock,
        )
        answers = Answers(
            policy,
            clock=clock,
            bounds=Bounds(
                waiting_images=settings.answer_queue,
                batch_images=settings.answer_batch,
                message_images=settings.answer_batch,
            ),
            # What measures a run counts from 0; an earlier life of this device counted elsewhere.
            first_message=2**32 + secrets.randbelow(_FIRST_MESSAGES),
            cpu_clock=time.thread_time,
        )
        self.machine = ServingMachine(
            settings.device,
            answers,
            policy,
            build=build or _build_with_engine(settings),
            store=store or DiskServed(settings.state_dir),
            clock=clock,
            privacy=Privacy.by(settings, settings.state_dir),
        )
        self._branch: Branch | None = None
        self._awaited: set[asyncio.Future[Any]] = set()

    def open(self, branch: Branch) -> None:
        """Requests go to the machine by this branch from now on."""
        self._branch = branch

    def close(self) -> None:
        """The machine has stopped: what is awaited fails."""
        self._branch = None
        for future in list(self._awaited):
            _settle(future, Stopped("the agent has stopped: ask again when it runs"))

    async def predict(
        self,
        images: ArrayLike,
        *,
        labels: ArrayLike | None = None,
        deadline_s: float | None = None,
    ) -> Answer:
        """Answer images: pixels or normalised, one or several, as ``check_images`` takes them.

        There is an answer, or an error, in ``deadline_s`` seconds (``answer_deadline_s`` of the
        settings). With ``labels`` (N,) accuracy is counted. A caller that is cancelled withdraws
        its request.

        Raises:
            InputError: these are no such images.
            NotReady: the device has no trained parameters yet.
            Overloaded: newer requests came before this one could be looked at.
            Stopped: the agent does not run, or stopped meanwhile.
        """
        checked = self.pictures.check(images)
        wanted = self._deadline_s if deadline_s is None else deadline_s
        if not 0 < wanted <= 600:
            raise InputError(f"a deadline of {wanted} s: must be above 0 and at most 600")
        truth = None if labels is None else np.array(labels)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()

        def done(answer: Answer | AgentError) -> None:  # in the machine's thread
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody awaits it
                loop.call_soon_threadsafe(_settle, future, answer)

        enquiry = Enquiry(checked, truth, wanted, self._clock(), done)
        try:
            return await self._call(partial(self.machine.ask, enquiry), future, wanted + PATIENCE_S)
        finally:
            if future.cancelled():  # with its caller
                enquiry.cancelled = True
                if self._branch is not None:
                    self._branch.call(partial(self.machine.cancel, enquiry))

    async def predict_pictures(
        self, pictures: Sequence[bytes], *, deadline_s: float | None = None
    ) -> Answer:
        """Answer whole JPEG, PNG or WebP files. Raises what :meth:`predict` does."""
        if not pictures:
            raise InputError("there are no pictures to answer")
        images = await asyncio.to_thread(lambda: [self.pictures.read(data) for data in pictures])
        return await self.predict(np.stack(images), deadline_s=deadline_s)

    async def health(self) -> Health:
        """How the device answers. Raises :class:`Stopped` or :class:`Overloaded`."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Health] = loop.create_future()

        def look() -> list[Effect]:
            found = self.machine.health()
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_settle, future, found)
            return []

        return await self._call(look, future, HEALTH_S)

    async def ready(self, timeout_s: float) -> Health:
        """Wait until there are parameters to answer with. Raises :class:`NotReady` if not."""
        end = self._clock() + timeout_s
        while True:
            with contextlib.suppress(Stopped, Overloaded):
                health = await self.health()
                if health.version is not None:
                    return health
            if self._clock() >= end:
                raise NotReady(f"no trained parameters have come in {timeout_s:g} s")
            await asyncio.sleep(_POLL_S)

    async def _call(
        self, run: Callable[[], Sequence[Effect]], future: asyncio.Future[T], within_s: float
    ) -> T:
        if self._branch is None:
            raise Stopped("the agent is not running: start it first")
        if not self._branch.call(run):
            raise Overloaded("too many requests wait for this device: ask less, or later")
        self._awaited.add(future)
        try:
            async with asyncio.timeout(within_s):
                return await future
        except TimeoutError:
            raise Stopped(
                f"the agent has not answered in {within_s:g} s: look at its log"
            ) from None
        finally:
            self._awaited.discard(future)
            future.cancel()


class Edge:
    """A whole agent that answers: it takes part in the fleet as long as the context lasts.

    ::

        async with Edge(AgentSettings(device="camera-1"), BrokerConfig(url="mqtt://…")) as edge:
            answer = await edge.predict(images)

    ``data`` and ``transport`` are made from the settings unless they are given; a transport must
    have ``last_will(settings, boot)`` as its will.
    """

    def __init__(
        self,
        settings: AgentSettings,
        broker: BrokerConfig | None = None,
        *,
        data: DeviceData | None = None,
        transport: Transport | None = None,
        boot: str | None = None,
    ) -> None:
        self._settings = settings
        self._broker = broker or BrokerConfig()
        self._data = data
        self._transport = transport
        self._boot = boot or new_boot()
        self._stop = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._service: EdgeService | None = None

    async def __aenter__(self) -> Self:
        """Enrols the device first, if it has to be.

        Raises ``DataError``, ``StateError``, ``ConfigError`` or ``IdentityError`` if the device's
        data, folder, settings or identity are unusable.
        """
        settings = with_name(self._settings)
        broker, identity = self._broker, None
        if settings.identity_dir is not None:
            identity = IdentityKeeper(settings, broker)
            enrolled = await identity.ensure(self._stop)
            assert enrolled is not None, "nobody stops it before it runs"
            broker = enrolled
        data = self._data
        if data is None:
            data = await asyncio.to_thread(load_device_data, settings)
        self._service = EdgeService(settings, data.pictures)
        self._task = asyncio.create_task(
            run_agent(
                settings,
                self._transport or self._mqtt(settings, broker),
                data,
                DiskSnapshots(settings.state_dir),
                boot=self._boot,
                stop=self._stop,
                edge=self._service,
                identity=identity,
            ),
            name="agent",
        )
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the agent in good order; raises what made it fail, unless something else did."""
        assert self._task is not None
        self._stop.set()
        if exc is None:
            await self._task
        else:
            await asyncio.gather(self._task, return_exceptions=True)

    @property
    def service(self) -> EdgeService:
        """What answers. Raises what made the agent fail."""
        if self._task is None or self._service is None:
            raise Stopped("the agent is not running: use it as a context")
        if self._task.done():
            self._task.result()
        return self._service

    async def predict(
        self,
        images: ArrayLike,
        *,
        labels: ArrayLike | None = None,
        deadline_s: float | None = None,
    ) -> Answer:
        """See :meth:`EdgeService.predict`."""
        return await self.service.predict(images, labels=labels, deadline_s=deadline_s)

    async def predict_pictures(
        self, pictures: Sequence[bytes], *, deadline_s: float | None = None
    ) -> Answer:
        """See :meth:`EdgeService.predict_pictures`."""
        return await self.service.predict_pictures(pictures, deadline_s=deadline_s)

    async def health(self) -> Health:
        """See :meth:`EdgeService.health`."""
        return await self.service.health()

    async def ready(self, timeout_s: float = 600.0) -> Health:
        """See :meth:`EdgeService.ready`; also raises what made the agent fail."""
        assert self._task is not None
        waiting = asyncio.create_task(self.service.ready(timeout_s), name="ready")
        try:
            await asyncio.wait({waiting, self._task}, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                self._task.result()
                raise Stopped("the agent has ended: its run is over")
            return await waiting
        finally:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)

    def _mqtt(self, settings: AgentSettings, broker: BrokerConfig) -> Transport:
        from broker.mqtt import MqttTransport

        return MqttTransport(broker, settings.device, will=last_will(settings, self._boot))


def _build_with_engine(settings: AgentSettings) -> Build:
    """The engine is imported when the first predictor is made, in the machine's thread."""
    made: list[Build] = []

    def build(assignment: Assignment, state: State) -> Predictor:
        if not made:
            made.append(make_learners(settings).predictor)
        return made[0](assignment, state)

    return build


def _settle(future: asyncio.Future[Any], outcome: Any) -> None:
    if future.done():
        return
    if isinstance(outcome, AgentError):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
