"""Whoever has no certificate that holds gets one where claims are let in: the broker's second door.

That is a new device with a join token, or one that slept past the end of its certificate and comes
back with its return certificate. All holders of one token share a client id, so the broker throws
one out when the next comes; each waits then for a random time and tries again.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from broker.envelopes import Envelope
from broker.errors import ConfigError, ConnectRefused, TransportError
from broker.identity_messages import Certificate, Enrol
from broker.link import Arrival, Link, LinkObserver
from broker.topics import Address, ClaimTopics
from broker.transport import SESSION_TAKEN_OVER, Backoff, Connected, Disconnected, Transport
from edge_agent.errors import IdentityError
from edge_agent.identity.clock import ClockFloor
from edge_agent.identity.folder import Credentials, IdentityFolder
from edge_agent.identity.issued import check_issued
from edge_agent.identity.keys import signing_request

log = logging.getLogger("splitfleet.identity")

ATTEMPT_S = 20.0
"""How long one connection is waited for, and the answer on it."""
AGAIN_S = (1.0, 300.0)
"""The first wait between two attempts, and the longest; each is about twice the one before."""
REFUSED_S = 600.0
"""After a refusal: what it was for may have been put right by then, on the coordinator's side."""

T = TypeVar("T")


class Claimant:
    """Enrols ``device`` and keeps what it is given in ``folder``.

    ``connect`` makes a transport to the door for claims that shows the given credentials;
    ``serial``, ``device_class`` and ``software`` are for people. Times are in seconds.
    """

    def __init__(
        self,
        device: str,
        folder: IdentityFolder,
        floor: ClockFloor,
        connect: Callable[[Credentials], Transport],
        topics: ClaimTopics,
        *,
        observer: LinkObserver,
        clock: Callable[[], float],
        serial: str = "",
        device_class: str = "generic",
        software: str = "",
        rng: random.Random | None = None,
    ) -> None:
        self._device = device
        self._folder = folder
        self._floor = floor
        self._connect = connect
        self._topics = topics
        self._observer = observer
        self._clock = clock
        self._about = {"serial": serial, "device_class": device_class, "software": software}
        self._rng = rng or random.Random()
        self.problem: str | None = None
        """Why the last attempt brought nothing."""

    async def enrol(self, stop: asyncio.Event) -> bool:
        """Try until it is enrolled, which may take as long as the coordinator is away.

        False if ``stop`` was set before. Raises :class:`IdentityError` or :class:`StateError` if
        there is nothing to enrol with, or what is given cannot be kept.
        """
        backoff = Backoff(*AGAIN_S, self._rng)
        question = self._question()
        while not stop.is_set():
            delay = backoff.next()
            try:
                answer = await _until(stop, self._ask(question))
                if answer is None:
                    return False
                if self._take(answer):
                    return True
                delay = REFUSED_S * self._rng.uniform(0.5, 1.0)
                question = self._question()
            except (TransportError, ConfigError) as exc:
                self.problem = _explain(exc)
            except TimeoutError:
                self.problem = f"no answer in {ATTEMPT_S:g} s; does the coordinator run?"
            log.warning("not enrolled yet: %s; again in %.0f s", self.problem, delay)
            await _until(stop, asyncio.sleep(delay))
        return False

    def _question(self) -> Enrol:
        request = signing_request(self._folder.key(), self._device)
        return Enrol(nonce=secrets.token_hex(16), wanted=self._device, csr=request, **self._about)

    async def _ask(self, question: Enrol) -> Certificate:
        """One connection, one question, its answer."""
        credentials = self._folder.for_enrolment()
        name = credentials.name
        async with asyncio.timeout(ATTEMPT_S), self._connect(credentials) as transport:
            link = Link(transport, self._topics, observer=self._observer, clock=self._clock)
            await link.subscribe(*self._topics.claim_filters(name))
            while True:
                match await link.receive():
                    case Connected():
                        address = Address("claim", "enrol", device=name, direction="up")
                        await link.send(Envelope(address, question))
                    case Disconnected(reason):
                        raise TransportError(reason)
                    case Arrival(Envelope(message=Certificate() as answer)):
                        if answer.nonce == question.nonce:
                            return answer

    def _take(self, answer: Certificate) -> bool:
        """Whether the device is enrolled by this answer; if not, that is the problem."""
        folder = self._folder
        if answer.refused is not None:
            self.problem = f"the coordinator refuses: {answer.refused}"
            return False
        try:
            issued = check_issued(
                answer,
                device=self._device,
                key=folder.key(),
                authorities=folder.authorities(),
                comeback_needed=not folder.return_file.exists(),
            )
        except IdentityError as exc:
            self.problem = str(exc)
            return False
        folder.put(issued)
        self._floor.confirm(answer.now)
        self.problem = None
        log.info("enrolled as %s until %s", self._device, issued.device.not_valid_after_utc)
        return True


async def _until(stop: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """What ``work`` returns; None if ``stop`` was set before."""
    working, stopping = asyncio.create_task(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, stopping):
            task.cancel()
        await asyncio.gather(working, stopping, return_exceptions=True)


def _explain(exc: Exception) -> str:
    if isinstance(exc, ConnectRefused) and exc.reason_code == SESSION_TAKEN_OVER:
        return "another device with the same token came"
    return str(exc)
