"""A fleet's authority and its desk, as devices see them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography import x509

from broker.envelopes import Envelope, to_claim
from broker.identity_messages import Certificate, Enrol, Renew
from broker.link import Arrival, Link
from broker.topics import Address, ClaimTopics
from broker.transport import Transport
from coordinator.identity.authority import Authority
from coordinator.identity.keys import key_to_pem, new_key, to_pem
from edge_agent.identity.folder import IdentityFolder, Issued
from edge_agent.readings import LinkMeters

DAY_S = 86_400.0


class Issuer:
    """Issues what is asked for. ``wall`` is the time of day by which certificates begin."""

    def __init__(self, folder: Path, wall: Callable[[], float] = time.time) -> None:
        self.authority = Authority.create(folder, "fleet", clock=wall)
        self.wall = wall

    def token(self, claim: str = "t", days: float = 7.0) -> bytes:
        key = new_key()
        ca, claims = self.authority.ca("fleet"), self.authority.issue_claim
        return to_pem(ca) + to_pem(claims(claim, key.public_key(), days)) + key_to_pem(key)

    def answer(
        self, question: Enrol | Renew, name: str, *, days: float = 30.0, **changes: Any
    ) -> Certificate:
        key: Any = x509.load_der_x509_csr(bytes(question.csr)).public_key()
        fields = {
            "nonce": question.nonce,
            "device": name,
            "certificate": to_pem(self.authority.issue_device(name, key, days)),
            "return_certificate": to_pem(self.authority.issue_return(name, key)),
            "ca": to_pem(self.authority.ca("fleet")),
            "now": self.wall(),
        }
        return Certificate.model_validate(fields | changes)

    def enrolled(self, folder: Path, device: str, *, days: float = 30.0) -> IdentityFolder:
        """The folder of a device that has what it needs."""
        identity = IdentityFolder(folder)
        key = identity.key().public_key()
        identity.put(
            Issued(
                self.authority.issue_device(device, key, days),
                self.authority.issue_return(device, key),
                [self.authority.ca("fleet")],
            )
        )
        return identity


class Desk:
    """Answers who comes with a claim: ``answers`` one after the other, the last for ever.

    None is no answer.
    """

    def __init__(
        self, transport: Transport, *answers: Callable[[Enrol], Certificate] | None
    ) -> None:
        self.asked: list[tuple[str, Enrol]] = []
        self._transport = transport
        self._answers = list(answers)

    async def run(self, ready: asyncio.Event) -> None:
        async with self._transport as transport:
            topics = ClaimTopics("fleet")
            link = Link(transport, topics, observer=LinkMeters(), clock=time.monotonic)
            await link.subscribe("+/up/#")
            while True:
                match await link.receive():
                    case Arrival(Envelope(Address(device=str(claim)), Enrol() as question)):
                        self.asked.append((claim, question))
                        answer = self._answers[0]
                        if len(self._answers) > 1:
                            self._answers.pop(0)
                        if answer is not None:
                            await link.send(to_claim(claim, answer(question)))
                    case _:
                        ready.set()
