"""The page of a report: one file that needs nothing else, light or dark as the reader has it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from ops.report_charts import (
    accuracy_chart,
    bytes_chart,
    cuts_of,
    exit_rate_chart,
    style_of,
    threshold_accuracy_chart,
)
from ops.units import amount, byte_size, milliseconds, percent, seconds

Row = Sequence[str]
MAX_ROWS = 200
"""More rounds or devices than that are not listed; summary.json has the devices."""

_ROLES = {
    "up/activation": "activations",
    "down/gradient": "gradients",
    "up/parameter": "parameters from devices",
    "down/parameter": "parameters to devices",
    "up/feature": "features offloaded (evaluation)",
    "down/prediction": "predictions (evaluation)",
    "up/control": "control",
    "down/control": "control",
}


def render_page(summary: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """The whole page, well-formed as XML too; ``result`` has what ``summary`` leaves out."""
    sweep = summary["exit_sweep"]
    pictures = (
        (accuracy_chart(result), bytes_chart(result)),
        (exit_rate_chart(result, sweep), threshold_accuracy_chart(result, sweep)),
    )
    learning, answering = (f'<div class="pair">{a}{b}</div>' for a, b in pictures)
    style = files("ops").joinpath("report.css").read_text("utf-8")
    body = "\n".join(
        (
            _header(summary),
            _tiles(summary, result["settings"]),
            "<h2>Learning</h2>",
            learning,
            "<h2>Answering</h2>",
            answering,
            "<h2>Devices</h2>",
            _trained_table(summary),
            _answered_table(summary),
            "<h2>Traffic</h2>",
            _traffic_table(summary),
            "<h2>Rounds</h2>",
            _rounds_table(result["history"], summary["rounds_abandoned"]),
            "<h2>Settings</h2>",
            _settings(result["settings"]),
            _footer(summary),
        )
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<meta name="color-scheme" content="light dark"/>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'"/>
<title>splitfleet: run {escape(summary["run"])}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def _header(summary: Mapping[str, Any]) -> str:
    devices = _plural(len(summary["devices"]), "device")
    feedback = "gradients sent back" if summary["feedback"] == "gradient" else "no feedback"
    data = f" on {summary['dataset']}" if summary["dataset"] else ""
    abandoned = summary["rounds_abandoned"]
    lost = f" ({abandoned} more abandoned)" if abandoned else ""
    return f"""<header>
