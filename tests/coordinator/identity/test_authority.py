"""What the authorities sign, judged by OpenSSL where it has a say."""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from broker.errors import TopicError
from coordinator.errors import IdentityError
from coordinator.identity.authority import SIDES, Authority, Side, common_name
from coordinator.identity.keys import key_to_pem, new_key, to_pem

NOW = 1_800_000_000.0
DAY = 86_400.0


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "authority", "plant", clock=lambda: NOW)


def verify(
    folder: Path,
    authority: Authority,
    certificate: x509.Certificate,
    *,
    side: Side = "fleet",
    purpose: str = "sslclient",
    revoked: dict[int, float] | None = None,
    at: float = NOW,
    listed: bool = True,
) -> str:
    """What ``openssl verify`` says, with the side's list checked if it is ``listed`` there."""
    trusted, leaf = folder / "trusted.pem", folder / "leaf.pem"
    crl = authority.revocation_list(side, revoked or {})
    trusted.write_bytes(to_pem(authority.ca(side)) + to_pem(crl))
    leaf.write_bytes(to_pem(certificate))
    options = ["-x509_strict", "-purpose", purpose, "-attime", str(int(at))]
    options += ["-crl_check"] if listed else []
    command = ["openssl", "verify", *options, "-CAfile", str(trusted), str(leaf)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    return done.stdout + done.stderr


def test_what_is_issued_is_valid_to_openssl(authority: Authority, tmp_path: Path) -> None:
    public = new_key().public_key()
    issued = {
        "cam-1": authority.issue_device("cam-1", public, 30),
        "coordinator": authority.issue_coordinator(public, 90),
    }
    claims = {
        "back.cam-1": authority.issue_return("cam-1", public),
        "claim.x7": authority.issue_claim("x7", public, 7),
    }
    sides: list[tuple[Side, dict[str, x509.Certificate]]] = [("fleet", issued), ("claims", claims)]
    for side, certificates in sides:
        for name, certificate in certificates.items():
            assert common_name(certificate) == name
            assert "OK" in verify(tmp_path, authority, certificate, side=side)
    broker = authority.issue_broker(["broker.example", "10.0.0.1"], public, 90)
    assert "OK" in verify(tmp_path, authority, broker, purpose="sslserver")
    assert authority.fleet == "plant"


def test_one_side_is_nothing_to_the_other(authority: Authority, tmp_path: Path) -> None:
    claim = authority.issue_claim("x7", new_key().public_key(), 7)
    assert "OK" not in verify(tmp_path, authority, claim, side="fleet")
    device = authority.issue_device("cam-1", new_key().public_key(), 30)
    assert "OK" not in verify(tmp_path, authority, device, side="claims")


def test_a_device_cannot_serve_and_the_broker_is_no_client(
    authority: Authority, tmp_path: Path
) -> None:
    public = new_key().public_key()
    device = authority.issue_device("cam-1", public, 30)
    assert "purpose" in verify(tmp_path, authority, device, purpose="sslserver")
    broker = authority.issue_broker(["broker.example"], public, 90)
    assert "purpose" in verify(tmp_path, authority, broker, purpose="sslclient")


def test_certificates_end(authority: Authority, tmp_path: Path) -> None:
    device = authority.issue_device("cam-1", new_key().public_key(), 30)
    assert "OK" in verify(tmp_path, authority, device, at=NOW + 29 * DAY)
    assert "expired" in verify(tmp_path, authority, device, at=NOW + 31 * DAY)
    ends = device.not_valid_after_utc
    assert ends == datetime.fromtimestamp(NOW + 30 * DAY, UTC)


def test_the_broker_is_known_by_a_device_whose_clock_stands_still(tmp_path: Path) -> None:
    now = NOW
    authority = Authority.create(tmp_path / "authority", "plant", clock=lambda: now)
    now += 400 * DAY
    broker = authority.issue_broker(["broker.example"], new_key().public_key(), 90)
    for at in (NOW, now, now + 89 * DAY):
        trusted = verify(tmp_path, authority, broker, purpose="sslserver", at=at, listed=False)
        assert "OK" in trusted
    later = now + 91 * DAY
    assert "expired" in verify(tmp_path, authority, broker, purpose="sslserver", at=later)


def test_nothing_outlives_its_authority(authority: Authority) -> None:
    device = authority.issue_device("cam-1", new_key().public_key(), 100 * 365)
    assert device.not_valid_after_utc == authority.ca("fleet").not_valid_after_utc


def test_nothing_is_signed_by_a_clock_that_stood_still(tmp_path: Path) -> None:
    now = NOW
    authority = Authority.create(tmp_path / "authority", "plant", clock=lambda: now)
    now = 0.0
    with pytest.raises(IdentityError, match="set the clock"):
        authority.issue_device("cam-1", new_key().public_key(), 30)
    with pytest.raises(IdentityError, match="set the clock"):
        authority.revocation_list("fleet", {})


def test_who_is_on_the_list_is_refused(authority: Authority, tmp_path: Path) -> None:
    device = authority.issue_device("cam-1", new_key().public_key(), 30)
    other = authority.issue_device("cam-2", new_key().public_key(), 30)
    revoked = {device.serial_number: NOW - DAY}
    assert "revoked" in verify(tmp_path, authority, device, revoked=revoked)
    assert "OK" in verify(tmp_path, authority, other, revoked=revoked)


def test_lists_are_numbered_and_dated(tmp_path: Path) -> None:
    now = NOW
    authority = Authority.create(tmp_path / "authority", "plant", clock=lambda: now)
    numbers = []
    for _ in range(2):
        crl = authority.revocation_list("claims", {5: NOW - DAY}, days=90)
        numbers.append(crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number)
        now += 1
    assert numbers[0] < numbers[1]
    assert crl.next_update_utc == datetime.fromtimestamp(NOW + 1 + 90 * DAY, UTC)
    entry = crl.get_revoked_certificate_by_serial_number(5)
    assert entry is not None
    assert entry.revocation_date_utc == datetime.fromtimestamp(NOW - DAY, UTC)


def test_the_brokers_names_are_names_and_addresses(authority: Authority) -> None:
    names = ["broker.example", "my_service", "10.0.0.1", "::1"]
    broker = authority.issue_broker(names, new_key().public_key(), 90)
    shown = broker.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert shown.get_values_for_type(x509.DNSName) == ["broker.example", "my_service"]
    assert [str(a) for a in shown.get_values_for_type(x509.IPAddress)] == ["10.0.0.1", "::1"]
    usage = broker.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]


