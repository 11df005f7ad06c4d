from __future__ import annotations

import os
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from coordinator.identity.authority import Authority
from coordinator.identity.keys import new_key, to_pem
from edge_agent.errors import BundleError
from edge_agent.updates.bundle import unpack, verify
from ops.bundles import make_bundle
from ops.errors import SettingsWrong
from tests import bundles


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("authority"), bundles.FLEET)


@pytest.fixture
def bundle(tmp_path: Path, authority: Authority) -> Path:
    return bundles.make(tmp_path, authority)


def test_what_is_packed_comes_out(bundle: Path, authority: Authority, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    manifest = unpack(bundle, [authority.ca("fleet")], out)
    assert manifest == verify(bundle, [authority.ca("fleet")])
    assert (manifest.version, manifest.requirement) == ("1.1.0", "splitfleet[lite]")
    for file in (tmp_path / "wheelhouse").iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes()


def test_a_wheel_that_is_a_link_is_packed(tmp_path: Path, authority: Authority) -> None:
    (tmp_path / "elsewhere").write_bytes(b"wheel")
    (tmp_path / "wheels").mkdir()
    name = "splitfleet-1.1.0-py3-none-any.whl"
    (tmp_path / "wheels" / name).symlink_to(tmp_path / "elsewhere")
    make_bundle(tmp_path / "wheels", tmp_path / "bundle.tar", authority, signed=1)
    (tmp_path / "out").mkdir()
    unpack(tmp_path / "bundle.tar", [authority.ca("fleet")], tmp_path / "out")
    assert (tmp_path / "out" / name).read_bytes() == b"wheel"


def test_another_fleet_does_not_take_it(bundle: Path, tmp_path: Path) -> None:
    stranger = Authority.create(tmp_path / "stranger", bundles.FLEET)
    with pytest.raises(BundleError, match="not signed by this fleet"):
        verify(bundle, [stranger.ca("fleet")])


def resigned(
    certified: Callable[[Authority, ec.EllipticCurvePublicKey], bytes],
) -> Callable[..., None]:
    def change(files: dict[str, bytes], authority: Authority) -> None:
        key = new_key()
        files["signer.pem"] = certified(authority, key.public_key())
        files["manifest.sig"] = key.sign(files["manifest.json"], ec.ECDSA(hashes.SHA256()))

    return change


def flip(name: str) -> Callable[..., None]:
    def change(files: dict[str, bytes], authority: Authority) -> None:
        data = bytearray(files[name])
        data[len(data) // 2] ^= 1
        files[name] = bytes(data)

    return change


def renamed(name: str, to: str) -> Callable[..., None]:
    def change(files: dict[str, bytes], authority: Authority) -> None:
        files[to] = files.pop(name)

    return change


WHEEL = "splitfleet-1.1.0-py3-none-any.whl"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (flip(WHEEL), "damaged"),
        (flip("manifest.sig"), "signature"),
        (flip("manifest.json"), "signature"),
        (flip("signer.pem"), "signature|not signed by this fleet"),
        (renamed(WHEEL, "../../evil.whl"), "manifest has not so"),
        (renamed(WHEEL, "/etc/evil.whl"), "manifest has not so"),
        (lambda files, _: files.pop(WHEEL), "lacks"),
        (lambda files, _: files.update({"more.whl": b"x"}), "manifest has not so"),
        (lambda files, _: files.update({WHEEL: files[WHEEL] + b"x"}), "manifest has not so"),
        (lambda files, _: files.pop("manifest.json"), "no bundle"),
        (
            resigned(lambda a, key: to_pem(a.issue_device("cam-1", key, 30))),
            "for something else",
        ),
        (
            resigned(lambda a, key: to_pem(a.issue_claim("abc", key, 30))),
            "not signed by this fleet",
        ),
        (lambda files, _: files.update({"signer.pem": b"rubbish"}), "not signed by this fleet"),
    ],
)
def test_what_was_changed_is_refused(
    change: Callable[..., None], says: str, bundle: Path, authority: Authority, tmp_path: Path
) -> None:
    bundles.rewrite(bundle, lambda files: change(files, authority))
    out = tmp_path / "out" / "deep"
    out.mkdir(parents=True)
    with pytest.raises(BundleError, match=says):
        unpack(bundle, [authority.ca("fleet")], out)
    assert not list(tmp_path.glob("**/evil*"))


