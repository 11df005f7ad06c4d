from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from broker.identity_messages import Renew
from coordinator.identity.authority import Authority
from coordinator.identity.keys import new_key, to_pem
from edge_agent.errors import IdentityError
from edge_agent.identity.issued import check_issued
from edge_agent.identity.keys import PrivateKey, common_name, signing_request
from tests.device_identity import DAY_S, Issuer


@pytest.fixture(scope="module")
def issuer(tmp_path_factory: pytest.TempPathFactory) -> Issuer:
    return Issuer(tmp_path_factory.mktemp("fleet") / "authority")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Of another fleet, but with the same names in it."""
    return Authority.create(tmp_path_factory.mktemp("foreign") / "authority", "fleet")


KEY = new_key()


def check(issuer: Issuer, *, comeback_needed: bool = True, **changes: Any) -> Any:
    key: PrivateKey = KEY
    answer = issuer.answer(Renew(nonce="n", csr=signing_request(key, "d")), "d", **changes)
    authorities = [issuer.authority.ca("fleet")]
    return check_issued(
        answer,
        device="d",
        key=key,
        authorities=authorities,
        comeback_needed=comeback_needed,
    )


def test_what_was_asked_for_is_taken(issuer: Issuer) -> None:
    issued = check(issuer)
    assert common_name(issued.device) == "d"
    assert common_name(issued.comeback) == "back.d"
    assert issued.authorities == [issuer.authority.ca("fleet")]


def test_what_stays_need_not_be_said(issuer: Issuer) -> None:
    issued = check(issuer, comeback_needed=False, ca=None, return_certificate=None)
    assert issued.comeback is None
    assert issued.authorities == [issuer.authority.ca("fleet")]


@pytest.mark.parametrize(
    "part",
    [
        "another device",
        "no certificate",
        "no way back",
        "another name",
        "another key",
        "the other side",
        "back as another",
        "back with another key",
        "a device's as the way back",
        "ended",
        "not begun",
        "no PEM",
        "no PEM of the authority",
    ],
)
def test_what_was_not_asked_for_is_not_taken(issuer: Issuer, part: str) -> None:
    fleet, back = issuer.authority.issue_device, issuer.authority.issue_return
    key, stranger = KEY.public_key(), new_key().public_key()
    wrong: dict[str, dict[str, Any]] = {
        "another device": {"device": "e"},
        "no certificate": {"certificate": None},
        "no way back": {"return_certificate": None},
        "another name": {"certificate": to_pem(fleet("e", key, 30))},
        "another key": {"certificate": to_pem(fleet("d", stranger, 30))},
        "the other side": {"certificate": to_pem(back("d", key))},
        "back as another": {"return_certificate": to_pem(back("e", key))},
        "back with another key": {"return_certificate": to_pem(back("d", stranger))},
        "a device's as the way back": {"return_certificate": to_pem(fleet("d", key, 30))},
        "ended": {"now": issuer.wall() + 31 * DAY_S},
        "not begun": {"now": issuer.wall() - 31 * DAY_S},
        "no PEM": {"certificate": b"hello"},
        "no PEM of the authority": {"ca": b""},
    }
    with pytest.raises(IdentityError):
        check(issuer, **wrong[part])


def test_a_foreign_authority_is_not_trusted(issuer: Issuer, foreign: Authority) -> None:
    certificate = to_pem(foreign.issue_device("d", KEY.public_key(), 30))
    with pytest.raises(IdentityError, match="foreign authority"):
        check(issuer, certificate=certificate)
    with pytest.raises(IdentityError, match="none of those trusted"):
        check(issuer, certificate=certificate, ca=to_pem(foreign.ca("fleet")))
    both = to_pem(issuer.authority.ca("fleet")) + to_pem(foreign.ca("fleet"))
    with pytest.raises(IdentityError, match="none of those trusted"):
        check(issuer, ca=both)


def test_a_new_authority_is_trusted_when_the_old_one_signed_it(
    issuer: Issuer, tmp_path: Path
) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    successor = Authority.create(tmp_path / "next", "fleet")
    old, new = issuer.authority._cas["fleet"], successor.ca("fleet")
    cross = (
        x509.CertificateBuilder()
        .subject_name(new.subject)
        .issuer_name(old.certificate.subject)
        .public_key(new.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(new.not_valid_before_utc)
        .not_valid_after(new.not_valid_after_utc)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(old.key, hashes.SHA256())
    )
    certificate = to_pem(successor.issue_device("d", KEY.public_key(), 30))
    issued = check(issuer, certificate=certificate, ca=to_pem(old.certificate) + to_pem(cross))
    assert issued.authorities == [old.certificate, cross]
