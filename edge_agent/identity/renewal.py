"""A device asks for its next certificate in time: a machine that ``broker.drive`` drives."""

from __future__ import annotations

import logging
import math
import random
import secrets
from collections.abc import Callable

from broker.drive import Effect
from broker.envelopes import Envelope, up
from broker.identity_messages import Certificate, Renew
from edge_agent.errors import IdentityError, StateError
from edge_agent.identity.clock import ClockFloor
from edge_agent.identity.folder import IdentityFolder
from edge_agent.identity.issued import check_issued
from edge_agent.identity.keys import signing_request, valid_from, valid_until

log = logging.getLogger("splitfleet.identity")

LEFT = (1 / 4, 1 / 3)
"""Of a certificate's life is left when the next is asked for: somewhere in between, so that devices
enrolled on one day do not all ask on another."""
PATIENCE_S = (1.0, 3600.0)
"""Between two times of asking; in between a twelfth of what is left."""
CONFIRM_S = 21_600.0
"""How often the clock's floor is raised while there is a connection."""


class Renewal:
    """Renews the certificate in ``folder``, of the same key; the next connection is made with it.

    ``clock`` is monotonic, in seconds. What goes wrong is logged and tried again: what is at stake
    comes later, and then there is the way back (``edge_agent.identity.claimant``).
    """

    finished = False
    has_work = False

    def __init__(
        self,
        device: str,
        folder: IdentityFolder,
        floor: ClockFloor,
        *,
        clock: Callable[[], float],
        rng: random.Random | None = None,
    ) -> None:
        self._device = device
        self._folder = folder
        self._floor = floor
        self._clock = clock
        self._rng = rng or random.Random()
        self._connected = False
        self._asked: Renew | None = None
        self._again = self._confirm = clock()
        self._due = self._until = math.inf

    @property
    def next_tick(self) -> float | None:
        """When :meth:`tick` has something to do, on the clock."""
        if not self._connected:
            return None
        due = self._clock() + self._due - self._floor.now()
        return min(self._confirm, max(self._again, due))

    def connected(self) -> list[Effect]:
        """There is a connection (again): with a certificate that may have come another way."""
        self._connected = True
        self._again = self._confirm = self._clock()
        try:
            certificate = self._folder.certificate()
        except IdentityError as exc:
            log.error("cannot renew the certificate: %s", exc)  # noqa: TRY400 it says it all
            return []
        if certificate is not None and valid_until(certificate) != self._until:
            self._schedule(valid_from(certificate), valid_until(certificate))
        return []

    def disconnected(self) -> list[Effect]:
        """Nothing can be asked now."""
        self._connected = False
        return []

    def tick(self) -> list[Effect]:
        """Ask, if it is time to."""
        now = self._clock()
        if not self._connected:
            return []
        if now >= self._confirm:
            self._floor.confirm()
            self._confirm = now + CONFIRM_S
        if now < self._again or self._floor.now() < self._due:
            return []
        self._again = now + self._patience() * self._rng.uniform(0.5, 1.0)
        try:
            self._asked = self._asked or Renew(
                nonce=secrets.token_hex(16),
                csr=signing_request(self._folder.key(), self._device),
            )
        except IdentityError as exc:
            log.error("cannot renew the certificate: %s", exc)  # noqa: TRY400 as above
            return []
        return [up(self._device, self._asked)]

    def receive(self, envelope: Envelope) -> list[Effect]:
        """An answer of the coordinator."""
        message = envelope.message
        asked = self._asked
        if isinstance(message, Certificate) and asked is not None and message.nonce == asked.nonce:
            self._asked = None
            if message.refused is not None:
                log.warning("the coordinator does not renew the certificate: %s", message.refused)
            else:
                self._take(message)
        return []

    def work(self) -> list[Effect]:
        """There is never any."""
        return []

    def _take(self, answer: Certificate) -> None:
        try:
            issued = check_issued(
                answer,
                device=self._device,
                key=self._folder.key(),
                authorities=self._folder.authorities(),
                comeback_needed=not self._folder.return_file.exists(),
            )
            self._folder.put(issued)
        except (IdentityError, StateError) as exc:
            log.error("the certificate is not renewed: %s", exc)  # noqa: TRY400 as above
            return
        self._floor.confirm(answer.now)
        # From now, not from when it begins, which may be earlier for the sake of late clocks.
        self._schedule(self._floor.now(), valid_until(issued.device))
        log.info("the certificate is renewed until %s", issued.device.not_valid_after_utc)

    def _schedule(self, start: float, until: float) -> None:
        self._until = until
        self._due = until - (until - start) * self._rng.uniform(*LEFT)

    def _patience(self) -> float:
        least, most = PATIENCE_S
        left = self._until - self._floor.now()
        return min(most, max(least, left / 12)) if left > 0 else most / 12
