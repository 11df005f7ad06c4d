"""The machine that answers devices who ask for certificates, beside those that train and answer.

It follows what commands do to the roster meanwhile, and keeps fresh what broker and coordinator
live on. See ``broker.drive.Machine``; it is driven in a thread of its own, because the disk is
waited for here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec

from broker.envelopes import Envelope, down, to_claim
from broker.errors import ConfigError, TopicError
from broker.identity_messages import Certificate, Enrol, Renew
from broker.maps import Buffer
from coordinator.errors import EnrolmentRefused, IdentityError
from coordinator.identity.authority import CLAIM, RETURN
from coordinator.identity.fleet import Fleet, count, find_passphrase
from coordinator.identity.keys import PublicKey, to_pem
from coordinator.identity.registration import Applicant, Issued
from coordinator.identity.standing import Standing
from coordinator.observer import Observer
from coordinator.settings import CoordinatorSettings

log = logging.getLogger("splitfleet.identity")

LOOK_S = 1.0
"""How often it is looked whether somebody has changed the roster."""
REFRESH_S = 60.0
"""How often it is looked what has come near its end."""


class Enrolment:
    """Requests in, certificates out. ``clock`` is monotonic, ``wall`` gives unix seconds."""

    def __init__(
        self,
        fleet: Fleet,
        *,
        observer: Observer,
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self._fleet = fleet
        self._observer = observer
        self._clock = clock
        self._wall = wall
        self._generation: int | None = None
        self._look_at = self._refresh_at = clock()
        self._complaint = ""
        self.retired: frozenset[str] = frozenset()
        """Devices that are no more; may be asked for in any thread."""

    def close(self) -> None:
        """Let go of the roster."""
        self._fleet.roster.close()

    # -- events -----------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Never by itself: it ends with the training machine."""
        return False

    @property
    def has_work(self) -> bool:
        """Never: all is done when a message comes or it is time."""
        return False

    @property
    def next_tick(self) -> float:
        """When it is looked at the roster again."""
        return self._look_at

    def connected(self) -> list[Envelope]:
        """Nothing follows from it."""
        return []

    def disconnected(self) -> list[Envelope]:
        """Nothing follows from it."""
        return []

    def work(self) -> list[Envelope]:
        """Nothing."""
        return []

    def receive(self, envelope: Envelope) -> list[Envelope]:
        """A request; who asks is who the topic says, which the broker enforces."""
        asking, message = envelope.address.device, envelope.message
        assert asking is not None
        match message:
            case Enrol():
                name = message.wanted
                answer = self._answer(message.nonce, name, lambda: self._enrol(asking, message))
                return [to_claim(asking, answer)]
            case Renew():
                answer = self._answer(message.nonce, asking, lambda: self._renew(asking, message))
                return [down(asking, answer)]
            case _:
                self._observer.message_dropped("unexpected_topic")
                return []

    def tick(self) -> Sequence[Envelope]:
        """See what others have done to the roster, and renew what has come near its end."""
        now = self._clock()
        self._look_at = now + LOOK_S
        try:
            generation = self._fleet.roster.generation
            if generation != self._generation or now >= self._refresh_at:
                self._refresh_at = now + REFRESH_S
                self._look_around()
                self._generation = generation
        except (IdentityError, ConfigError) as exc:
            if str(exc) != self._complaint:
                log.error("%s", exc)  # noqa: TRY400 the message says it all
            self._complaint = str(exc)
        else:
            self._complaint = ""
        return ()

    def _look_around(self) -> None:
        self.retired = self._fleet.roster.retired()
        expiry = self._fleet.refresh()
        self._observer.identity(Standing(expiry, count(self._fleet.members())))

    # -- answers ----------------------------------------------------------------------------------

    def _answer(
        self, nonce: str, name: str, decide: Callable[[], tuple[str, Issued]]
    ) -> Certificate:
        about = {"device": name}
        try:
            outcome, issued = decide()
        except EnrolmentRefused as exc:
            outcome, refused = exc.reason, str(exc)
            log.warning("%s gets no certificate: %s", name, exc, extra=about)
        except TopicError as exc:
            outcome, refused = "bad_name", str(exc)
            log.warning("%s gets no certificate: %s", name, exc, extra=about)
        except IdentityError as exc:
            outcome, refused = "unavailable", "the coordinator cannot sign now; ask again later"
            log.error("%s gets no certificate: %s", name, exc, extra=about)  # noqa: TRY400
        else:
            until = f"{issued.certificate.not_valid_after_utc:%Y-%m-%d %H:%M}"
            log.info("%s: %s, certificate until %s", name, outcome, until, extra=about)
            self._observer.certificate_asked(outcome)
            return Certificate(
                nonce=nonce,
                device=name,
                certificate=to_pem(issued.certificate),
                return_certificate=to_pem(issued.return_certificate),
                ca=to_pem(self._fleet.authority.ca("fleet")),
                now=self._wall(),
            )
        self._observer.certificate_asked(outcome)
        return Certificate(nonce=nonce, device=name, now=self._wall(), refused=refused[:256])

    def _enrol(self, asking: str, message: Enrol) -> tuple[str, Issued]:
        key = requested_key(message.csr)
        if asking.startswith(RETURN):
            if asking.removeprefix(RETURN) != message.wanted:
                raise EnrolmentRefused("bad_name", f"{asking} can only be {asking[len(RETURN) :]}")
            return "came_back", self._fleet.registration.renew(message.wanted, key)
        applicant = Applicant(
            message.wanted,
            key,
            _printable(message.serial),
            message.device_class,
            _printable(message.software),
        )
        claim = asking.removeprefix(CLAIM)
        return "enrolled", self._fleet.registration.enrol(claim, applicant)

    def _renew(self, asking: str, message: Renew) -> tuple[str, Issued]:
        key = requested_key(message.csr)
        return "renewed", self._fleet.registration.renew(asking, key)


def _printable(text: str) -> str:
    """What may be shown in a terminal: nothing that steers it."""
    return "".join(character for character in text if character.isprintable())


def requested_key(csr: Buffer) -> PublicKey:
    """The key that a request (PKCS #10, DER) is about and signed with.

    All else that it asks for is ignored. Raises :class:`EnrolmentRefused`.
    """
    try:
        request = x509.load_der_x509_csr(bytes(csr))
        key = request.public_key()
        if not isinstance(key, PublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise EnrolmentRefused("bad_request", "the request has a key that is not EC P-256")
        proven = request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion) as exc:
        raise EnrolmentRefused("bad_request", f"the request cannot be read: {exc}") from None
    if not proven:
        raise EnrolmentRefused("bad_request", "the request is not signed with its key")
    return key


def open_enrolment(
    settings: CoordinatorSettings, environ: Mapping[str, str], observer: Observer
) -> Enrolment | None:
    """The machine of the fleet that the settings name, with what was due done; None without one.

    Raises :class:`IdentityError`, and ConfigError for a ``fleet.toml`` that is wrong.
    """
    if settings.fleet_dir is None:
        return None
    fleet = Fleet.open(settings.fleet_dir, find_passphrase(environ))
    if fleet.settings.name != settings.fleet:
        raise IdentityError(
            f"{settings.fleet_dir} is of fleet {fleet.settings.name!r}, the coordinator's is "
            f"{settings.fleet!r}; set fleet or fleet_dir"
        )
    enrolment = Enrolment(fleet, observer=observer, clock=time.monotonic, wall=time.time)
    enrolment.tick()
    return enrolment
