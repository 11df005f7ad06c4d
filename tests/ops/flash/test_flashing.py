from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from broker.config import load_settings
from broker.errors import ConfigError, TopicError
from edge_agent.settings import AgentSettings
from ops.cli import main
from ops.errors import SettingsWrong
from ops.flash.classes import device_class
from ops.flash.flashing import files_of_device, flash, flash_target
from ops.flash.payload import FOLDER, File, Wifi, device_files
from ops.flash.targets import BootFolder, BootPartition, Target
from ops.flash.wheels import Wheel
from ops.flash.writing import carry_out, make_plan

STOCK = {
    "cmdline.txt": "root=PARTUUID=00000000-02 rootwait\n",
    "meta-data": "instance_id: rpios-image\ndsmode: local\n",
    "user-data": "#cloud-config\nusers: [default]\n",
    "network-config": "# an example\n",
}
INDEX = ["https://index.invalid/simple"]

Files = Callable[..., list[File]]


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ops.flash.payload.version", lambda _: "0.1.0")


@pytest.fixture
def files(fleet_folder: Path) -> Files:
    """What is written for a device that installs from an index."""

    def make(
        device: str | None = "cam-1",
        *,
        token: Path | None = None,
        config: Path | None = None,
        class_name: str = "pi4",
        indexes: Sequence[str] = INDEX,
        wheelhouse: Path | None = None,
    ) -> list[File]:
        return files_of_device(
            device,
            fleet_folder=fleet_folder,
            token=token,
            device_class=device_class(class_name),
            wheelhouse=wheelhouse,
            indexes=indexes,
            config=config,
        )

    return make


def content(files: Sequence[File], name: str) -> str:
    return next(file.read().decode() for file in files if file.path == f"{FOLDER}/{name}")


@pytest.fixture
def boot_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "boot"
    folder.mkdir()
    for name, text in STOCK.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def boot_image(tmp_path: Path) -> Path:
    for program in ("mkfs.vfat", "mcopy"):
        if shutil.which(program, path="/usr/sbin:/sbin:/usr/bin:/bin") is None:
            pytest.skip(f"{program} is not installed (packages dosfstools and mtools)")
    image = tmp_path / "disk.img"
    start = 2048
    with image.open("wb") as disk:
        disk.truncate(start * 512 + (40 << 20))
        disk.seek(446)
        disk.write(bytes([0, 0, 0, 0, 0x0C, 0, 0, 0]) + start.to_bytes(4, "little") + bytes(4))
        disk.seek(510)
        disk.write(b"\x55\xaa")
    command = ["mkfs.vfat", "-n", "bootfs", f"--offset={start}", str(image), str(40 << 10)]
    subprocess.run(
        command, check=True, capture_output=True, env={"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"}
    )
    for name, text in STOCK.items():
        into = ["mcopy", "-i", f"{image}@@{start * 512}", "-", f"::{name}"]
        subprocess.run(into, input=text.encode(), check=True)
    return image


@pytest.fixture(params=["folder", "image"])
def target(request: pytest.FixtureRequest) -> Target:
    if request.param == "folder":
        return BootFolder(request.getfixturevalue("boot_dir"))
    return BootPartition(request.getfixturevalue("boot_image"))


def everything(target: Target) -> dict[str, bytes | None]:
    names = target.below(FOLDER) | {"user-data", "meta-data", "vendor-data", "network-config"}
    return {name: target.read(name) for name in names}


def test_all_is_written_and_what_a_person_wrote_stays(files: Files, target: Target) -> None:
    wanted = files()
    flash_target(target, wanted, device="cam-1")
    there = everything(target)
    for file in wanted:
        assert there.pop(file.path) == file.read()
    assert there.pop("user-data") == STOCK["user-data"].encode()
    assert there.pop("network-config") == STOCK["network-config"].encode()
    assert (there.pop("vendor-data") or b"").startswith(b"#!/bin/sh\n")
    lines = (there.pop("meta-data") or b"").decode().splitlines()
    assert lines[0] == "dsmode: local"
    assert lines[1].startswith("instance-id: splitfleet-")
    assert lines[2:] == ['local-hostname: "cam-1"  # splitfleet flash']
    assert there == {}


def test_the_same_again_changes_nothing(files: Files, target: Target) -> None:
    flash_target(target, files(), device="cam-1")
    before = everything(target)
    plan = flash_target(target, files(), device="cam-1")
    assert plan.written == plan.removed == ()
    assert everything(target) == before


