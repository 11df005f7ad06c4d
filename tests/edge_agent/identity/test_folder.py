from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from coordinator.identity.authority import Authority
from edge_agent.errors import IdentityError, StateError
from edge_agent.identity.folder import IdentityFolder, Issued
from edge_agent.identity.keys import key_to_pem, new_key
from tests.crashing_disk import Disk, Killed, full_at, killed_at, power_cuts, write_tree
from tests.device_identity import Issuer

CLAIM = {"claim.pem", "claim-key.pem", "fleet-ca.pem"}
ENROLLED = {"key.pem", "device.pem", "return.pem", "fleet-ca.pem"}


@pytest.fixture(scope="module")
def issuer(tmp_path_factory: pytest.TempPathFactory) -> Issuer:
    return Issuer(tmp_path_factory.mktemp("fleet") / "authority")


def files(identity: IdentityFolder) -> set[str]:
    return {path.name for path in identity.folder.iterdir()}


def issued(authority: Authority, identity: IdentityFolder, device: str = "d") -> Issued:
    key = identity.key().public_key()
    return Issued(
        authority.issue_device(device, key, 30),
        authority.issue_return(device, key),
        [authority.ca("fleet")],
    )


def test_a_token_is_taken_apart(tmp_path: Path, issuer: Issuer) -> None:
    identity = IdentityFolder(tmp_path / "identity")
    identity.put_token(issuer.token("autumn"))
    assert files(identity) == CLAIM
    assert not identity.enrolled
    shown = identity.for_enrolment()
    assert (shown.name, shown.cert_file) == ("claim.autumn", identity.claim_file)
    assert identity.authorities() == [issuer.authority.ca("fleet")]


def test_what_is_secret_is_nobody_elses_to_read(tmp_path: Path, issuer: Issuer) -> None:
    identity = IdentityFolder(tmp_path)
    identity.put_token(issuer.token())
    identity.key()
    for file in (identity.key_file, identity.claim_key_file):
        assert file.stat().st_mode & 0o777 == 0o600


def test_the_key_is_made_once(tmp_path: Path) -> None:
    first = IdentityFolder(tmp_path).key()
    assert IdentityFolder(tmp_path).key().public_key() == first.public_key()


def test_an_enrolled_device_has_no_claim_any_more(tmp_path: Path, issuer: Issuer) -> None:
    identity = IdentityFolder(tmp_path)
    identity.put_token(issuer.token())
    identity.put(issued(issuer.authority, identity))
    assert files(identity) == ENROLLED
    assert identity.for_fleet().name == "d"
    shown = identity.for_enrolment()
    assert (shown.name, shown.cert_file) == ("back.d", identity.return_file)


def test_an_empty_folder_says_what_to_put_there(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="fleet token"):
        IdentityFolder(tmp_path).for_enrolment()
    with pytest.raises(IdentityError, match="not enrolled yet"):
        IdentityFolder(tmp_path).for_fleet()


@pytest.mark.parametrize("content", [b"", b"hello", b"-----BEGIN CERTIFICATE-----\nAAAA\n"])
def test_what_is_no_token_is_not_put_there(tmp_path: Path, content: bytes) -> None:
    identity = IdentityFolder(tmp_path)
    with pytest.raises(IdentityError, match="no join token"):
        identity.put_token(content)
    assert files(identity) == set()


def test_a_token_without_its_certificate_or_authority_is_none(
    tmp_path: Path, issuer: Issuer
) -> None:
    whole = issuer.token()
    marker = b"-----BEGIN CERTIFICATE-----"
    _, ca, rest = whole.split(marker)
    for part in (marker + ca + key_to_pem(new_key()), marker + rest):
        with pytest.raises(IdentityError, match="no join token"):
            IdentityFolder(tmp_path).put_token(part)


@pytest.mark.parametrize("name", ["device.pem", "return.pem", "key.pem", "fleet-ca.pem"])
@pytest.mark.parametrize("content", [b"", b"-----BEGIN CERTIFICATE-----\nAAAA\n"])
def test_a_damaged_file_is_named(tmp_path: Path, issuer: Issuer, name: str, content: bytes) -> None:
    identity = issuer.enrolled(tmp_path, "d")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(IdentityError, match=name):
        (identity.for_fleet(), identity.for_enrolment(), identity.authorities())


