"""What an operator does with updates: bring a bundle to a fleet, see how it goes, stop it."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from broker.update_messages import Update
from coordinator.atomic_files import make_folder
from coordinator.identity.fleet import Fleet, state_dir
from coordinator.updates.book import Part, Rollout, RolloutBook
from coordinator.updates.rollouts import BUNDLES, bundle_file
from edge_agent.errors import BundleError
from edge_agent.updates.bundle import read_manifest
from ops.errors import DiskTrouble, SettingsWrong
from ops.units import MISSING, byte_size

_STAGE = re.compile(r"class:[A-Za-z0-9_-]{1,64}|[A-Za-z0-9_*?\[\]-]{1,64}")


def start(
    fleet: Fleet,
    bundle: Path,
    *,
    stages: Sequence[str],
    error_threshold: str,
    prove_s: float,
    patience_s: float,
    url: str | None = None,
    clock: Callable[[], float] = time.time,
) -> Rollout:
    """Enter a rollout of ``bundle``; a running coordinator begins within seconds.

    Raises SettingsWrong for a bundle that no device of this fleet would take, a stage or a share
    that is none, or if another rollout is under way; DiskTrouble.
    """
    checked = tuple(_check_stage(stage) for stage in stages)
    threshold = _share(error_threshold, "--error-threshold")
    try:
        manifest = read_manifest(bundle, [fleet.authority.ca("fleet")])
    except BundleError as exc:
        raise SettingsWrong(f"{exc}; make it with splitfleet bundle") from exc
    if manifest.fleet != fleet.settings.name:
        raise SettingsWrong(f"{bundle} is for fleet {manifest.fleet}, not {fleet.settings.name}")
    book = RolloutBook(fleet.roster, clock=clock)
    digest = _digest(bundle)
    rollout = Rollout(
        id=f"{time.strftime('%Y%m%d', time.gmtime(clock()))}-{secrets.token_hex(3)}",
        made=clock(),
        version=manifest.version,
        sha256=digest,
        size=bundle.stat().st_size,
        url=url,
        stages=checked,
        error_threshold=threshold,
        prove_s=prove_s,
        patience_s=patience_s,
    )
    _check_sendable(rollout)
    with fleet.roster.change():
        under_way = [rollout for rollout in book.rollouts() if rollout.state == "running"]
        if under_way:
            raise SettingsWrong(
                f"version {under_way[0].version} is being rolled out; wait, or end that with "
                "splitfleet rollout --stop"
            )
        _keep(bundle, bundle_file(state_dir(fleet.folder) / BUNDLES, digest))
        book.put(rollout)
        fleet.roster.record("rollout", rollout.id, f"version {rollout.version}")
    return rollout


def stop(fleet: Fleet, *, clock: Callable[[], float] = time.time) -> Rollout:
    """Tell no more devices of the rollout under way. Raises SettingsWrong if there is none."""
    return _change(fleet, "running", "stopped", "by an operator", clock)


def resume(fleet: Fleet, *, clock: Callable[[], float] = time.time) -> Rollout:
    """Go on with the last rollout if it was stopped; those that failed stay as they are.

    Raises SettingsWrong if it was not.
    """
    return _change(fleet, "stopped", "running", "", clock)


def show(fleet: Fleet, *, as_json: bool, clock: Callable[[], float] = time.time) -> None:
    """Print the last rollout, and what its devices run."""
    book = RolloutBook(fleet.roster, clock=clock)
    rollouts = book.rollouts()
    if as_json:
        found = [
            asdict(rollout) | {"devices": [asdict(part) for part in book.parts(rollout.id)]}
            for rollout in rollouts
        ]
        print(json.dumps(found, indent=2))
        return
    console = Console()
    if not rollouts:
        console.print("nothing has been rolled out; splitfleet rollout BUNDLE begins")
        return
    last = rollouts[0]
    console.print(_headline(last, book.parts(last.id)))
    table = Table("device", "stage", "", "runs", "", box=None, header_style="bold")
    reported = book.reported()
    for part in book.parts(last.id):
        said = reported.get(part.device)
        runs = MISSING if said is None else said.version
        table.add_row(part.device, str(part.stage + 1), part.progress, runs, part.detail)
    console.print(table)


def _headline(rollout: Rollout, parts: Sequence[Part]) -> str:
    counts = Counter(part.progress for part in parts)
    known = ", ".join(f"{count} {progress}" for progress, count in counts.items()) or "nobody yet"
    why = f" ({rollout.reason})" if rollout.reason else ""
    stage = f"stage {rollout.stage + 1} of {len(rollout.stages)}, {rollout.stages[rollout.stage]}"
    return (
        f"rollout {rollout.id}: version {rollout.version}, {byte_size(rollout.size)}, "
        f"{rollout.state}{why}; {stage}: {known}"
    )


def _change(
    fleet: Fleet, before: str, after: str, reason: str, clock: Callable[[], float]
) -> Rollout:
    book = RolloutBook(fleet.roster, clock=clock)
    with fleet.roster.change():
        rollouts = book.rollouts()
        if not rollouts or rollouts[0].state != before:
            raise SettingsWrong(f"the last rollout is not {before}; see splitfleet rollout")
        changed = replace(rollouts[0], state=after, reason=reason)  # type: ignore[arg-type]
        book.put(changed)
        fleet.roster.record(f"rollout {after}", changed.id)
    return changed


def _check_stage(stage: str) -> str:
    if stage.endswith("%"):
        if not _share(stage, "a stage"):
            raise SettingsWrong(f"a stage of {stage} is nobody")
    elif stage.isdecimal() or not _STAGE.fullmatch(stage):
        raise SettingsWrong(f"{stage!r} is no stage; write 5%, a pattern like cam-*, or class:NAME")
    return stage


def _share(text: str, what: str) -> float:
    try:
        share = float(text.removesuffix("%")) / 100
    except ValueError:
        share = -1.0
    if not text.endswith("%") or not 0 <= share <= 1:
        raise SettingsWrong(f"{what} = {text!r}: write a share like 5%")
    return share


def _check_sendable(rollout: Rollout) -> None:
    try:
        Update(
            rollout=rollout.id,
            version=rollout.version,
            sha256=rollout.sha256,
            size=rollout.size,
            url=rollout.url,
            prove_s=rollout.prove_s,
        )
    except ValueError:
        raise SettingsWrong(f"--url {rollout.url!r}: give http://… or https://…") from None


def _digest(bundle: Path) -> str:
    try:
        with bundle.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as exc:
        raise DiskTrouble(f"cannot read {bundle}: {exc.strerror}") from exc


def _keep(bundle: Path, place: Path) -> None:
    if place.exists():
        return
    try:
        make_folder(place.parent)
        temporary = place.with_suffix(".new")
        shutil.copyfile(bundle, temporary)
        temporary.replace(place)
    except OSError as exc:
        raise DiskTrouble(f"cannot keep {bundle} as {place}: {exc.strerror}") from exc