def test_another_device_replaces_the_first_and_is_a_new_machine(
    files: Files, boot_dir: Path, fleet_folder: Path
) -> None:
    target = BootFolder(boot_dir)
    flash_target(target, files(), device="cam-1")
    before = everything(target)
    wanted = files(None, token=fleet_folder / "token.pem")
    plan = flash_target(target, wanted, device=None)
    assert {f"{FOLDER}/identity/{name}.pem" for name in ("device", "key", "return")} == {
        *plan.removed
    }
    after = everything(target)
    assert f"{FOLDER}/identity/claim-key.pem" in after
    assert after["meta-data"] != before["meta-data"]
    assert b"local-hostname" not in (after["meta-data"] or b""), "many start from it"


def test_what_was_installed_and_wiped_is_installed_anew_by_the_same(
    files: Files, boot_dir: Path
) -> None:
    target = BootFolder(boot_dir)
    flash_target(target, files(), device="cam-1")
    before = target.read("meta-data")
    for name in target.below(FOLDER):
        target.remove(name)
    flash_target(target, files(), device="cam-1")
    assert target.read("meta-data") != before


def test_a_dry_run_shows_all_but_secrets_and_writes_nothing(
    files: Files, boot_dir: Path, capsys: pytest.CaptureFixture[str], fleet_folder: Path
) -> None:
    before = {path.name: path.read_bytes() for path in boot_dir.iterdir()}
    flash(
        files(),
        device="cam-1",
        image=None,
        boot_dir=boot_dir,
        bundle=None,
        wifi=Wifi("attic", "correct horse", "DE"),
        replace=False,
        dry_run=True,
    )
    shown = capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in boot_dir.iterdir()} == before
    assert "write  splitfleet/identity/key.pem" in shown
    assert "| ExecStart=" in shown
    key = (fleet_folder / "devices" / "cam-1" / "key.pem").read_text()
    assert key.splitlines()[1] not in shown
    assert "access-points" not in shown


def test_a_seed_of_somebody_else_is_replaced_only_when_asked(files: Files, boot_dir: Path) -> None:
    target = BootFolder(boot_dir)
    target.write("vendor-data", b"#cloud-config\nruncmd: [reboot]\n")
    with pytest.raises(SettingsWrong, match=r"vendor-data.*--replace"):
        flash_target(target, files(), device="cam-1")
    assert target.below(FOLDER) == set()
    flash_target(target, files(), device="cam-1", replace=True)


def test_a_wireless_network_has_the_key_that_ieee_802_11_derives(
    files: Files, boot_dir: Path
) -> None:
    target = BootFolder(boot_dir)
    wifi = Wifi("IEEE", "password", "DE")
    flash_target(target, files(), device="cam-1", wifi=wifi)
    text = (target.read("network-config") or b"").decode()
    network = json.loads(text.partition("\n")[2])["network"]
    point = network["wifis"]["wlan0"]["access-points"]["IEEE"]
    # The first test vector of IEEE 802.11i, annex H.4.
    expected = "f42c6fc52df0ebef9ebb4b90b38a5f902e83fe1b135a70e23aed762e9710a12e"
    assert point == {"password": expected}


def test_a_partition_that_is_too_small_is_said_before_anything_is_written(
    files: Files, boot_image: Path
) -> None:
    target = BootPartition(boot_image)
    large = File(f"{FOLDER}/wheels/large.whl", bytes(50 << 20))
    with pytest.raises(SettingsWrong, match="room for"):
        flash_target(target, [large, *files()], device="cam-1")
    assert target.below(FOLDER) == set()


def test_the_seed_is_written_last(files: Files, boot_dir: Path) -> None:
    plan = flash_target(BootFolder(boot_dir), files(), device="cam-1", dry_run=True)
    assert [file.path for file in plan.written][-2:] == ["vendor-data", "meta-data"]


def test_folders_that_are_no_boot_partition_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsWrong, match="is no folder"):
        BootFolder(tmp_path / "none")
    with pytest.raises(SettingsWrong, match="this machine's own"):
        BootFolder(Path("/"))
    with pytest.raises(SettingsWrong, match="is the card mounted"):
        BootFolder(tmp_path)


def test_an_image_that_cloud_init_would_not_look_at_is_refused(
    tmp_path: Path, boot_image: Path
) -> None:
    target = BootPartition(boot_image)
    target.remove("cmdline.txt")
    with pytest.raises(SettingsWrong, match="labelled CIDATA"):
        BootPartition(boot_image)
    seed = tmp_path / "seed.img"
    command = ["mkfs.vfat", "-C", "-n", "CIDATA", str(seed), "4096"]
    subprocess.run(
        command, check=True, capture_output=True, env={"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"}
    )
    assert BootPartition(seed).read("meta-data") is None


