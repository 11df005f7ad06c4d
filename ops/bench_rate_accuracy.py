"""``splitfleet bench rate-accuracy``: what fewer bytes per sample cost in accuracy.

The same small fleet is trained once per codec and seed, in one process, by the state machines of
the real one. For one seed every codec meets the same first weights, split and batches, so that the
differences to fp32 are paired. Every finished run is kept as JSON and never made again.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from rich.console import Console

from ops import bench_rows, workers
from ops.charts import Interval, interval_chart, standalone
from ops.errors import DiskTrouble, FleetFailed, SettingsWrong
from ops.files import write_whole
from ops.paired import difference
from ops.rate_accuracy import CUTS, Case, Result, Setup, load_images, pair_name, run_case
from ops.units import MISSING, byte_size, seconds, short_size
from tensors.codecs import parse_codec

BASELINE = "fp32"
MARGIN = 0.5
"""Percentage points of accuracy that a codec may cost."""


def run_bench(
    codecs: Sequence[str],
    setup: Setup,
    *,
    seeds: int,
    jobs: int,
    data_root: Path | None,
    out: Path,
    append: Path | None,
    plot: Path | None,
    quiet: bool,
) -> list[Result]:
    """Train with every codec and fp32 on ``seeds`` seeds; one row per codec, fp32's first.

    Raises:
        SettingsWrong: no seed, job, round or width.
        CodecError, DataError: a codec or images that do not exist; before anything is trained.
        DiskTrouble: a result cannot be kept.
        FleetFailed: a run or a worker died.
    """
    if min(seeds, jobs, setup.rounds, setup.width) < 1:
        raise SettingsWrong("--seeds, --jobs, --rounds and --width must be at least 1")
    console = Console(stderr=True, quiet=quiet)
    pairs = dict.fromkeys([(BASELINE, BASELINE), *map(parse_pair, codecs)])
    cases = [Case(setup, *pair, seed) for seed in range(seeds) for pair in pairs]
    load_images(setup, data_root)
    results: dict[Case, Result] = {}
    for case, result in _results(cases, data_root, out, jobs):
        results[case] = result
        console.print(
            f"{len(results)}/{len(cases)} {case.codec} seed {case.seed}: "
            f"{100 * result['accuracy']:.2f} % in {seconds(result['seconds'])}",
            highlight=False,
        )
    rows = make_rows(
        {pair: [results[Case(setup, *pair, seed)] for seed in range(seeds)] for pair in pairs}
    )
    cells = [_cells(row) for row in rows]
    bench_rows.show(_title(setup, rows[0]), _HEADER, cells, console)
    if append is not None:
        origin = [bench_rows.today(), bench_rows.machine()]
        data = _data(setup, rows[0])
        bench_rows.append(
            append,
            [[*origin, row["commit"], data, *line] for row, line in zip(rows, cells, strict=True)],
        )
    if plot is not None:
        write_whole(plot, draw(rows))
    return rows


def parse_pair(text: str) -> tuple[str, str]:
    """``ACTIVATION`` or ``ACTIVATION/GRADIENT`` as two codec names; raises ``CodecError``."""
    activation, _, gradient = text.strip().partition("/")
    first = parse_codec(activation).name
    return first, parse_codec(gradient).name if gradient else first


# -- all runs -------------------------------------------------------------------------------------


def _results(
    cases: Sequence[Case], data_root: Path | None, out: Path, jobs: int
) -> Iterator[tuple[Case, Result]]:
    """Kept results first, then the others as they are finished."""
    todo = []
    for case in cases:
        kept = _kept(out / case.file)
        if kept is None:
            todo.append(case)
        else:
            yield case, kept
    if jobs == 1:
        torch.set_num_threads(1)
        for case in todo:
            yield case, _run_and_keep(case, data_root, out)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(jobs, len(todo) or 1), context, workers.begin)
    try:
        running = {pool.submit(_run_and_keep, case, data_root, out): case for case in todo}
        for done in as_completed(running):
            yield running[done], done.result()
    except BrokenProcessPool:
        raise FleetFailed(
            "a worker died, maybe for lack of memory; start again with fewer --jobs, "
            f"what is finished lies in {out}"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)  # what is running is kept


def _run_and_keep(case: Case, data_root: Path | None, out: Path) -> Result:
    result = run_case(case, data_root)
    write_whole(out / case.file, json.dumps(result, indent=1) + "\n")
    return result


def _kept(path: Path) -> Result | None:
    if not path.exists():
        return None
    try:
        result: Result = json.loads(path.read_bytes())
    except (OSError, ValueError) as exc:
        raise DiskTrouble(f"{path} cannot be read ({exc}); remove it to run it again") from exc
    return result


# -- rows -----------------------------------------------------------------------------------------

_HEADER = (
    "codec",
    "seeds",
    "act. ×",
    "grad. ×",
    "/sample",
    "acc. %",
    "against fp32",
    "verdict",
)


def make_rows(results: dict[tuple[str, str], list[Result]]) -> list[Result]:
    """One row per codec pair; its results and fp32's are paired by their place in the lists."""
    baseline = results[BASELINE, BASELINE]
    rows = []
    for (activation, gradient), runs in results.items():
        sizes = {kind: _per_sample(runs, kind) for kind in ("activation_bytes", "gradient_bytes")}
        row: Result = {
            "codec": pair_name(activation, gradient),
            "seeds": len(runs),
            "activation_factor": _per_sample(baseline, "activation_bytes")
            / sizes["activation_bytes"],
            "gradient_factor": _per_sample(baseline, "gradient_bytes") / sizes["gradient_bytes"],
            **{f"{kind}_per_sample": size for kind, size in sizes.items()},
            "bytes_per_sample": sum(sizes.values()),
            **{
                key: statistics.fmean(run[key] for run in runs)
                for key in ("accuracy", "server_accuracy", "exit_accuracy")
            },
            "differences": [],
            "difference": None,
            "half_interval": None,
            "verdict": None,
            "discarded": sum(run["discarded"] for run in runs),
            "test_images": runs[0]["test_images"],
            "train_images": runs[0]["train_images"],
            "commit": "+".join(sorted({run["commit"] for run in runs})),
        }
        if (activation, gradient) != (BASELINE, BASELINE):
            points = [
                100 * (run["accuracy"] - plain["accuracy"])
                for run, plain in zip(runs, baseline, strict=True)
            ]
            found = difference(points)
            row["differences"] = points
            row["difference"], row["half_interval"] = found.mean, found.half
            row["verdict"] = found.verdict(MARGIN)
        rows.append(row)
    return rows


