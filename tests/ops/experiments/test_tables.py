"""What is said of results: means, paired intervals, totals."""

from __future__ import annotations

import csv
import io
import math

import pytest

from ops.experiments import exit_tables, tables
from ops.experiments.one_run import Record
from ops.experiments.plots import all_plots
from ops.experiments.runner import Progress
from ops.experiments.spec import Arm, Experiment


def result(full: float, exits: dict[str, float], sent: int = 0) -> Record:
    history = [
        {"round": 1, "samples": 10, "bytes_up": sent, "bytes_down": 2 * sent, "discarded": 0},
        {"round": 2, "samples": 30, "bytes_up": 3 * sent, "bytes_down": 0, "discarded": 1}
        | {"full": full, "exits": exits},
    ]
    final = {"full": full, "full_by_cut": dict.fromkeys(exits, full), "exits": exits}
    curve = [{"offload_rate": 1.0, "accuracy": full}, {"offload_rate": 0.0, "accuracy": 0.1}]
    rows = [
        {"device": "", "cut": int(cut), "curve": curve} | dict.fromkeys(exit_tables.COLUMNS, value)
        for cut, value in exits.items()
    ]
    return {"final": final, "history": history, "exits": rows}


RESULTS: tables.Results = {
    "old": {0: result(0.50, {"2": 0.4}), 1: result(0.60, {"2": 0.5})},
    "new": {
        0: result(0.53, {"2": 0.4, "3": 0.1}, sent=100),
        1: result(0.61, {"2": 0.4, "3": 0.2}, sent=100),
        7: result(0.99, {"2": 0.9, "3": 0.9}, sent=100),
    },
    "none yet": {},
}


def test_differences_are_paired_by_the_seeds_both_have() -> None:
    found = tables.paired(RESULTS["new"], RESULTS["old"], lambda final: final["full"])
    assert found is not None
    assert found.half is not None
    assert found.mean == pytest.approx(2.0)  # +3 and +1 points; seed 7 has no partner
    assert found.half == pytest.approx(12.706 * math.sqrt(2) / math.sqrt(2))
    assert tables.paired(RESULTS["new"], {}, lambda final: final["full"]) is None
    claims = tables.claims(["new"], ["old"], RESULTS).splitlines()
    assert claims[2].split("|")[1:5] == [" new ", " 2 ", " +2.0 ± 12.7 ", " −5.0 ± 63.5 "]
    assert claims[3].count("–") == 2  # old has no exit at cut 3


def test_an_arm_is_compared_with_the_one_it_names() -> None:
    experiment = Experiment(
        name="x",
        seeds=(0, 1),
        reference="old",
        data={"dataset": "x"},
        arms=(Arm(name="old"), Arm(name="new"), Arm(name="newer", against="new")),
    )
    results = RESULTS | {"newer": {0: result(0.63, {"3": 0.2}), 1: result(0.71, {"3": 0.3})}}
    del results["none yet"]
    rows = [line.split("|")[1:-1] for line in tables.table(experiment, results).splitlines()]
    assert [cell.strip() for cell in rows[0][5:8]] == ["against", "full network", "exits"]
    gains = {row[0].strip(): [cell.strip() for cell in row[5:8]] for row in rows[2:]}
    assert gains["old"] == ["–", "–", "–"]
    assert gains["new"] == ["old", "+2.0 ± 12.7", "−5.0 ± 63.5"]  # cut 2 is the one both have
    assert gains["newer"] == ["new", "+10.0 ± 0.0", "+10.0 ± 0.0"]


def test_every_accuracy_is_a_line() -> None:
    lines = list(csv.DictReader(io.StringIO(tables.results_csv(RESULTS))))
    assert len(lines) == 2 * 2 + 3 * 4
    line = next(x for x in lines if (x["arm"], x["seed"], x["network"]) == ("new", "1", "exit"))
    assert (line["cut"], line["accuracy"], line["samples"]) == ("2", "0.4000", "40")
    assert (line["bytes_up"], line["bytes_down"], line["discarded"]) == ("400", "200", "1")
    curves = list(csv.DictReader(io.StringIO(tables.curves_csv(RESULTS))))
    assert {x["round"] for x in curves} == {"2"}, "round 1 was not scored"
    assert {x["bytes"] for x in curves if x["arm"] == "new"} == {"600"}


def test_exits_are_means_over_seeds_and_all_of_them_are_in_the_file() -> None:
    lines = list(csv.DictReader(io.StringIO(exit_tables.exits_csv(RESULTS))))
    assert len(lines) == 2 + 3 * 2
    assert {line["ece"] for line in lines if line["arm"] == "old"} == {"0.4000", "0.5000"}
    table = exit_tables.exit_table(RESULTS["new"]).splitlines()
    assert len(table) == 2 + 2
    assert table[3].split("|")[1:3] == [" 3 ", " 40.0 "]  # of 10, 20 and 90 %
    assert exit_tables.exit_table({}) == ""


def test_bytes_until_an_arm_was_nearly_as_good_as_the_reference() -> None:
    experiment = Experiment(
        name="x",
        seeds=(0,),
        reference="new",
        data={"dataset": "x"},
        arms=(Arm(name="new"), Arm(name="old")),
    )
    good = [
        {"round": n, "samples": 5, "bytes_up": 100, "bytes_down": 20, "discarded": 0}
        | {"full": full}
        for n, full in enumerate((0.1, 0.95, 0.2, 0.6, 0.9, 1.0), 1)
    ]
    results: tables.Results = {"new": {0: {"history": good}}, "old": {0: result(0.5, {"2": 0.4})}}
    rows = tables.bytes_table(experiment, results).splitlines()
    assert "seeds that reached 90.0 %" in rows[0]
    # Round 2 was lucky; 5 and 6 are good.
    assert rows[2] == "| new | 1 of 1 | 5 | 25 | 600 B |"
    assert len(rows) == 3, "old sends nothing"


def test_plots_show_every_arm_that_has_points() -> None:
    plots = all_plots(RESULTS, "new")
    assert sorted(plots) == ["exit-2.svg", "exit-3.svg", "full.svg", "offload.svg"]
    assert ">cut 3</text>" in plots["offload.svg"]
    assert ">old</text>" in plots["full.svg"]
    assert ">none yet</text>" not in plots["full.svg"]
    assert ">old</text>" not in plots["exit-3.svg"]


def test_the_time_left_follows_the_pace_so_far() -> None:
    now = [0.0]
    progress = Progress(100, clock=lambda: now[0])
    now[0] = 10.0
    assert progress.note(20) == "about 40 s left"
    now[0] = 15.0
    assert progress.note(40) == "about 10 s left"
    assert progress.note(40) == "nothing left to train"