@pytest.mark.parametrize("content", [b"", b"no tar at all", bytes(10_240)])
def test_what_is_no_bundle_is_refused(content: bytes, authority: Authority, tmp_path: Path) -> None:
    file = tmp_path / "bundle.tar"
    file.write_bytes(content)
    with pytest.raises(BundleError):
        verify(file, [authority.ca("fleet")])


def test_a_bundle_has_one_wheel_of_the_software(tmp_path: Path, authority: Authority) -> None:
    (tmp_path / "numpy-2.1.0-py3-none-any.whl").write_bytes(b"x")
    with pytest.raises(SettingsWrong, match="0 wheels of splitfleet"):
        make_bundle(tmp_path, tmp_path / "out.tar", authority, signed=1)
    (tmp_path / "splitfleet-1.0-py3-none-any.whl").write_bytes(b"x")
    with pytest.raises(SettingsWrong, match="--extra 'x y': devices have agent, lite, http"):
        make_bundle(tmp_path, tmp_path / "out.tar", authority, signed=1, extras=["x y"])
    assert not (tmp_path / "out.tar").exists()


def test_what_is_no_file_is_refused(authority: Authority, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/zero"), tmp_path / "nowhere"):
        with pytest.raises(BundleError, match="is no file"):
            verify(path, [authority.ca("fleet")])


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        (tarfile.GNUTYPE_LONGNAME, 1 << 30),
        (tarfile.XHDTYPE, 1 << 30),
        (tarfile.SYMTYPE, 0),
        (tarfile.REGTYPE, 1 << 30),
        (tarfile.REGTYPE, -1),
    ],
)
def test_headers_of_other_kinds_are_not_followed(
    kind: bytes, size: int, authority: Authority, tmp_path: Path
) -> None:
    """``tarfile`` would have the gigabyte that a name announces in memory."""
    file = tmp_path / "bundle.tar"
    header = tarfile.TarInfo("manifest.json")
    header.type, header.size = kind, size
    file.write_bytes(header.tobuf(tarfile.GNU_FORMAT))
    os.truncate(file, 1 << 30)
    tracemalloc.start()
    try:
        with pytest.raises(BundleError):
            verify(file, [authority.ca("fleet")])
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_every_truncation_and_flipped_header_byte_is_a_bundle_error(
    bundle: Path, authority: Authority, tmp_path: Path
) -> None:
    content = bundle.read_bytes()
    damaged = tmp_path / "damaged.tar"
    end = content.rindex(b"software") + 8  # what follows is padding
    for length in range(0, end, 9_973):
        damaged.write_bytes(content[:length])
        with pytest.raises(BundleError):
            verify(damaged, [authority.ca("fleet")])
    for at in range(148):  # where the checksum begins
        changed = bytearray(content)
        changed[at] ^= 0x80
        damaged.write_bytes(changed)
        with pytest.raises(BundleError):
            verify(damaged, [authority.ca("fleet")])


def test_links_among_the_wheels_are_followed_and_long_names_kept(
    tmp_path: Path, authority: Authority
) -> None:
    store, wheels, out = (tmp_path / name for name in ("store", "wheels", "out"))
    for folder in (store, wheels, out):
        folder.mkdir()
    long = f"frozenlist-1.7.0-cp311-cp311-{'.'.join(['manylinux_2_17_x86_64'] * 5)}.whl"
    for name in ("splitfleet-1.1.0-py3-none-any.whl", long):
        (store / name).write_bytes(name.encode())
        (wheels / name).symlink_to(store / name)
    os.link(store / long, wheels / f"other_{long}")
    made = make_bundle(wheels, tmp_path / "bundle.tar", authority, signed=1)
    assert unpack(tmp_path / "bundle.tar", [authority.ca("fleet")], out) == made
    assert (out / long).read_bytes() == (out / f"other_{long}").read_bytes() == long.encode()
    with tarfile.open(tmp_path / "bundle.tar") as tar:
        assert long in tar.getnames()


def test_what_is_no_wheel_makes_no_bundle(tmp_path: Path, authority: Authority) -> None:
    (tmp_path / "splitfleet-1.0-py3-none-any.whl").write_bytes(b"x")
    os.mkfifo(tmp_path / "numpy-2.1.0-py3-none-any.whl")
    with pytest.raises(SettingsWrong, match="is no file"):
        make_bundle(tmp_path, tmp_path / "out.tar", authority, signed=1)