def test_a_certificate_of_another_key_is_told(tmp_path: Path, issuer: Issuer) -> None:
    identity = issuer.enrolled(tmp_path / "a", "a")
    other = issuer.enrolled(tmp_path / "b", "b")
    shutil.copy(other.device_file, identity.device_file)
    with pytest.raises(IdentityError, match="another key"):
        identity.certificate()


def test_a_certificate_without_its_key_is_told(tmp_path: Path, issuer: Issuer) -> None:
    identity = issuer.enrolled(tmp_path, "d")
    identity.key_file.unlink()
    with pytest.raises(IdentityError, match="fleet reset"):
        identity.certificate()


def test_an_ended_device_without_a_way_back_is_told(tmp_path: Path, issuer: Issuer) -> None:
    identity = issuer.enrolled(tmp_path, "d")
    identity.return_file.unlink()
    with pytest.raises(IdentityError, match="new token"):
        identity.for_enrolment()


def test_a_key_that_others_may_read_is_not_used(tmp_path: Path, issuer: Issuer) -> None:
    identity = issuer.enrolled(tmp_path, "d")
    identity.key_file.chmod(0o644)
    with pytest.raises(IdentityError, match="chmod 600"):
        identity.for_fleet()


# -- the power goes while it is enrolled --------------------------------------------------------


def test_a_power_cut_at_any_operation_leaves_a_device_that_gets_in(
    tmp_path: Path, issuer: Issuer
) -> None:
    """With its claim and its key, or with its certificate: never with neither."""
    base = tmp_path / "disk"
    base.mkdir()
    disk, token = Disk(base), issuer.token()
    with disk.watched():
        identity = IdentityFolder(base)
        identity.put_token(token)
        disk.done(1)
        given = issued(issuer.authority, identity)
        disk.done(2)
        identity.put(given)
        disk.done(3)
    seen = set()
    for number, (steps, tree) in enumerate(power_cuts(base, disk.operations)):
        copy = tmp_path / f"cut{number}"
        write_tree(copy, tree)
        for key in ("key.pem", "claim-key.pem"):
            if (copy / key).exists():
                (copy / key).chmod(0o600)
        after = IdentityFolder(copy)
        if steps < 1 and not after.claim_file.exists():
            continue
        shown = after.for_fleet().name if after.enrolled else after.for_enrolment().name
        if steps >= 2:
            assert after.key().public_key() == identity.key().public_key()
        if steps >= 3:
            assert shown == "d"
        if after.enrolled:
            assert after.for_enrolment().name == "back.d"
        seen.add(shown)
    assert seen == {"claim.t", "d"}


def test_a_process_that_dies_while_it_enrols_can_go_on(tmp_path: Path, issuer: Issuer) -> None:
    for number in range(40):
        base = tmp_path / str(number)
        base.mkdir()
        identity = IdentityFolder(base)
        identity.put_token(issuer.token())
        given = issued(issuer.authority, identity)
        disk = Disk(base, killed_at(number))
        try:
            with disk.watched():
                identity.put(given)
        except Killed:
            pass
        else:
            assert number > 8
            break
        after = IdentityFolder(base)
        if after.enrolled:
            after.wipe_claim()
            assert after.for_fleet().name == "d"
            assert after.for_enrolment().name == "back.d"
        else:
            after.put(given)
        assert files(after) - {"device.writing", "return.writing", "fleet-ca.writing"} == ENROLLED
    else:
        raise AssertionError("it never came to an end")


def test_a_full_disk_is_told_and_leaves_the_claim(tmp_path: Path, issuer: Issuer) -> None:
    identity = IdentityFolder(tmp_path)
    identity.put_token(issuer.token())
    given = issued(issuer.authority, identity)
    with Disk(tmp_path, full_at(0, for_good=True)).watched(), pytest.raises(StateError):
        identity.put(given)
    assert files(identity) == CLAIM | {"key.pem"}
    assert not identity.enrolled


@pytest.mark.skipif(os.geteuid() == 0, reason="root may do everything")
def test_a_folder_of_another_user_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StateError):
        IdentityFolder(tmp_path).key()
