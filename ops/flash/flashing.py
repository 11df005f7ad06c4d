"""``splitfleet flash``: everything a device needs, put where its first boot finds it."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path

from broker.logs import redact_urls
from coordinator.identity.authority import check_identity
from ops.errors import DiskTrouble, SettingsWrong
from ops.files import check_output
from ops.flash import payload
from ops.flash.classes import DeviceClass
from ops.flash.identity import identity_files
from ops.flash.payload import File, Wifi
from ops.flash.targets import BootFolder, BootPartition, Target
from ops.flash.wheels import choose_wheels
from ops.flash.writing import Plan, carry_out, describe, make_plan, with_seed, write_bundle

_INSTANCE = "instance-id: "


def files_of_device(
    device: str | None,
    *,
    fleet_folder: Path,
    token: Path | None,
    device_class: DeviceClass,
    wheelhouse: Path | None,
    indexes: Sequence[str],
    config: Path | None,
) -> list[File]:
    """All but the seed: secrets last, so that half of it betrays none.

    ``device`` None: whichever boots from it enrols by ``token`` under the name of its serial
    number. Raises :class:`SettingsWrong`, ConfigError, TopicError, or IdentityError for an identity
    that is damaged.
    """
    if (wheelhouse is None) == (not indexes):
        raise SettingsWrong(
            "where does the device get its software? Give --wheelhouse FOLDER, which needs no "
            "network there, or --index URL of a package index"
        )
    for url in indexes:
        if not url.startswith(("http://", "https://")) or not url.isprintable() or " " in url:
            raise SettingsWrong(f"--index {redact_urls(url)!r}: give an http:// or https:// URL")
    if device is not None:
        check_identity(device)
    settings = payload.agent_settings(fleet_folder, device, device_class, config)
    identity = identity_files(fleet_folder, device, token)
    wheels = [] if wheelhouse is None else choose_wheels(wheelhouse, device_class)
    return [*payload.device_files(device_class, settings, wheels, indexes), *identity]


def flash_target(
    target: Target,
    files: Sequence[File],
    *,
    device: str | None,
    wifi: Wifi | None = None,
    replace: bool = False,
    dry_run: bool = False,
) -> Plan:
    """Write ``files`` and the seed that has them installed; what is there already stays.

    Raises :class:`SettingsWrong` before anything is written, DiskTrouble when it cannot be.
    """
    meta_data, user_data = target.read("meta-data"), target.read("user-data")
    plan = make_plan(target, files, replace=replace)
    known = [
        line.removeprefix(_INSTANCE)
        for line in (meta_data or b"").decode("utf-8", "replace").splitlines()
        if line.startswith(f"{_INSTANCE}splitfleet-")
    ]
    unchanged = bool(known) and not plan.written and not plan.removed
    seed = payload.seed_files(
        instance=known[0] if unchanged else f"splitfleet-{secrets.token_hex(8)}",
        device=device,
        wifi=wifi,
        meta_data=meta_data,
        user_data=user_data,
    )
    plan = with_seed(plan, target, seed, replace=replace)
    if not dry_run:
        carry_out(target, plan)
    return plan


def flash(
    files: Sequence[File],
    *,
    device: str | None,
    image: Path | None,
    boot_dir: Path | None,
    bundle: Path | None,
    wifi: Wifi | None,
    replace: bool,
    dry_run: bool,
) -> None:
    """Write to the one of ``image``, ``boot_dir`` and ``bundle`` that is given, and say what."""
    if [image, boot_dir, bundle].count(None) != 2:
        raise SettingsWrong("give one of --image, --boot-dir and --bundle")
    if bundle is not None:
        if wifi is not None:
            raise SettingsWrong("--wifi is for a card: a machine with a system has its network")
        _bundle(bundle, files, replace=replace, dry_run=dry_run)
        return
    target = BootPartition(image) if image is not None else BootFolder(boot_dir or Path())
    plan = flash_target(target, files, device=device, wifi=wifi, replace=replace, dry_run=dry_run)
    if dry_run:
        print(describe(plan))
    elif not plan.written and not plan.removed:
        print("nothing to do: all of it is there already")
    else:
        size = sum(file.size for file in plan.written)
        print(f"{len(plan.written)} files written ({size / 1e6:.1f} MB); the next boot installs")


def _bundle(path: Path, files: Sequence[File], *, replace: bool, dry_run: bool) -> None:
    check_output(path)
    if path.exists() and not replace:
        raise SettingsWrong(f"{path} is there already; --replace replaces it")
    if not path.parent.is_dir():
        raise DiskTrouble(f"{path.parent} is no folder")
    if dry_run:
        print(describe(Plan((), tuple(files), ())))
        return
    write_bundle(path, files)
    print(f"{path} written; on the device: tar xzf {path.name} && sudo sh splitfleet/install.sh")
