"""``splitfleet exits``: thresholds for a coordinator's checkpoint, as table, JSON and chart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from coordinator.checkpoint import Checkpoint
from coordinator.service import held_out_images
from ops import bench_rows
from ops.charts import Series, line_chart, share_range, standalone
from ops.checkpoints import load_checkpoint, open_store, settings_of_run
from ops.errors import SettingsWrong
from ops.exits import ExitSettings, Judged, Row, judge_exits
from ops.report import finite
from ops.report_charts import style_of
from ops.units import percent
from tensors.calibration import Curve
from tensors.networks import NetworkSpec, build_network

CURVE_POINTS = 200
"""So many points of a curve are shown at most; thresholds are chosen among all."""
_THRESHOLDS = ("cut", "threshold", "offloaded", "accuracy", "95 %", "exit", "server")
_PROBABILITIES = ("cut", "ECE", "equal mass", "temperature", "ECE then", "weight", "gain")


def run_exits(
    state_dir: Path,
    *,
    settings: ExitSettings,
    dataset: str | None,
    data_root: Path | None,
    download: bool | None,
    cuts: Sequence[int] | None,
    version: str,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Judge the exits of a coordinator's checkpoint and show the table.

    Raises :class:`SettingsWrong`, ``StoreError``, ``DataError`` and ``NetworkError``.
    """
    run, store, identity = open_store(state_dir)
    checkpoint = load_checkpoint(store, version)
    made = settings_of_run(
        state_dir / run,
        identity,
        {"dataset": dataset, "data_root": data_root, "download": download},
    )
    images = held_out_images(made)
    if images is None:
        raise SettingsWrong("this run names no data set: give --dataset, e.g. fashion-mnist-small")
    spec = NetworkSpec(**made.network.model_dump())
    judged = judge_exits(
        checkpoint.model.state,
        spec,
        _trained(checkpoint, cuts, build_network(spec).cuts),
        images,
        made.codec,
        settings=settings,
        mechanism=made.mechanism,
    )
    if plot is not None:
        bench_rows.write_text(plot, plot_curves(judged))
    if as_json:
        print(
            json.dumps(
                finite(
                    {
                        "run": run,
                        "version": checkpoint.version,
                        "dataset": images.name,
                        "codec": made.codec,
                        "settings": settings.model_dump(mode="json"),
                        "cuts": [found.row | {"curve": points(found.curve)} for found in judged],
                    }
                ),
                indent=1,
            )
        )
        return
    show(judged, settings, f"version {checkpoint.version} of {run} on {images.name}")


def plot_curves(judged: Sequence[Judged]) -> str:
    """Accuracy against offload rate for every cut, with the chosen thresholds, as SVG."""
    cuts = [found.row["cut"] for found in judged]
    lines, chosen = [], []
    for found in judged:
        row, style = found.row, style_of(found.row["cut"], cuts)
        place = (row["offload_rate"], row["accuracy"])
        label = (
            f"cut {row['cut']}: τ = {row['threshold']:.3f} offloads {percent(place[0])}, "
            f"{percent(place[1])} right"
        )
        line = [(point["offload_rate"], point["accuracy"]) for point in points(found.curve)]
        lines.append(Series(label, style, line))
        chosen.append(Series(label, style, [place]))
    return standalone(
        line_chart(
            [*lines, *chosen],
            name="Accuracy by offload rate",
            x_label="offloaded, % of the test images; dots: the calibrated thresholds",
            x_range=(0.0, 1.0),
            y_range=share_range(y for line in lines for _, y in line.points),
            x_format=lambda x: f"{100 * x:g}",
            y_format=percent,
            legend=True,
        )
    )


