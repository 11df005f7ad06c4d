"""``splitfleet experiment``: run it, and keep what came out beside what it was made from."""

from __future__ import annotations

import fcntl
import json
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import IO

import torch
from rich.console import Console

from ops import bench_rows
from ops.errors import DiskTrouble, SettingsWrong
from ops.experiments import exit_tables, tables
from ops.experiments.images import load_images
from ops.experiments.one_run import read_json, to_json
from ops.experiments.plots import all_plots
from ops.experiments.runner import folder_of, require_same, run_all
from ops.experiments.spec import Experiment, Training, read_experiment, rehearsal, trainings
from ops.files import write_whole

FLEETS = ("averaging", "sequential", "cascade")
BASELINES = ("distributed", "centralized")
"""Arms that are called so are compared at every cut."""
PACKAGES = ("torch", "numpy", "msgpack", "zstandard")


def run_experiment(
    file: str,
    *,
    out: Path | None,
    arms: Sequence[str] | None,
    seeds: Sequence[int] | None,
    jobs: int,
    minutes: float | None,
    data_root: Path | None,
    download: bool,
    device: str | None,
    rehearse: bool,
    quiet: bool,
    as_json: bool,
) -> bool:
    """Train what is left of an experiment and write its tables; whether all is finished.

    Raises:
        SettingsWrong: the file or a flag is wrong, or ``out`` holds another experiment.
        DataError: images are missing.
        DiskTrouble, FleetFailed: see ``runner.run_all``.
    """
    if jobs < 1 or not (minutes is None or minutes > 0):
        raise SettingsWrong("--jobs must be at least 1 and --minutes above 0")
    until = None if minutes is None else time.monotonic() + 60 * minutes
    experiment = read_experiment(file)
    part = _part(experiment, arms, seeds)
    if rehearse:
        trainings(experiment, data_root=data_root)  # what is wrong with the real one
        experiment, device = rehearsal(experiment), device or "cpu"
        part = rehearsal(part)
    more = tuple(seed for seed in part.seeds if seed not in experiment.seeds)
    experiment = experiment.model_copy(update={"seeds": experiment.seeds + more})
    out = out or Path("runs") / "experiments" / experiment.name
    console = Console(stderr=True, quiet=quiet)
    images = load_images(experiment.data, data_root, download=download)
    todo = trainings(part, data_root=data_root, device=device)
    whole = trainings(experiment, data_root=data_root, device=device)
    lock = _lock(out)
    require_same(whole, out)
    _describe(experiment, out, {training.settings.device for training in todo})

    def write() -> None:
        write_tables(experiment, whole, out)

    complete = run_all(
        todo,
        out,
        data_root=data_root,
        jobs=jobs,
        batches=lambda training: sum(training.quotas(images)),
        until=until,
        say=lambda line: console.print(line, highlight=False, soft_wrap=True),
        finished=write,
    )
    write()
    lock.close()
    if as_json:
        print(json.dumps(results_of(whole, out), indent=1))
    else:
        print((out / "table.md").read_text("utf-8"), end="")
    if not complete:
        console.print(f"not finished: the same command goes on in {out}", highlight=False)
    return complete


def results_of(whole: Sequence[Training], out: Path) -> tables.Results:
    """What is finished so far, in the order of the file."""
    results: tables.Results = {}
    for training in whole:
        by_seed = results.setdefault(training.arm, {})
        folder = folder_of(out, training)
        result, exits = (read_json(folder / name) for name in ("result.json", "exits.json"))
        if result is not None and exits is not None:
            by_seed[training.seed] = result | exits
    return results


def write_tables(experiment: Experiment, whole: Sequence[Training], out: Path) -> None:
    """CSV files, ``table.md`` and ``plots/`` of what is finished so far."""
    results = results_of(whole, out)
    write_whole(out / "results.csv", tables.results_csv(results))
    write_whole(out / "curves.csv", tables.curves_csv(results))
    write_whole(out / "exits.csv", exit_tables.exits_csv(results))
    parts = [tables.table(experiment, results)]
    fleets = [name for name in FLEETS if name in results]
    baselines = [name for name in BASELINES if name in results]
    if fleets and baselines:
        parts.append(tables.claims(fleets, baselines, results))
    parts.append(tables.bytes_table(experiment, results))
    parts.append(exit_tables.exit_table(results.get(experiment.reference, {})))
    write_whole(out / "table.md", "\n".join(part for part in parts if part))
    for name, chart in all_plots(results, experiment.reference).items():
        write_whole(out / "plots" / name, chart)


def _part(
    experiment: Experiment, arms: Sequence[str] | None, seeds: Sequence[int] | None
) -> Experiment:
    names = [arm.name for arm in experiment.arms]
    if unknown := [name for name in arms or () if name not in names]:
        raise SettingsWrong(f"--arms {unknown[0]}: the file has {', '.join(names)}")
    chosen = [arm for arm in experiment.arms if arms is None or arm.name in arms]
    return experiment.model_copy(
        update={"arms": tuple(chosen), "seeds": tuple(dict.fromkeys(seeds or experiment.seeds))}
    )


def _lock(out: Path) -> IO[str]:
    """Keep others from working in a folder, as long as what is returned is open.

    Raises ``SettingsWrong`` if somebody does, and ``DiskTrouble``.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / ".lock").open("w")
        (out / "log.txt").open("a").close()
    except OSError as exc:
        raise DiskTrouble(f"cannot write to {out}: {exc.strerror}; choose another --out") from exc
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise SettingsWrong(
            f"another call is at work in {out}: wait for its end, or choose another --out"
        ) from None
    return file


def _describe(experiment: Experiment, out: Path, devices: Iterable[str]) -> None:
    """Beside the results, what they were made with; one entry for each call."""
    path = out / "environment.json"
    calls = (read_json(path) or {"calls": []})["calls"]
    calls.append(
        {
            "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "machine": _machine(devices),
            "python": platform.python_version(),
            "packages": {name: version(name) for name in PACKAGES},
            "commit": bench_rows.commit(),
            "command": sys.argv[1:],
        }
    )
    write_whole(path, to_json({"calls": calls}))
    write_whole(out / "experiment.json", to_json(experiment.model_dump(mode="json")))


def _machine(devices: Iterable[str]) -> str:
    gpus = [
        torch.cuda.get_device_name(device)
        for device in sorted(devices)
        if device.startswith("cuda") and torch.cuda.is_available()
    ]
    return ", ".join([bench_rows.machine(), *gpus])
