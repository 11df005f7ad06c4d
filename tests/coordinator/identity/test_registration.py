"""Who is given a certificate, and who no more."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

import coordinator.identity.roster
from broker.errors import TopicError
from coordinator.errors import EnrolmentRefused, IdentityError
from coordinator.identity.authority import Authority, common_name
from coordinator.identity.keys import certified_key, new_key
from coordinator.identity.registration import DAY_S, Applicant, Lifetimes, Registration
from coordinator.identity.roster import Roster


class Clock:
    now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def office(tmp_path: Path, clock: Clock) -> Iterator[Registration]:
    authority = Authority.create(tmp_path / "authority", "plant", clock=clock)
    roster = Roster(tmp_path / "registry.sqlite3", create=True, clock=clock)
    yield Registration(authority, roster, Lifetimes(device_days=30), clock=clock)
    roster.close()


def applicant(name: str = "cam-1") -> Applicant:
    return Applicant(name, new_key().public_key(), "1000-abcd", "pi4", "splitfleet 0.1")


def claim_of(office: Registration, uses: int = 2, days: float = 7) -> str:
    certificate, _ = office.new_claim(uses, days)
    return common_name(certificate).removeprefix("claim.")


def used(office: Registration, claim: str) -> int:
    found = office.roster.claim(claim)
    assert found is not None
    return found.used


def reason(caught: pytest.ExceptionInfo[EnrolmentRefused]) -> str:
    return caught.value.reason


def test_a_device_that_was_added_is_on_the_roster(office: Registration) -> None:
    wanted = applicant()
    issued = office.add(wanted)
    assert common_name(issued.certificate) == "cam-1"
    assert common_name(issued.return_certificate) == "back.cam-1"
    assert certified_key(issued.certificate) == certified_key(issued.return_certificate)
    (member,) = office.roster.devices()
    assert (member.name, member.state, member.serial) == ("cam-1", "active", "1000-abcd")
    with pytest.raises(IdentityError, match="fleet reset cam-1"):
        office.add(applicant())


def test_a_token_lets_in_as_many_devices_as_it_says(office: Registration) -> None:
    claim = claim_of(office, uses=2)
    first = applicant("cam-1")
    office.enrol(claim, first)
    office.enrol(claim, applicant("cam-2"))
    with pytest.raises(EnrolmentRefused) as caught:
        office.enrol(claim, applicant("cam-3"))
    assert reason(caught) == "used_up"
    office.enrol(claim, first)  # who is in already uses up nothing
    assert used(office, claim) == 2
    assert [m.claim for m in office.roster.devices()] == [claim, claim]


def test_the_same_key_is_given_the_same_again(office: Registration, clock: Clock) -> None:
    claim, wanted = claim_of(office), applicant()
    first = office.enrol(claim, wanted)
    clock.now += 60
    assert office.enrol(claim, wanted) == first
    assert used(office, claim) == 1


def test_a_name_that_another_key_has_is_refused(office: Registration) -> None:
    claim = claim_of(office)
    office.enrol(claim, applicant("cam-1"))
    with pytest.raises(EnrolmentRefused, match="fleet reset") as caught:
        office.enrol(claim, applicant("cam-1"))
    assert reason(caught) == "other_key"
    assert used(office, claim) == 1


def test_a_key_has_one_name(office: Registration) -> None:
    claim, wanted = claim_of(office), applicant("cam-1")
    office.enrol(claim, wanted)
    with pytest.raises(EnrolmentRefused) as caught:
        office.enrol(claim, replace(wanted, name="cam-2"))
    assert reason(caught) == "other_name"
    assert used(office, claim) == 1, "a change is whole or not at all"


@pytest.mark.parametrize("trouble", ["ended", "revoked", "unknown"])
def test_a_token_that_is_no_good_lets_nobody_in(
    office: Registration, clock: Clock, trouble: str
) -> None:
    claim = claim_of(office, days=7)
    if trouble == "ended":
        clock.now += 7 * DAY_S
    elif trouble == "revoked":
        office.revoke(f"claim.{claim}")
    else:
        claim = "nobody"
    with pytest.raises(EnrolmentRefused) as caught:
        office.enrol(claim, applicant())
    assert reason(caught) == "bad_claim"
    assert not office.roster.devices()


def test_a_certificate_is_renewed_when_it_has_lived(office: Registration, clock: Clock) -> None:
    wanted = applicant()
    first = office.add(wanted)
    clock.now += 5 * DAY_S
    assert office.renew("cam-1", wanted.key) == first
    clock.now += 15 * DAY_S
    second = office.renew("cam-1", wanted.key)
    assert second.certificate != first.certificate
    assert second.certificate.not_valid_after_utc.timestamp() == clock.now + 30 * DAY_S
    assert second.return_certificate == first.return_certificate


def test_a_device_that_slept_past_its_end_comes_back(office: Registration, clock: Clock) -> None:
    wanted = applicant()
    first = office.add(wanted)
    clock.now += 400 * DAY_S
    again = office.renew("cam-1", wanted.key)
    assert again.certificate.not_valid_after_utc > first.certificate.not_valid_after_utc
    assert again.return_certificate == first.return_certificate


def test_another_key_or_name_is_not_renewed(office: Registration) -> None:
    office.add(applicant())
    for name, expected in (("cam-1", "other_key"), ("cam-9", "unknown")):
        with pytest.raises(EnrolmentRefused) as caught:
            office.renew(name, new_key().public_key())
        assert reason(caught) == expected


def test_who_is_revoked_stays_out(office: Registration) -> None:
    claim, wanted = claim_of(office), applicant()
    issued = office.enrol(claim, wanted)
    office.revoke("cam-1")
    for side, certificate in (
        ("fleet", issued.certificate),
        ("claims", issued.return_certificate),
    ):
        assert certificate.serial_number in office.roster.revoked(side)  # type: ignore[arg-type]
    for other in (wanted, applicant("cam-1"), replace(wanted, name="cam-2")):
        with pytest.raises(EnrolmentRefused):
            office.enrol(claim, other)
    with pytest.raises(EnrolmentRefused):
        office.renew("cam-1", wanted.key)
    with pytest.raises(IdentityError, match="fleet reset"):
        office.add(applicant("cam-1"))


def test_after_a_reset_a_device_enrols_with_a_new_key(office: Registration) -> None:
    claim = claim_of(office, uses=2)
    old = office.enrol(claim, applicant("cam-1"))
    office.reset("cam-1")
    assert old.certificate.serial_number in office.roster.revoked("fleet")
    new = office.enrol(claim, applicant("cam-1"))
    assert new.certificate.serial_number not in office.roster.revoked("fleet")
    assert used(office, claim) == 2


def test_who_is_retired_is_no_more_and_the_name_is_free(office: Registration) -> None:
    wanted = applicant()
    office.add(wanted)
    office.retire("cam-1")
    assert not office.roster.devices()
    assert office.roster.retired() == {"cam-1"}
    with pytest.raises(EnrolmentRefused):
        office.renew("cam-1", wanted.key)
    with pytest.raises(IdentityError, match="not on the roster"):
        office.retire("cam-1")
    office.add(applicant())
    assert not office.roster.retired()


@pytest.mark.parametrize("name", ["coordinator", "back.cam-1", "a/b", ""])
def test_a_bad_name_is_refused(office: Registration, name: str) -> None:
    with pytest.raises(TopicError):
        office.enrol(claim_of(office), applicant(name))
    assert not office.roster.devices()


@pytest.mark.parametrize(("uses", "days"), [(0, 7.0), (1, 0.0), (1, -1.0), (1, float("nan"))])
def test_a_token_for_nobody_is_refused(office: Registration, uses: int, days: float) -> None:
    with pytest.raises(IdentityError):
        office.new_claim(uses, days)


def test_who_is_on_neither_roster_nor_list_cannot_be_revoked(office: Registration) -> None:
    for name in ("cam-9", "claim.nobody"):
        with pytest.raises(IdentityError):
            office.revoke(name)


# -- lists ----------------------------------------------------------------------------------------


def test_a_list_is_made_anew_when_it_has_changed_or_aged(
    office: Registration, clock: Clock
) -> None:
    first = office.new_list("fleet", None)
    assert first is not None
    assert office.new_list("fleet", first) is None
    issued = office.add(applicant())
    assert office.new_list("fleet", first) is None
    office.revoke("cam-1")
    second = office.new_list("fleet", first)
    assert second is not None
    assert [entry.serial_number for entry in second] == [issued.certificate.serial_number]
    clock.now += 29 * DAY_S
    assert office.new_list("fleet", second) is None
    clock.now += 2 * DAY_S
    third = office.new_list("fleet", second)
    assert third is not None
    assert len(third) == 0, "a certificate that has ended needs no entry"


def test_a_roster_from_a_backup_lets_nobody_in_again(office: Registration, tmp_path: Path) -> None:
    office.roster.copy_to(tmp_path / "backup.sqlite3")
    issued = office.add(applicant())
    office.revoke("cam-1")
    crl = office.new_list("fleet", None)
    assert crl is not None
    old = Registration(
        office.authority, Roster(tmp_path / "backup.sqlite3"), office.lifetimes, clock=Clock()
    )
    assert old.new_list("fleet", crl) is None
    added = old.add(applicant("cam-2"))
    old.revoke("cam-2")
    newer = old.new_list("fleet", crl)
    assert newer is not None
    serials = {issued.certificate.serial_number, added.certificate.serial_number}
    assert {entry.serial_number for entry in newer} == serials
    old.roster.close()


# -- the file -------------------------------------------------------------------------------------


def test_others_see_a_change_and_are_told(office: Registration, tmp_path: Path) -> None:
    other = Roster(office.roster.path)
    before = other.generation
    assert other.generation == before
    office.add(applicant())
    assert other.generation != before
    assert [m.name for m in other.devices()] == ["cam-1"]
    other.close()


def test_changes_of_several_are_made_one_after_another(office: Registration) -> None:
    claim = claim_of(office, uses=5)

    def enrol(number: int) -> bool:
        roster = Roster(office.roster.path, clock=Clock())
        try:
            Registration(office.authority, roster, office.lifetimes, clock=Clock()).enrol(
                claim, applicant(f"cam-{number}")
            )
        except EnrolmentRefused:
            return False
        finally:
            roster.close()
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(enrol, range(12))) == 5
    assert used(office, claim) == 5
    assert len(office.roster.devices()) == 5


def test_what_is_over_is_forgotten(
    office: Registration, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = applicant()
    office.add(wanted)
    for _ in range(20):
        clock.now += 31 * DAY_S
        office.renew("cam-1", wanted.key)
    with sqlite3.connect(office.roster.path) as plain:
        (held,) = plain.execute("SELECT COUNT(*) FROM certificates").fetchone()
    plain.close()
    assert held <= 3
    monkeypatch.setattr(coordinator.identity.roster, "MOST_EVENTS", 5)
    for number in range(9):
        office.roster.record("test", f"cam-{number}")
    assert [e.subject for e in office.roster.events(100)] == [f"cam-{n}" for n in (8, 7, 6, 5, 4)]


def test_a_file_that_is_no_roster_is_told(tmp_path: Path) -> None:
    path = tmp_path / "registry.sqlite3"
    with pytest.raises(IdentityError, match="there is no roster"):
        Roster(path)
    path.write_bytes(b"rubbish" * 100)
    with pytest.raises(IdentityError, match="restore a backup"):
        Roster(path)
    path.unlink()
    Roster(path, create=True).close()
    assert path.stat().st_mode & 0o777 == 0o600
    with sqlite3.connect(path) as plain:
        plain.execute("PRAGMA user_version = 2")
    plain.close()
    with pytest.raises(IdentityError, match="format 2"):
        Roster(path)
