"""Who is given a certificate, and who no more: the roster's rules, applied to the authority.

What an operator's command and what a device's request come to is decided here, each in one change
of the roster. Certificates a device is given again as long as they are good: asking twice costs
nothing.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from cryptography import x509
from pydantic import BaseModel, ConfigDict, Field

from broker.topics import check_device
from coordinator.errors import EnrolmentRefused, IdentityError
from coordinator.identity.authority import (
    CLAIM,
    LIST_DAYS,
    RETURN,
    Authority,
    Side,
    check_identity,
)
from coordinator.identity.keys import Key, PublicKey, certified_key, fingerprint, new_key
from coordinator.identity.roster import Claim, Member, Roster, State

DAY_S = 86_400.0


class Lifetimes(BaseModel):
    """How long what is signed is good for, in days."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    device_days: float = Field(default=30.0, gt=0, le=3650)
    """A device's certificate; it is renewed when a third of that is left."""
    server_days: float = Field(default=90.0, gt=0, le=3650)
    """Those of broker and coordinator; they are signed anew when two thirds are left."""
    list_days: float = Field(default=LIST_DAYS, gt=0, le=3650)
    """The revocation lists; likewise. A broker whose lists have ended lets nobody in."""


@dataclass(frozen=True, slots=True)
class Issued:
    """What a device holds beside its key."""

    certificate: x509.Certificate
    return_certificate: x509.Certificate


@dataclass(frozen=True, slots=True)
class Applicant:
    """A device that asks to be one of the fleet; the rest is for people."""

    name: str
    key: PublicKey
    serial: str = ""
    device_class: str = "generic"
    software: str = ""