@pytest.mark.parametrize("names", [[], ["mqtts://broker"], ["a b"], [""], ["-x"], ["a..b"]])
def test_what_is_no_name_of_a_host_is_refused(authority: Authority, names: list[str]) -> None:
    with pytest.raises(IdentityError):
        authority.issue_broker(names, new_key().public_key(), 90)


@pytest.mark.parametrize("name", ["coordinator", "back.cam-1", "a/b", "", "x" * 65])
def test_what_is_no_name_of_a_device_is_refused(authority: Authority, name: str) -> None:
    with pytest.raises(TopicError):
        authority.issue_device(name, new_key().public_key(), 30)


def test_a_name_that_a_return_certificate_has_no_room_for_is_refused(authority: Authority) -> None:
    key = new_key().public_key()
    assert len(common_name(authority.issue_return("x" * 59, key))) == 64
    with pytest.raises(TopicError, match="59"):
        authority.issue_device("x" * 60, key, 30)
    with pytest.raises(IdentityError, match="58"):
        authority.issue_claim("x" * 59, key, 30)


@pytest.mark.parametrize("passphrase", [None, "seven words"])
def test_opened_again_it_is_the_same(tmp_path: Path, passphrase: str | None) -> None:
    folder = tmp_path / "authority"
    made = Authority.create(folder, "plant", passphrase)
    opened = Authority.open(folder, passphrase)
    assert [opened.ca(side) for side in SIDES] == [made.ca(side) for side in SIDES]
    assert all((folder / f"{side}-ca-key.pem").stat().st_mode & 0o777 == 0o600 for side in SIDES)
    with pytest.raises(IdentityError, match="another folder"):
        Authority.create(folder, "plant", passphrase)


def test_keys_stay_shut_without_their_passphrase(tmp_path: Path) -> None:
    folder = tmp_path / "authority"
    Authority.create(folder, "plant", "seven words")
    with pytest.raises(IdentityError, match="SPLITFLEET_CA_PASSPHRASE"):
        Authority.open(folder)
    with pytest.raises(IdentityError, match="passphrase is wrong"):
        Authority.open(folder, "eight words")
    Authority.create(tmp_path / "plain", "plant")
    with pytest.raises(IdentityError, match="not encrypted"):
        Authority.open(tmp_path / "plain", "seven words")


def test_files_that_do_not_fit_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "authority"
    with pytest.raises(IdentityError, match="cannot read"):
        Authority.open(folder)
    Authority.create(folder, "plant")
    key = folder / "fleet-ca-key.pem"
    key.chmod(0o640)
    with pytest.raises(IdentityError, match="chmod 600"):
        Authority.open(folder)
    key.chmod(0o600)
    key.write_bytes(key_to_pem(new_key()))
    with pytest.raises(IdentityError, match="not the key of"):
        Authority.open(folder)
    key.write_text("rubbish")
    with pytest.raises(IdentityError, match="damaged"):
        Authority.open(folder)