def test_the_agent_takes_its_settings(files: Files, tmp_path: Path) -> None:
    config = tmp_path / "more.toml"
    config.write_text("[agent]\ncut = 3\nthreads = 1\n[broker]\nkeepalive_s = 60\n")
    text = content(files(config=config, class_name="zero2"), "agent.toml")
    (tmp_path / "agent.toml").write_text(text)
    settings = load_settings(AgentSettings, section="agent", file=tmp_path / "agent.toml")
    assert (settings.fleet, settings.device, settings.cut) == ("lab", "cam-1", 3)
    assert (settings.threads, settings.claims_port, settings.engine) == (1, 18884, "onnxruntime")
    assert settings.identity_dir == Path("/var/lib/splitfleet/identity")
    broker = tomllib.loads(text)["broker"]
    assert broker == {"url": "mqtts://10.0.2.2:18883", "keepalive_s": 60}


def test_a_token_is_taken_apart_and_names_no_device(files: Files, fleet_folder: Path) -> None:
    made = files(None, token=fleet_folder / "token.pem")
    names = {file.path.rpartition("/")[2] for file in made if "/identity/" in file.path}
    assert names == {"fleet-ca.pem", "claim.pem", "claim-key.pem"}
    assert [file.path for file in made if file.secret] == [f"{FOLDER}/identity/claim-key.pem"]
    assert tomllib.loads(content(made, "agent.toml"))["agent"]["device"] == "auto"


def test_wheels_are_pinned_by_their_digests(wheelhouse: Path) -> None:
    wheels = [
        Wheel("splitfleet", "0.1.0", wheelhouse / "splitfleet-0.1.0-py3-none-any.whl", "ab" * 32),
        Wheel("pip", "26.0", wheelhouse / "pip-26.0-py3-none-any.whl", "cd" * 32),
    ]
    made = device_files(device_class("pi4"), "", wheels, ())
    assert f"{FOLDER}/wheels/pip-26.0-py3-none-any.whl" in [file.path for file in made]
    assert content(made, "requirements.txt").splitlines() == [
        "--no-index",
        "--find-links wheels",
        f"splitfleet==0.1.0 --hash=sha256:{'ab' * 32}",
        f"pip==26.0 --hash=sha256:{'cd' * 32}",
    ]
    assert content(made, "about") == "version=0.1.0\nmachine=aarch64\npython=3.13\n"


def test_a_device_may_install_from_package_indexes(files: Files) -> None:
    made = files(indexes=[*INDEX, "https://more.invalid/simple"])
    assert content(made, "requirements.txt").splitlines() == [
        f"--index-url {INDEX[0]}",
        "--extra-index-url https://more.invalid/simple",
        "splitfleet[agent]==0.1.0",
    ]


@pytest.mark.parametrize("index", ["", "index.invalid/simple", "https://a b", "https://a\n--pre"])
def test_an_index_that_is_no_url_is_refused(files: Files, index: str) -> None:
    with pytest.raises(SettingsWrong, match=r"--index .*give an http"):
        files(indexes=[index])


