"""What came out of the exits: thresholds, offload rates, calibration, ensembles."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ops.experiments.one_run import Record
from ops.experiments.tables import Results, csv_text, markdown

COLUMNS = (
    "threshold",
    "offload_rate",
    "accuracy",
    "accuracy_low",
    "accuracy_high",
    "exit_accuracy",
    "server_accuracy",
    "ece",
    "ece_equal_mass",
    "temperature",
    "ece_scaled",
    "ensemble_weight",
    "ensemble_accuracy",
)
"""See ``ops.exits.judge_exits``."""


def exits_csv(results: Results) -> str:
    """One line for each exit of each model."""
    rows = [
        [arm, seed, row["device"], row["cut"], *(f"{row[column]:.4f}" for column in COLUMNS)]
        for arm, runs in results.items()
        for seed, result in sorted(runs.items())
        for row in result["exits"]
    ]
    return csv_text(["arm", "seed", "device", "cut", *COLUMNS], rows)


def exit_table(runs: dict[int, Record]) -> str:
    """The exits of one arm, means over seeds; empty if there are none.

    Thresholds are chosen on one half of the test images so that device and server together lose
    at most a point against the server, everything else is of the other half.
    """
    rows = [row for result in runs.values() for row in result["exits"]]
    lines = [
        [
            "cut",
            "exit",
            "full network",
            "threshold",
            "offloaded",
            "together",
            "ECE",
            "temperature",
            "ECE then",
            "with ensemble",
        ]
    ]
    for cut in sorted({row["cut"] for row in rows}):
        mine = [row for row in rows if row["cut"] == cut]
        lines.append(
            [
                str(cut),
                _percent(mine, "exit_accuracy"),
                _percent(mine, "server_accuracy"),
                f"{_mean(mine, 'threshold'):.3f}",
                _percent(mine, "offload_rate"),
                _percent(mine, "accuracy"),
                f"{_mean(mine, 'ece'):.3f}",
                f"{_mean(mine, 'temperature'):.2f}",
                f"{_mean(mine, 'ece_scaled'):.3f}",
                _percent(mine, "ensemble_accuracy"),
            ]
        )
    return markdown(lines) if rows else ""


def _mean(rows: Sequence[Record], column: str) -> float:
    return statistics.fmean(row[column] for row in rows)


def _percent(rows: Sequence[Record], column: str) -> str:
    return f"{100 * _mean(rows, column):.1f}"
