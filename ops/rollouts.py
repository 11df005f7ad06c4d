"""What an operator does with updates: bring a bundle to a fleet, see how it goes, stop it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from broker.update_messages import Update
from coordinator.atomic_files import make_folder, sync_folder
from coordinator.identity.fleet import Fleet, state_dir
from coordinator.updates.book import Part, Rollout, RolloutBook
from coordinator.updates.rollouts import BUNDLES, bundle_file, chosen, why_to_stop
from edge_agent.errors import BundleError
from edge_agent.updates.bundle import verify
from ops.errors import DiskTrouble, SettingsWrong
from ops.units import MISSING, byte_size

_BLOCK = 1 << 20
_UNSENDABLE = {
    "url": "--url: give an address of printable characters that begins with http:// or https://",
    "size": "the bundle is longer than 8 GiB, which devices take at most",
    "prove_s": "--prove: give a time above 0",
}
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
    that is none, a stage that is nobody, or if another rollout is under way; DiskTrouble.
    """
    book = RolloutBook(fleet.roster, clock=clock)
    checked = tuple(_check_stage(stage) for stage in stages)
    threshold = _threshold(error_threshold)
    try:
        manifest = verify(bundle, [fleet.authority.ca("fleet")])
    except BundleError as exc:
        raise SettingsWrong(f"{exc}; make it with splitfleet bundle") from exc
    if manifest.fleet != fleet.settings.name:
        raise SettingsWrong(f"{bundle} is for fleet {manifest.fleet}, not {fleet.settings.name}")
    rollout = Rollout(
        id=f"{time.strftime('%Y%m%d', time.gmtime(clock()))}-{secrets.token_hex(3)}",
        made=clock(),
        version=manifest.version,
        sha256=_digest(bundle),
        size=bundle.stat().st_size,
        url=url,
        stages=checked,
        error_threshold=threshold,
        prove_s=prove_s,
        patience_s=patience_s,
    )
    _check_sendable(rollout)
    _check_chosen(rollout, book.members())
    _check_alone(book)
    bundles = state_dir(fleet.folder) / BUNDLES
    _keep(bundle, bundle_file(bundles, rollout.sha256), rollout.sha256)
    with fleet.roster.change():
        _check_alone(book)
        book.put(rollout)
        fleet.roster.record("rollout", rollout.id, f"version {rollout.version}")
        _forget_bundles(bundles, {rollout.sha256, *(r.sha256 for r in book.wanted().values())})
    return rollout


def stop(fleet: Fleet, *, clock: Callable[[], float] = time.time) -> Rollout:
    """Tell no more devices of the last rollout, also not those who were away until it was over.

    Raises SettingsWrong if none are to be told.
    """

    def stopped(rollout: Rollout, parts: Sequence[Part]) -> Rollout:
        waiting = any(part.progress == "waiting" for part in parts)
        if rollout.state == "stopped" or (rollout.state == "done" and not waiting):
            raise SettingsWrong("the last rollout is not running; see splitfleet rollout")
        return replace(rollout, state="stopped", reason="by an operator")

    return _change(fleet, stopped, clock)


def resume(
    fleet: Fleet, *, error_threshold: str | None = None, clock: Callable[[], float] = time.time
) -> Rollout:
    """Go on with the last rollout if it was stopped; those that failed stay as they are.

    Raises SettingsWrong if it was not, or would stop at once for them.
    """
    threshold = None if error_threshold is None else _threshold(error_threshold)

    def resumed(rollout: Rollout, parts: Sequence[Part]) -> Rollout:
        if rollout.state != "stopped":
            raise SettingsWrong("the last rollout is not stopped; see splitfleet rollout")
        allowed = rollout.error_threshold if threshold is None else threshold
        again = replace(rollout, state="running", reason="", error_threshold=allowed)
        if reason := why_to_stop(again, parts):
            raise SettingsWrong(
                f"{reason}, so it would stop at once; allow more with --resume --error-threshold, "
                "or begin another rollout"
            )
        return again

    return _change(fleet, resumed, clock)


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
    fleet: Fleet,
    change: Callable[[Rollout, Sequence[Part]], Rollout],
    clock: Callable[[], float],
) -> Rollout:
    book = RolloutBook(fleet.roster, clock=clock)
    with fleet.roster.change():
        rollouts = book.rollouts()
        if not rollouts:
            raise SettingsWrong("nothing has been rolled out; splitfleet rollout BUNDLE begins")
        changed = change(rollouts[0], book.parts(rollouts[0].id))
        book.put(changed)
        fleet.roster.record(f"rollout {changed.state}", changed.id)
    return changed


def _check_stage(stage: str) -> str:
    if stage.endswith("%"):
        if not _share(stage, "a stage"):
            raise SettingsWrong(f"a stage of {stage} is nobody")
    elif stage.isdecimal() or not _STAGE.fullmatch(stage):
        raise SettingsWrong(f"{stage!r} is no stage; write 5%, a pattern like cam-*, or class:NAME")
    return stage


def _threshold(text: str) -> float:
    return _share(text, "--error-threshold")


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
    except ValidationError as exc:
        (field,) = exc.errors(include_url=False)[0]["loc"][-1:]
        raise SettingsWrong(_UNSENDABLE.get(str(field), str(exc))) from None


def _check_chosen(rollout: Rollout, members: dict[str, str]) -> None:
    for stage in rollout.stages:
        if not chosen(replace(rollout, stages=(stage,)), members):
            raise SettingsWrong(
                f"stage {stage!r} is nobody: splitfleet fleet list has the devices, --json their "
                "classes"
            )


def _check_alone(book: RolloutBook) -> None:
    for rollout in book.rollouts():
        if rollout.state == "running":
            raise SettingsWrong(
                f"version {rollout.version} is being rolled out; wait, or end that with "
                "splitfleet rollout --stop"
            )


def _digest(bundle: Path) -> str:
    try:
        with bundle.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as exc:
        raise DiskTrouble(f"cannot read {bundle}: {exc.strerror}") from exc


def _keep(bundle: Path, place: Path, sha256: str) -> None:
    """Copy a bundle to where the coordinator gives it out from, also over a damaged copy."""
    temporary = place.with_suffix(".new")
    try:
        make_folder(place.parent)
        with bundle.open("rb") as source, temporary.open("wb") as copy:
            shutil.copyfileobj(source, copy, _BLOCK)
            copy.flush()
            os.fsync(copy.fileno())
        if _digest(temporary) != sha256:
            raise SettingsWrong(f"{bundle} has just changed; try again when it is whole")
        temporary.replace(place)
        sync_folder(place.parent)
    except OSError as exc:
        raise DiskTrouble(f"cannot keep {bundle} as {place}: {exc.strerror}") from exc
    finally:
        temporary.unlink(missing_ok=True)


def _forget_bundles(folder: Path, kept: set[str]) -> None:
    """Remove those that no device waits for, as far as that can be done."""
    for file in [*folder.glob("*.bundle"), *folder.glob("*.new")]:
        if file.stem not in kept:
            with contextlib.suppress(OSError):
                file.unlink()
