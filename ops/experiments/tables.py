"""What came out of an experiment, as CSV and Markdown."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Iterable, Sequence

from ops.experiments.one_run import Record
from ops.experiments.spec import Experiment
from ops.paired import Difference, difference
from ops.units import MISSING, byte_size

FULL = "full"
TOTALS = ("samples", "bytes_up", "bytes_down", "discarded")
Pick = Callable[[Record], float | None]
Results = dict[str, dict[int, Record]]
"""Arm → seed → what ``run_training`` returned."""


def results_csv(results: Results) -> str:
    """One line for each accuracy of each training: full network or exit, by cut."""
    rows = []
    for arm, by_seed in results.items():
        for seed, result in sorted(by_seed.items()):
            final = result["final"]
            sums = totals(result)
            common = [sums[key] for key in TOTALS]
            for network, by_cut in ((FULL, final["full_by_cut"]), ("exit", final["exits"])):
                rows += [
                    [arm, seed, network, cut, f"{accuracy:.4f}", *common]
                    for cut, accuracy in by_cut.items()
                ]
    header = [
        "arm",
        "seed",
        "network",
        "cut",
        "accuracy",
        "samples",
        "bytes_up",
        "bytes_down",
        "discarded",
    ]
    return _csv(header, rows)


def curves_csv(results: Results) -> str:
    """One line for each accuracy after each round, on the curve images."""
    rows = []
    for arm, by_seed in results.items():
        for seed, result in sorted(by_seed.items()):
            samples = sent = 0
            for record in result["history"]:
                samples += record["samples"]
                sent += record["bytes_up"] + record["bytes_down"]
                if FULL not in record:
                    continue
                points = [(FULL, "", record["full"])]
                points += [("exit", cut, value) for cut, value in record["exits"].items()]
                rows += [
                    [arm, seed, record["round"], network, cut, f"{value:.4f}", samples, sent]
                    for network, cut, value in points
                ]
    return _csv(["arm", "seed", "round", "network", "cut", "accuracy", "samples", "bytes"], rows)


def totals(result: Record) -> dict[str, int]:
    """Of all rounds of a training."""
    return {key: sum(record[key] for record in result["history"]) for key in TOTALS}


def table(experiment: Experiment, results: Results) -> str:
    """One line for each arm: mean accuracies, and differences to the reference, by seed."""
    reference = results.get(experiment.reference, {})
    cuts = cuts_of(results)
    lines = [
        ["arm", "seeds", "full network", f"against {experiment.reference}"]
        + [f"exit {cut}" for cut in cuts]
        + ["bytes a sample", "discarded"]
    ]
    for arm, runs in results.items():
        if not runs:
            continue
        finals = [result["final"] for result in runs.values()]
        sums = [totals(result) for result in runs.values()]
        sent = sum(s["bytes_up"] + s["bytes_down"] for s in sums)
        lines.append(
            [
                arm,
                str(len(runs)),
                points(final["full"] for final in finals),
                MISSING if arm == experiment.reference else compare(runs, reference, _full),
                *[points(_exits(finals, str(cut))) for cut in cuts],
                byte_size(sent / max(1, sum(s["samples"] for s in sums))) if sent else "0",
                str(sum(s["discarded"] for s in sums)),
            ]
        )
    return markdown(lines)


def claims(better: Iterable[str], worse: str, results: Results) -> str:
    """Whether arms beat another at every cut, full network against full network, exit by exit."""
    lines = [["arm", "cut", f"full network against {worse}", f"exit against {worse}"]]
    others = results.get(worse, {})
    for arm in better:
        runs = results.get(arm, {})
        for cut in cuts_of({arm: runs}):
            full = compare(runs, others, _at("full_by_cut", cut))
            at_exit = compare(runs, others, _at("exits", cut))
            lines.append([arm, str(cut), full, at_exit])
    return markdown(lines)


def cuts_of(results: Results) -> list[int]:
    """The cuts of all arms, ascending."""
    finals = [result["final"] for runs in results.values() for result in runs.values()]
    return sorted({int(cut) for final in finals for cut in final["exits"]})


def compare(runs: dict[int, Record], others: dict[int, Record], pick: Pick) -> str:
    """Mean paired difference in points, with its 95 % interval, of the seeds that both have."""
    found = paired(runs, others, pick)
    if found is None:
        return MISSING
    text = _signed(found.mean)
    return text if found.half is None else f"{text} ± {found.half:.1f}"


def paired(runs: dict[int, Record], others: dict[int, Record], pick: Pick) -> Difference | None:
    """In percentage points; None if no seed has both."""
    pairs = [
        (pick(runs[seed]["final"]), pick(others[seed]["final"]))
        for seed in sorted(runs.keys() & others.keys())
    ]
    found = [100 * (one - other) for one, other in pairs if one is not None and other is not None]
    return difference(found) if found else None


def points(values: Iterable[float]) -> str:
    """The mean in per cent."""
    found = list(values)
    return f"{100 * statistics.fmean(found):.1f}" if found else MISSING


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """The first line is the header."""
    rows = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def _exits(finals: Iterable[Record], cut: str) -> list[float]:
    return [final["exits"][cut] for final in finals if cut in final["exits"]]


def _full(final: Record) -> float | None:
    return final.get("full")


def _at(key: str, cut: int) -> Pick:
    return lambda final: final[key].get(str(cut))


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")


def _csv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return out.getvalue()