class Registration:
    """Roster and authority of one fleet. ``clock`` gives unix seconds.

    Raises TopicError for bad names, :class:`IdentityError` for what an operator did, and
    :class:`EnrolmentRefused` for what a device asked and does not get.
    """

    def __init__(
        self,
        authority: Authority,
        roster: Roster,
        lifetimes: Lifetimes | None = None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.authority = authority
        self.roster = roster
        self.lifetimes = lifetimes or Lifetimes()
        self._clock = clock

    # -- what an operator does --------------------------------------------------------------------

    def add(self, applicant: Applicant) -> Issued:
        """Take a device in whose key was made here."""
        with self.roster.change():
            known = self.roster.device(check_identity(applicant.name))
            if known is not None and known.state in ("active", "revoked"):
                raise IdentityError(
                    f"{known.name} is on the roster ({known.state}); choose another name, or let "
                    f"it in again with splitfleet fleet reset {known.name}"
                )
            return self._enter(applicant, claim=None, event="added")

    def new_claim(self, uses: int, days: float) -> tuple[x509.Certificate, Key]:
        """A join token for so many devices: its certificate and key, which is kept nowhere."""
        if uses < 1 or not 0 < days <= 3650:
            raise IdentityError("a token is for at least one use, and for up to 3650 days")
        claim_id, key, now = secrets.token_hex(6), new_key(), self._clock()
        certificate = self.authority.issue_claim(claim_id, key.public_key(), days)
        with self.roster.change():
            self.roster.put_claim(Claim(claim_id, now, now + days * DAY_S, uses, 0, None))
            self.roster.add_certificate("claims", "claim", certificate)
            self.roster.record("token", CLAIM + claim_id, f"for {uses}, {days:g} days")
        return certificate, key

    def revoke(self, name: str) -> None:
        """Shut a device out for good, or with ``claim.ID`` a join token."""
        with self.roster.change():
            if name.startswith(CLAIM):
                claim = self.roster.claim(name.removeprefix(CLAIM))
                if claim is None:
                    raise IdentityError(f"there is no {name}; splitfleet fleet status has them all")
                self.roster.put_claim(replace(claim, revoked=claim.revoked or self._clock()))
                self.roster.revoke_certificates(name)
            else:
                self._change(name, "revoked", keep_key=True)
            self.roster.record("revoked", name)

    def reset(self, name: str) -> None:
        """Let a device enrol again with a new key; its certificates end."""
        with self.roster.change():
            self._change(name, "awaited", keep_key=False)
            self.roster.record("reset", name)

    def retire(self, name: str) -> None:
        """Take a device off the roster; its certificates end, its name is free."""
        with self.roster.change():
            self._change(name, "retired", keep_key=False)
            self.roster.record("retired", name)

    def _change(self, name: str, state: State, *, keep_key: bool) -> None:
        known = self.roster.device(check_device(name))
        if known is None or known.state == "retired":
            raise IdentityError(f"{name} is not on the roster; splitfleet fleet list has who is")
        key = known.key if keep_key else None
        self.roster.put_device(replace(known, state=state, key=key, since=self._clock()))
        self.roster.revoke_certificates(name, RETURN + name)

    # -- what a device asks -----------------------------------------------------------------------

    def enrol(self, claim_id: str, applicant: Applicant) -> Issued:
        """Somebody with a join token wants to be a device."""
        with self.roster.change():
            known = self.roster.device(check_identity(applicant.name))
            claim = self.roster.claim(claim_id)
            if claim is None or claim.revoked is not None or claim.ends <= self._clock():
                raise EnrolmentRefused("bad_claim", "the token has ended, or is revoked or unknown")
            if known is not None and known.state in ("active", "revoked"):
                return self._again(known, applicant.key)
            if claim.used >= claim.uses:
                raise EnrolmentRefused("used_up", f"the token was for {claim.uses} devices")
            self.roster.put_claim(replace(claim, used=claim.used + 1))
            return self._enter(applicant, claim=claim_id, event="enrolled")

    def renew(self, name: str, key: PublicKey) -> Issued:
        """A device asks for its next certificate, also one whose last has ended."""
        with self.roster.change():
            known = self.roster.device(check_device(name))
            if known is None:
                raise EnrolmentRefused(
                    "unknown", f"{name} is not on the roster; give it a new token"
                )
            return self._again(known, key)

    def _again(self, known: Member, key: PublicKey) -> Issued:
        if known.state != "active":
            raise EnrolmentRefused("revoked", f"{known.name} is {known.state}")
        if known.key != fingerprint(key):
            raise EnrolmentRefused(
                "other_key",
                f"{known.name} has another key; splitfleet fleet reset {known.name} lets it in",
            )
        return self._issue(known.name, key)

    def _enter(self, applicant: Applicant, *, claim: str | None, event: str) -> Issued:
        key = fingerprint(applicant.key)
        other = self.roster.device_with(key)
        if other is not None and other.name != applicant.name:
            raise EnrolmentRefused("other_name", f"the key is that of {other.name}")
        member = Member(
            applicant.name,
            "active",
            key,
            claim,
            applicant.serial,
            applicant.device_class,
            applicant.software,
            self._clock(),
        )
        self.roster.put_device(member)
        self.roster.record(event, member.name, f"with {CLAIM}{claim}" if claim else "")
        return self._issue(member.name, applicant.key)

    def _issue(self, name: str, key: PublicKey) -> Issued:
        certificate = self._good(name, key, share=0.5)
        if certificate is None:
            days = self.lifetimes.device_days
            certificate = self.authority.issue_device(name, key, days)
            self.roster.add_certificate("fleet", "device", certificate)
        coming_back = self._good(RETURN + name, key, share=0.5)
        if coming_back is None:
            coming_back = self.authority.issue_return(name, key)
            self.roster.add_certificate("claims", "return", coming_back)
        return Issued(certificate, coming_back)

    def _good(self, subject: str, key: PublicKey, *, share: float) -> x509.Certificate | None:
        """The certificate it has, if it is for this key and so much of its life is left."""
        certificate = self.roster.certificate(subject)
        if certificate is None or certified_key(certificate) != key:
            return None
        return certificate if life_left(certificate, self._clock()) >= share else None

    # -- lists ------------------------------------------------------------------------------------

    def new_list(
        self, side: Side, before: x509.CertificateRevocationList | None
    ) -> x509.CertificateRevocationList | None:
        """The list of a side that has to replace the one ``before``; None while that is good.

        What is on that and in no book stays on: a roster from a backup has forgotten who was
        revoked after it.
        """
        revoked = self.roster.revoked(side)
        listed: dict[int, float] = {}
        if before is not None:
            listed = {
                entry.serial_number: entry.revocation_date_utc.timestamp() for entry in before
            }
            foreign = {s: when for s, when in listed.items() if not self.roster.knows(s)}
            revoked |= foreign
            if listed.keys() == revoked.keys() and self._list_left(before) > 2 / 3:
                return None
        return self.authority.revocation_list(side, revoked, self.lifetimes.list_days)

    def _list_left(self, crl: x509.CertificateRevocationList) -> float:
        assert crl.next_update_utc is not None
        return (crl.next_update_utc.timestamp() - self._clock()) / (
            self.lifetimes.list_days * DAY_S
        )


def life_left(certificate: x509.Certificate, now: float) -> float:
    """The part of a certificate's life that is left at ``now``; below 0 when it has ended."""
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return (ends.timestamp() - now) / (ends - begins).total_seconds()