<p class="brand">splitfleet</p>
<h1>One network, trained by {devices}</h1>
<p class="lead">{_plural(summary["rounds"], "round")}{lost}{escape(data)}: strategy
{escape(summary["strategy"])}, {feedback}, codec {escape(summary["codec"])},
seed {summary["seed"]}.</p>
</header>"""


def _footer(summary: Mapping[str, Any]) -> str:
    return (
        f"<footer>Run {escape(summary['run'])}, reported by splitfleet. "
        "summary.json beside this file has the numbers for programs.</footer>"
    )


def _tiles(summary: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    inference = summary["inference"] or {}
    rounds_took = seconds(summary["training_seconds"])
    tiles = (
        (
            "Full network",
            percent(summary["server_accuracy"]),
            "of all test images right, by the merged network after the last round",
        ),
        (
            "Fleet, exits and offloads together",
            percent(inference.get("accuracy")),
            "of the devices’ test images right, each answered by an exit or by the server",
        ),
        (
            "Answered on the device",
            percent(inference.get("exit_rate")),
            f"of those images never left their device, at threshold τ = {settings['threshold']:g}",
        ),
        (
            "Training speed",
            f"{amount(summary['samples_per_second'])} samples/s",
            f"{amount(summary['samples'])} samples of all devices in {rounds_took} of rounds",
        ),
        (
            "Upload per sample",
            byte_size(summary["bytes_up_per_sample"]),
            "of activations per training sample; parameters and evaluation not included",
        ),
        (
            "Wall time",
            seconds(summary["wall_seconds"]),
            "from start to report, with start-up, evaluation and inference",
        ),
    )
    cells = "".join(
        f'<div class="tile"><dt>{escape(name)}</dt><dd class="value">{escape(value)}</dd>'
        f'<dd class="why">{escape(why)}</dd></div>'
        for name, value, why in tiles
    )
    return f'<dl class="tiles">{cells}</dl>'


def _trained_table(summary: Mapping[str, Any]) -> str:
    cuts = cuts_of(summary["devices"])
    rows = [
        (
            _device_cell(device, cuts),
            str(device["cut"]),
            amount(device["samples"]),
            str(device["rounds"]),
            percent(device["exit_accuracy"]),
            percent(device["server_accuracy"]),
            _decimals(device["activation_bits"], 2),
            byte_size(device["bytes_up"]),
            byte_size(device["bytes_down"]),
        )
        for device in summary["devices"][:MAX_ROWS]
    ]
    return _table_card(
        "What each device trained",
        "Exit accuracy is the device’s own early exit on all test images; server accuracy is the "
        "rest of the network on the features that this device sends, cut layer and codec included. "
        "Bits are what a value of its activations took in training. Bytes are application payload, "
        "broadcasts included.",
        ("device", "cut", "samples", "rounds", "exit acc.", "server acc.", "bits", "up", "down"),
        rows,
    )


def _answered_table(summary: Mapping[str, Any]) -> str:
    cuts = cuts_of(summary["devices"])
    answering = [device for device in summary["devices"] if device["inference"] is not None]
    title = "What each device answered"
    if not answering:
        return _missing_card(
            title, "No device answered test images in this run: inference was off, or none had any."
        )
    rows = [
        (_device_cell(device, cuts), *_answers(device["inference"]))
        for device in answering[:MAX_ROWS]
    ]
    by_cut = summary["inference_by_cut"]
    if len(by_cut) < len(answering):
        rows += [(f"cut {cut}", *_answers(total)) for cut, total in by_cut.items()]
    return _table_card(
        title,
        "Every image was answered by the exit if its confidence was above τ, else by the server; "
        "a refusal or a time-out falls back to the exit. The exit takes its time per image, an "
        "offload per request of a batch’s unsure images.",
        (
            "device",
            "images",
            "by exit",
            "by server",
            "refused",
            "timed out",
            "correct",
            "exit alone",
            "exit time",
            "offload time",
            "up",
            "down",
        ),
        rows,
        total=("fleet", *_answers(summary["inference"])),
    )


def _answers(inference: Mapping[str, Any]) -> Row:
    images = inference["images"]
    return (
        amount(images),
        percent(inference["exit_rate"]),
        amount(inference["answered"]),
        amount(inference["refused"]),
        amount(inference["timeouts"]),
        percent(inference["accuracy"]),
        percent(inference["exit_correct"] / images if images else None),
        milliseconds(inference["exit_ms"]),
        milliseconds(inference["offload_ms"]),
        byte_size(inference["bytes_up"]),
        byte_size(inference["bytes_down"]),
    )


def _traffic_table(summary: Mapping[str, Any]) -> str:
    roles, samples = summary["bytes_by_role"], summary["samples"]
    whole = summary["bytes_up"] + summary["bytes_down"]
    known = [role for role in _ROLES if role in roles]
    rows = [
        (
            escape(_ROLES.get(role, role)),
            "up" if role.startswith("up/") else "down",
            byte_size(roles[role]),
            percent(roles[role] / whole if whole else None),
            byte_size(roles[role] / samples) if samples else "–",
        )
        for role in [*known, *(role for role in roles if role not in _ROLES)]
    ]
    total = (
        "all",
        "",
        byte_size(whole),
        percent(1.0 if whole else None),
        byte_size(whole / samples) if samples else "–",
    )
    return _table_card(
        "Bytes by role",
        "Application payload that crossed the coordinator’s link over the whole run; a broadcast "
        "counts once, however many devices hear it.",
        ("role", "direction", "bytes", "share", "per training sample"),
        rows,
        total=total,
    )


def _rounds_table(history: Sequence[Mapping[str, Any]], abandoned: int) -> str:
    if not history:
        return _missing_card("Every round", "No round was closed.")
    rows = []
    for record in history[-MAX_ROWS:]:
        accounts = [device["account"] for device in record["devices"].values()]
        rows.append(
            (
                str(record["round"]),
                str(record["attempt"] + 1),
                seconds(record["seconds"]),
                str(sum(device["finished"] for device in record["devices"].values()))
                + f" of {len(record['devices'])}",
                amount(sum(a["produced"] for a in accounts)),
                amount(sum(a["applied"] for a in accounts)),
                amount(sum(sum(a["discarded"].values()) for a in accounts)),
                amount(sum(a["expired"] for a in accounts)),
                _decimals(_training_loss(record), 3),
                _decimals(record.get("server_loss"), 3),
                percent(record.get("server_accuracy")),
            )
        )
    shown = f" The last {MAX_ROWS} of {len(history)}." if len(history) > MAX_ROWS else ""
    lost = f" Rounds given up below quorum, not listed: {abandoned}." if abandoned else ""
    table = _table(
        (
            "round",
            "attempt",
            "time",
            "finished",
            "batches",
            "applied",
            "discarded",
            "expired",
            "training loss",
            "test loss",
            "accuracy",
        ),
        rows,
    )
    return (
        f'<section class="card wide"><h3>Every round, with its books</h3>{table}'
        '<p class="why">Batches produced = applied + discarded + expired; the losses are the full '
        f"network’s cross entropy, in training the mean over samples.{shown}{lost}</p></section>"
    )


def _settings(settings: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<div><dt>{escape(key)}</dt><dd>{escape(_plain(value))}</dd></div>"
        for key, value in _flat(settings)
    )
    return f'<section class="card wide"><dl class="settings">{rows}</dl></section>'


def _training_loss(record: Mapping[str, Any]) -> float | None:
    weights: Counter[str] = Counter()
    for device in record["devices"].values():
        weights[str(device["cut"])] += device["samples"]
    losses = {cut: loss for cut, loss in record["train_loss"].items() if loss is not None}
    whole = sum(weights[cut] for cut in losses)
    return sum(loss * weights[cut] for cut, loss in losses.items()) / whole if whole else None


def _table_card(
    title: str, meaning: str, head: Row, rows: Sequence[Row], total: Row | None = None
) -> str:
    return (
        f'<section class="card wide"><h3>{escape(title)}</h3>{_table(head, rows, total)}'
        f'<p class="why">{escape(meaning)}</p></section>'
    )


def _missing_card(title: str, why: str) -> str:
    return (
        f'<section class="card wide"><h3>{escape(title)}</h3>'
        f'<p class="missing">{escape(why)}</p></section>'
    )


def _table(head: Row, rows: Iterable[Row], total: Row | None = None) -> str:
    """Cells are markup already."""
    lines = [f"<tr>{_cells('th', head)}</tr>"]
    lines += [f"<tr>{_cells('td', row)}</tr>" for row in rows]
    if total is not None:
        lines.append(f'<tr class="total">{_cells("td", total)}</tr>')
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _cells(tag: str, cells: Row) -> str:
    return "".join(f"<{tag}>{cell}</{tag}>" for cell in cells)


def _device_cell(device: Mapping[str, Any], cuts: Sequence[int]) -> str:
    style = style_of(device["cut"], cuts)
    return f'<span class="swatch {style}"></span>{escape(device["device"])}'


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _plain(value: Any) -> str:
    match value:
        case None:
            return "–"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:g}"
    return str(value)


def _decimals(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