def draw(rows: Sequence[Result]) -> str:
    """The rows as an SVG file: difference to fp32 against bytes per sample."""
    points = [
        Interval(
            row["codec"],
            f"c{index % 9}",
            row["bytes_per_sample"],
            row["difference"] or 0.0,
            row["half_interval"] or 0.0,
        )
        for index, row in enumerate(sorted(rows, key=lambda row: -row["bytes_per_sample"]))
    ]
    chart = interval_chart(
        points,
        name="Accuracy lost against bytes per sample",
        x_label="bytes per sample, activations and gradients",
        y_label=f"points of accuracy against fp32, 95 % intervals; grey: ± {MARGIN:g}",
        x_format=short_size,
        y_format=lambda points: _signed(points, 2),
        band=MARGIN,
    )
    return standalone(chart)


def _per_sample(runs: Sequence[Result], key: str) -> float:
    total: int = sum(run[key] for run in runs)
    samples: int = sum(run["samples"] for run in runs)
    return total / samples


def _cells(row: Result) -> list[str]:
    change = MISSING if row["difference"] is None else _signed(row["difference"], 2)
    if row["half_interval"] is not None:
        change += f" ± {row['half_interval']:.2f}"
    codec = row["codec"]
    if row["discarded"]:
        codec += f" ({row['discarded']} batches discarded)"
    return [
        codec,
        str(row["seeds"]),
        f"{row['activation_factor']:.1f}",
        f"{row['gradient_factor']:.1f}",
        byte_size(row["bytes_per_sample"]),
        f"{100 * row['accuracy']:.2f}",
        change,
        row["verdict"] or MISSING,
    ]


def _signed(points: float, digits: int) -> str:
    rounded = round(points, digits)
    return f"{rounded:+.{digits}f}".replace("-", "−") if rounded else "0"


def _data(setup: Setup, row: Result) -> str:
    return (
        f"{setup.dataset}, {row['train_images']:,} × {setup.rounds} rounds, width {setup.width}, "
        f"tested on {row['test_images']:,}"
    )


def _title(setup: Setup, row: Result) -> str:
    return f"accuracy against bytes: cuts {', '.join(map(str, CUTS))}; {_data(setup, row)} images"
