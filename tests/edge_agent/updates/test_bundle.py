from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from coordinator.identity.authority import Authority
from coordinator.identity.keys import new_key, to_pem
from edge_agent.errors import BundleError
from edge_agent.updates.bundle import read_manifest, unpack
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
    assert manifest == read_manifest(bundle, [authority.ca("fleet")])
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
        read_manifest(bundle, [stranger.ca("fleet")])


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
        read_manifest(file, [authority.ca("fleet")])


def test_a_bundle_has_one_wheel_of_the_software(tmp_path: Path, authority: Authority) -> None:
    (tmp_path / "numpy-2.1.0-py3-none-any.whl").write_bytes(b"x")
    with pytest.raises(SettingsWrong, match="0 wheels of splitfleet"):
        make_bundle(tmp_path, tmp_path / "out.tar", authority, signed=1)
    (tmp_path / "splitfleet-1.0-py3-none-any.whl").write_bytes(b"x")
    with pytest.raises(SettingsWrong, match="--extra 'x y': devices have agent, lite, http"):
        make_bundle(tmp_path, tmp_path / "out.tar", authority, signed=1, extras=["x y"])
    assert not (tmp_path / "out.tar").exists()