def _trained(checkpoint: Checkpoint, cuts: Sequence[int] | None, legal: range) -> Sequence[int]:
    trained = sorted(checkpoint.trained_cuts)
    if not trained:
        raise SettingsWrong(f"version {checkpoint.version} has no exit that was trained")
    for cut in cuts or ():
        if cut not in trained:
            what = "that exit is not trained" if cut in legal else "there is no such cut"
            raise SettingsWrong(
                f"--cuts {cut}: {what}; version {checkpoint.version} has those at "
                f"{', '.join(map(str, trained))}"
            )
    return list(dict.fromkeys(cuts or trained))


def points(curve: Curve) -> list[dict[str, float]]:
    """Threshold, offload rate and accuracy along a curve, at ``CURVE_POINTS`` at most."""
    last = len(curve.thresholds) - 1
    shown = np.unique(np.linspace(0, last, min(last + 1, CURVE_POINTS)).round().astype(int))
    return [
        {
            "threshold": float(curve.thresholds[i]),
            "offload_rate": float(curve.offload_rate[i]),
            "accuracy": float(curve.accuracy[i]),
        }
        for i in shown
    ]


def show(judged: Sequence[Judged], settings: ExitSettings, title: str) -> None:
    """Print the tables, and on standard error what could not be reached."""
    row = judged[0].row
    print(
        f"wanted: {_wanted(settings)}; rule {settings.rule}\ncalibrated on "
        f"{row['calibration_images']:,} held-out images, judged by {row['test_images']:,} others"
    )
    console = Console()
    cells = [_threshold_cells(found.row) for found in judged]
    bench_rows.show(f"{title}, in %", _THRESHOLDS, cells, console)
    cells = [_probability_cells(found.row) for found in judged]
    bench_rows.show("calibration error of exits; ensemble", _PROBABILITIES, cells, console)
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    for found in judged:
        if not found.row["reached"]:
            errors.print(_unreached(found.row))


def _wanted(settings: ExitSettings) -> str:
    promise = "" if settings.level is None else f", with probability {settings.level:g}"
    if settings.offload is not None:
        return f"an offload rate of at most {percent(settings.offload)}{promise}"
    if settings.accuracy is not None:
        return f"an accuracy of at least {percent(settings.accuracy)}{promise}"
    points = "1 point" if settings.loss == 0.01 else f"{100 * settings.loss:g} points"
    return f"an accuracy at most {points} below that of the server"


def _threshold_cells(row: Row) -> list[str]:
    return [
        str(row["cut"]),
        f"{row['threshold']:.4f}" + ("" if row["reached"] else " !"),
        _points_of(row["offload_rate"], 1),
        _points_of(row["accuracy"], 1),
        f"{_points_of(row['accuracy_low'], 1)} – {_points_of(row['accuracy_high'], 1)}",
        _points_of(row["exit_accuracy"], 1),
        _points_of(row["server_accuracy"], 1),
    ]


def _probability_cells(row: Row) -> list[str]:
    gain, half = _points_of(row["ensemble_gain"], 2), _points_of(row["ensemble_gain_half"], 2)
    return [
        str(row["cut"]),
        f"{row['ece']:.3f}",
        f"{row['ece_equal_mass']:.3f}",
        f"{row['temperature']:.2f}",
        f"{row['ece_scaled']:.3f}",
        f"{row['ensemble_weight']:.2f}",
        f"{gain} ± {half}",
    ]


def _unreached(row: Row) -> str:
    if row["wanted"] == "offload":
        what, nearest, value = "offload rate", "lowest", row["calibration_offload_rate"]
    else:
        what, nearest, value = "accuracy", "best", row["calibration_accuracy"]
    how = "reached on" if row["level"] is None else f"promised at {row['level']:g} from"
    return (
        f"! cut {row['cut']}: an {what} of {percent(row['wanted_value'])} cannot be {how} "
        f"{row['calibration_images']:,} images; their {nearest}, {percent(value)}, is at "
        f"τ = {row['threshold']:.4f}"
    )


def _points_of(share: float, digits: int) -> str:
    return f"{100 * share:.{digits}f}".replace("-", "−")
