"""The main job: broker, coordinator and unequal agents as processes, then a report."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from broker.config import BrokerConfig, load_settings
from ops.demo_children import Child, as_flags, ending, start, watch
from ops.demo_places import GuardedPlace, Place, plain
from ops.errors import BrokerUnreachable, DiskTrouble, FleetFailed, SettingsWrong

RUNS = Path("runs")
REMEMBERED = "demo.json"
_FIXED = (
    "strategy",
    "feedback",
    "dataset",
    "partition",
    "width",
    "codec",
    "gradient_codec",
    "secure",
    "seed",
)
"""What a run in an existing folder cannot be resumed without."""


class DemoSettings(BaseModel):
    """What ``splitfleet demo`` trains; kept in the run's folder, so that it can be resumed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    agents: int = Field(default=4, ge=1, le=64)
    cuts: tuple[str, ...] = ("2", "3", "4", "5")
    """Cut layers, ``auto`` among them if wanted; repeated if there are more agents."""
    strategy: str = "averaging"
    feedback: str = "gradient"
    rounds: int = Field(default=6, ge=1)
    dataset: str = "fashion-mnist-small"
    data_root: Path | None = None
    download: bool = False
    partition: str = "iid"
    width: int = Field(default=16, ge=1)
    codec: str = "int4+zstd"
    gradient_codec: str | None = None
    bytes_per_sample: float | None = Field(default=None, gt=0)
    follow_link: bool = False
    window: int = Field(default=2, ge=1)
    threshold: float = 0.7
    broker: str | None = None
    secure: bool = False
    """Whether a broker with certificates and all guards is set up (``ops.demo_places``)."""
    seed: int = Field(default=0, ge=0)
    out: Path = Field(default=Path(), exclude=True)

    @field_validator("cuts", mode="before")
    @classmethod
    def _split_cuts(cls, cuts: object) -> object:
        parts = [part.strip() for part in cuts.split(",")] if isinstance(cuts, str) else cuts
        if not isinstance(parts, list | tuple) or not parts:
            raise ValueError("give cut layers like 2,3,5, or auto")
        for part in parts:
            if part != "auto" and not (part.isdecimal() and int(part) > 0):
                raise ValueError(f"{part!r} is no cut layer: give numbers like 2,3,5, or auto")
        return tuple(parts)

    @classmethod
    def resolve(cls, out: Path | None, given: Mapping[str, Any]) -> Self:
        """Settings of a new run, or of the run in ``out``.

        What is not given is as it was there, else the default. Raises :class:`SettingsWrong`.
        """
        chosen = {key: value for key, value in given.items() if value is not None}
        before: dict[str, Any] = {}
        if out is not None and (out / REMEMBERED).exists():
            try:
                before = json.loads((out / REMEMBERED).read_bytes())
            except (OSError, ValueError) as exc:
                raise SettingsWrong(f"{out / REMEMBERED} is unreadable ({exc})") from exc
        changed = [key for key in _FIXED if key in chosen and key in before]
        for key in changed:
            if str(chosen[key]) != str(before[key]):
                raise SettingsWrong(
                    f"the run in {out} was made with {key} = {before[key]}, now it is "
                    f"{chosen[key]}; leave --{key} out to go on with it, or choose another --out"
                )
        if chosen.get("secure") and "agents" not in chosen and not before:
            chosen["agents"] = 8
        if "cuts" in chosen and "agents" not in chosen and not before:
            chosen["agents"] = len(str(chosen["cuts"]).split(","))
        if out is None:
            out = RUNS / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        try:
            return cls.model_validate({**before, **chosen, "out": out})
        except ValidationError as exc:
            first = exc.errors(include_url=False)[0]
            name = str(first["loc"][0]).replace("_", "-")
            what = first["msg"].removeprefix("Value error, ")
            raise SettingsWrong(f"--{name} {first['input']!r}: {what}") from None

    @property
    def names(self) -> list[str]:
        """The agents."""
        return [f"agent-{number + 1}" for number in range(self.agents)]

    def cut_of(self, agent: int) -> str:
        """The cut layer of agent number ``agent``, from 0."""
        return self.cuts[agent % len(self.cuts)]


def run_demo(settings: DemoSettings, *, quiet: bool, as_json: bool) -> None:
    """Run the whole job and print where the report is, or the summary as JSON.

    Raises:
        FleetFailed: a process ended before its time; says which and its last words.
        KeyboardInterrupt is turned into exit code 130 by the caller, after everything ended.
    """
    from ops.report import write_report

    _check(settings)
    out = settings.out
    try:
        (out / "logs").mkdir(parents=True, exist_ok=True)
        (out / REMEMBERED).write_text(settings.model_dump_json(indent=1) + "\n", "utf-8")
    except OSError as exc:
        raise DiskTrouble(f"cannot write to {out}: {exc.strerror}; choose another --out") from exc
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        place: Place
        if settings.secure:
            place = stack.enter_context(GuardedPlace(out, settings.names))
        else:
            place = stack.enter_context(plain(out, settings.broker))
        interrupted = stack.enter_context(_interruptible())
        children = [_start_coordinator(settings, place, quiet=quiet)]
        with ending(children):
            children += [_start_agent(settings, n, place) for n in range(settings.agents)]
            watch(children, interrupted, place.watch)
        account = place.account()
        if interrupted:
            print(
                f"interrupted; every process has ended. Go on with:\n  splitfleet demo --out {out}",
                file=sys.stderr,
            )
            sys.exit(130)
    result = _result(place.state_dir) | ({"security": account} if account else {})
    report = write_report(out, result, wall_seconds=time.monotonic() - started)
    summary = json.loads((out / "summary.json").read_text("utf-8"))
    if as_json:
        print(json.dumps(summary, indent=1))
    else:
        _print_summary(summary, report)