@pytest.mark.parametrize("option", ["--config", "--token", "--wifi-password-file"])
def test_a_file_that_is_not_there_is_a_wrong_setting(
    option: str, fleet_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["flash", "cam-1", "--bundle", str(tmp_path / "o"), "--folder", str(fleet_folder)]
    command += ["--index", INDEX[0], "--class", "pi4", "--wifi", "attic", "--wifi-country", "DE"]
    with pytest.raises(SystemExit) as ended:
        main([*command, option, str(tmp_path / "nowhere")])
    assert ended.value.code == 2
    assert "nowhere is not a file" in capsys.readouterr().err


def test_who_is_not_of_the_fleet_is_refused(files: Files, tmp_path: Path) -> None:
    with pytest.raises(SettingsWrong, match="fleet add cam-9"):
        files("cam-9")
    with pytest.raises(SettingsWrong, match="--token FILE"):
        files(None)
    (tmp_path / "no-token").write_text("rubbish")
    with pytest.raises(SettingsWrong, match="no join token"):
        files(None, token=tmp_path / "no-token")
    with pytest.raises(SettingsWrong, match="--wheelhouse FOLDER"):
        files(indexes=())
    with pytest.raises(TopicError, match="no room"):
        files("c" * 60)


@pytest.mark.parametrize("text", ["agent = 5", "broker = 5", "rounds = 1", "[[agent]]"])
def test_settings_that_are_no_sections_are_refused(files: Files, tmp_path: Path, text: str) -> None:
    config = tmp_path / "more.toml"
    config.write_text(text)
    with pytest.raises(SettingsWrong, match="must be a table"):
        files(config=config)


def test_a_bundle_is_for_its_owner_only_and_complete(
    fleet_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "cam-1.tar.gz"
    command = ["flash", "cam-1", "--bundle", str(bundle), "--folder", str(fleet_folder)]
    command += ["--index", INDEX[0], "--class", "pi4"]
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 0
    assert "sudo sh splitfleet/install.sh" in capsys.readouterr().out
    assert bundle.stat().st_mode & 0o777 == 0o600
    with tarfile.open(bundle) as tar:
        modes = {member.name: member.mode for member in tar}
    assert modes["splitfleet/identity/key.pem"] == 0o600
    assert modes["splitfleet/install.sh"] == 0o644
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == SettingsWrong.exit_code
    assert "--replace" in capsys.readouterr().err


def test_a_bundle_replaces_no_device_or_link(files: Files, tmp_path: Path) -> None:
    link = tmp_path / "card.tar.gz"
    link.symlink_to("/dev/null")
    with pytest.raises(SettingsWrong, match="name a file to be made"):
        flash(
            files(),
            device="cam-1",
            image=None,
            boot_dir=None,
            bundle=link,
            wifi=None,
            replace=True,
            dry_run=False,
        )
    assert link.is_symlink()


def test_a_target_is_named_and_only_one(files: Files, tmp_path: Path) -> None:
    for boot_dir, bundle in ((None, None), (tmp_path, tmp_path / "a.tar.gz")):
        with pytest.raises(SettingsWrong, match="one of --image"):
            flash(
                files(),
                device="cam-1",
                image=None,
                boot_dir=boot_dir,
                bundle=bundle,
                wifi=None,
                replace=False,
                dry_run=True,
            )


def test_a_card_that_was_pulled_out_half_written_gets_the_rest(
    files: Files, boot_dir: Path
) -> None:
    target = BootFolder(boot_dir)
    plan = make_plan(target, files(), replace=False)
    carry_out(target, type(plan)((), plan.written[:3], ()))
    flash_target(target, files(), device="cam-1")
    assert {file.path for file in files()} == target.below(FOLDER)


@pytest.mark.parametrize(
    ("ssid", "password", "country", "says"),
    [
        ("attic", "short", "DE", "8 to 63 characters"),
        ("", "long enough", "DE", "1 to 32 bytes"),
        ("attic", "long enough", "Germany", "two letters"),
        ("attic", "long enough", None, "belong together"),
    ],
)
def test_a_wireless_network_that_cannot_be_is_refused(
    fleet_folder: Path,
    boot_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    ssid: str,
    password: str,
    country: str | None,
    says: str,
) -> None:
    (tmp_path / "password").write_text(f"{password}\n")
    command = ["flash", "cam-1", "--boot-dir", str(boot_dir), "--folder", str(fleet_folder)]
    command += ["--index", INDEX[0], "--wifi", ssid]
    command += ["--wifi-password-file", str(tmp_path / "password")]
    command += [] if country is None else ["--wifi-country", country]
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == SettingsWrong.exit_code
    assert says in capsys.readouterr().err
    assert not (boot_dir / FOLDER).exists()


def test_passwords_of_indexes_are_secret(files: Files) -> None:
    made = files(indexes=["https://user:hunter2@index.example/simple"])
    assert "splitfleet/requirements.txt" in {file.path for file in made if file.secret}
    assert not any(b"hunter2" in file.read() for file in made if not file.secret)
    assert not any(file.secret for file in files() if file.path.endswith((".toml", ".txt")))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            '[broker]\nurl = "mqtts://elsewhere:8883"',
            r"broker\.url = 'mqtts://elsewhere.*10\.0\.2\.2",
        ),
        ('[agent]\nfleet = "other"', r"agent\.fleet = 'other'.*'lab'"),
        ('[agent]\ndevice = "cam-2"', r"agent\.device = 'cam-2'.*'cam-1'"),
        ('[agent]\nstate_dir = "/data"', r"agent\.state_dir = '/data'"),
    ],
)
def test_settings_of_another_fleet_or_device_are_refused(
    files: Files, tmp_path: Path, text: str, says: str
) -> None:
    config = tmp_path / "more.toml"
    config.write_text(text)
    with pytest.raises(SettingsWrong, match=says):
        files(config=config)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[broker]\nkeep_alive = 5", r"broker\.keep_alive .*more\.toml.* is not a setting"),
        ('[broker]\nusername = "cam"\npassword = "hunter2"', "the identity takes their place"),
        ("[agent]\ncut = 0", r"agent\.cut.*more\.toml"),
    ],
)
def test_settings_that_an_agent_would_not_take_are_refused(
    files: Files, tmp_path: Path, text: str, says: str
) -> None:
    config = tmp_path / "more.toml"
    config.write_text(text)
    with pytest.raises(ConfigError, match=says):
        files(config=config)


def test_settings_of_others_stay_here(files: Files, tmp_path: Path) -> None:
    config = tmp_path / "more.toml"
    config.write_text("[agent]\ncut = 3\n[coordinator]\nrounds = 3\n")
    assert tomllib.loads(content(files(config=config), "agent.toml")).keys() == {"broker", "agent"}
