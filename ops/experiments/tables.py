"""What came out of an experiment, as CSV and Markdown."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Iterable, Sequence

from ops.bytes_to_accuracy import bytes_to_accuracy
from ops.experiments.one_run import Record
from ops.experiments.spec import Experiment
from ops.paired import Difference, difference
from ops.units import MISSING, byte_size

FULL = "full"
TOTALS = ("samples", "bytes_up", "bytes_down", "discarded")
NEARLY = 0.9
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
    return csv_text(header, rows)


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
    return csv_text(
        ["arm", "seed", "round", "network", "cut", "accuracy", "samples", "bytes"], rows
    )


def totals(result: Record) -> dict[str, int]:
    """Of all rounds of a training."""
    return {key: sum(record[key] for record in result["history"]) for key in TOTALS}


def table(experiment: Experiment, results: Results) -> str:
    """One line for each arm: mean accuracies, and what it gains on the arm it is compared with.

    Gains are paired by seed. That of the exits is the mean over the cuts that both arms have.
    """
    against = {arm.name: arm.against or experiment.reference for arm in experiment.arms}
    cuts = cuts_of(results)
    lines = [
        ["arm", "seeds", "full network"]
        + [f"exit {cut}" for cut in cuts]
        + ["against", "full network", "exits", "bytes a sample", "discarded"]
    ]
    for arm, runs in results.items():
        if not runs:
            continue
        finals = [result["final"] for result in runs.values()]
        sums = [totals(result) for result in runs.values()]
        sent = sum(s["bytes_up"] + s["bytes_down"] for s in sums)
        gains = [MISSING] * 3
        if against[arm] != arm:
            others = results.get(against[arm], {})
            common = set(cuts_of({"": runs})) & set(cuts_of({"": others}))
            gains = [
                against[arm],
                compare(runs, others, _full),
                compare(runs, others, _mean_exit(common)) if common else MISSING,
            ]
        lines.append(
            [
                arm,
                str(len(runs)),
                points(final["full"] for final in finals),
                *[points(_exits(finals, str(cut))) for cut in cuts],
                *gains,
                byte_size(sent / max(1, sum(s["samples"] for s in sums))) if sent else "0",
                str(sum(s["discarded"] for s in sums)),
            ]
        )
    return markdown(lines)


def claims(arms: Iterable[str], baselines: Iterable[str], results: Results) -> str:
    """What arms gain on baselines at every cut: full network on full network, exit on exit."""
    lines = [["arm", "cut"]]
    for baseline in baselines:
        lines[0] += [f"full network against {baseline}", f"exit against {baseline}"]
    for arm in arms:
        runs = results.get(arm, {})
        for cut in cuts_of({arm: runs}):
            gains = []
            for baseline in baselines:
                others = results.get(baseline, {})
                gains += [compare(runs, others, _at(key, cut)) for key in ("full_by_cut", "exits")]
            lines.append([arm, str(cut), *gains])
    return markdown(lines)


def bytes_table(experiment: Experiment, results: Results) -> str:
    """What each arm sent until it was nearly as good as the reference; empty if nothing is sent.

    The accuracy is :data:`NEARLY` of the reference's, on the curve images.
    """
    reference = results.get(experiment.reference, {}).values()
    ends = [result["history"][-1][FULL] for result in reference]
    if not ends:
        return ""
    wanted = NEARLY * statistics.fmean(ends)
    lines = [["arm", f"seeds that reached {100 * wanted:.1f} %", "round", "samples", "bytes"]]
    for arm, runs in results.items():
        if not any(totals(result)["bytes_up"] for result in runs.values()):
            continue
        histories = (_as_history(result) for result in runs.values())
        found = [reached for h in histories if (reached := bytes_to_accuracy(h, wanted))]
        cells = [MISSING] * 3
        if found:
            cells = [
                f"{statistics.fmean(reached.round for reached in found):.0f}",
                f"{statistics.fmean(reached.samples for reached in found):,.0f}",
                byte_size(statistics.fmean(r.bytes_up + r.bytes_down for r in found)),
            ]
        lines.append([arm, f"{len(found)} of {len(runs)}", *cells])
    return markdown(lines) if len(lines) > 1 else ""


def _as_history(result: Record) -> list[Record]:
    """As a coordinator keeps it."""
    return [
        {
            "round": record["round"],
            "server_accuracy": record.get(FULL),
            "bytes": {"up/": record["bytes_up"], "down/": record["bytes_down"]},
            "devices": {"": {"samples": record["samples"]}},
        }
        for record in result["history"]
    ]


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


def _mean_exit(cuts: Iterable[int]) -> Pick:
    return lambda final: statistics.fmean(final["exits"][str(cut)] for cut in cuts)


def _at(key: str, cut: int) -> Pick:
    return lambda final: final[key].get(str(cut))


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Rows of cells as a file."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return out.getvalue()