def _check(settings: DemoSettings) -> None:
    """Raise for everything that would stop a process later, before any is started."""
    from coordinator.settings import CoordinatorSettings
    from tensors.datasets import load_dataset
    from tensors.networks import NetworkSpec, build_network
    from tensors.partition import partition

    keys = {"strategy", "feedback", "rounds", "codec", "window", "threshold", "seed"}
    keys |= {"gradient_codec", "bytes_per_sample", "follow_link"}
    load_settings(
        CoordinatorSettings, section="coordinator", flags=settings.model_dump(include=keys)
    )
    train, _ = (
        load_dataset(settings.dataset, split, root=settings.data_root, download=settings.download)
        for split in ("train", "test")
    )
    partition(train.labels, settings.agents, settings.partition, settings.seed)
    _, size, _, channels = train.images.shape
    network = build_network(
        NetworkSpec(width=settings.width, channels=channels, size=size, classes=len(train.classes))
    )
    for cut in settings.cuts:
        if cut != "auto":
            network.require_cut(int(cut))
    if settings.broker is not None:
        broker = load_settings(BrokerConfig, section="broker", flags={"url": settings.broker})
        try:
            socket.create_connection((broker.host, broker.port), timeout=5).close()
        except OSError as exc:
            raise BrokerUnreachable(
                f"nobody answers at {settings.broker} ({exc.strerror or exc}); start it, or "
                "leave --broker out to use the embedded one"
            ) from exc


@contextlib.contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Collects Ctrl-C and SIGTERM instead of raising, so that everything ends in order."""
    seen: list[int] = []
    before = {
        number: signal.signal(number, lambda got, _frame: seen.append(got))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start_coordinator(settings: DemoSettings, place: Place, *, quiet: bool) -> Child:
    flags = {
        "dataset": settings.dataset,
        "data-root": settings.data_root,
        "width": settings.width,
        "strategy": settings.strategy,
        "feedback": settings.feedback,
        "rounds": settings.rounds,
        "codec": settings.codec,
        "gradient-codec": settings.gradient_codec,
        "bytes-per-sample": settings.bytes_per_sample,
        "window": settings.window,
        "min-devices": settings.agents,
        "seed": settings.seed,
        "log-level": "warning",
    }
    more = ["--set", f"threshold={settings.threshold}", "--set", f"threads={_spare_threads()}"]
    if settings.follow_link:
        more.append("--follow-link")
    if quiet:
        more.append("--quiet")
    # Its progress is the demo's, so it shares the terminal.
    log = settings.out / "logs" / "coordinator.log"
    command = ["coordinator", *place.coordinator_flags(), *as_flags(flags), *more]
    return start("coordinator", command, log, share_stderr=not quiet)


def _start_agent(settings: DemoSettings, number: int, place: Place) -> Child:
    name = settings.names[number]
    flags = {
        "cut": settings.cut_of(number),
        "dataset": settings.dataset,
        "data-root": settings.data_root,
        "partition": settings.partition,
        "share": number,
        "shares": settings.agents,
        "threads": 1,
    }
    more = ["--exit-when-finished", "--set", f"partition_seed={settings.seed}"]
    command = ["agent", *place.agent_flags(name), *as_flags(flags), *more]
    return start(name, command, settings.out / "logs" / f"{name}.log")


def _spare_threads() -> int:
    """Threads for the coordinator: the agents take turns, so all cores but one are its own."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 2) - 1)


def _result(state: Path) -> dict[str, Any]:
    try:
        run = (state / "current").read_text("utf-8").strip()
        result: dict[str, Any] = json.loads((state / run / "result.json").read_bytes())
    except (OSError, ValueError) as exc:
        raise FleetFailed(f"the coordinator left no result in {state}: {exc}") from exc
    return result


def _print_summary(summary: Mapping[str, Any], report: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(
        title=f"{summary['strategy']}, {summary['feedback']} feedback; accuracy on test images"
    )
    for column in ("device", "cut", "samples", "exit", "full network", "exit rate", "answers"):
        table.add_column(column, justify="left" if column == "device" else "right")
    for device in summary["devices"]:
        table.add_row(
            device["device"],
            str(device["cut"]),
            str(device["samples"]),
            _percent(device["exit_accuracy"]),
            _percent(device["server_accuracy"]),
            _percent(device["exit_rate"]),
            _percent((device["inference"] or {}).get("accuracy")),
        )
    console.print(table)
    console.print(
        f"full network {_percent(summary['server_accuracy'])} after {summary['rounds']} rounds, "
        f"{summary['wall_seconds']:.0f} s, {summary['samples_per_second']:.0f} samples/s, "
        f"{summary['bytes_up_per_sample']:.0f} bytes up per sample",
        soft_wrap=True,
    )
    if guarded := summary.get("security"):
        console.print(
            f"{len(guarded['enrolled'])} agents enrolled with one token, "
            f"{guarded['token_uses_left']} uses left; "
            f"a stranger without a certificate was {guarded['stranger']}",
            soft_wrap=True,
        )
    console.print(f"report: {report}", soft_wrap=True)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"
