"""The pictures of a report: accuracy over rounds, bytes per round, and both sides of a threshold.

A device's exit and its sweep depend on its cut layer alone, so devices of one cut share a line, and
a cut has the same colour everywhere on the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ops.charts import Bar, Series, line_chart, mirrored_bars, share_range
from ops.units import byte_size, percent, short_size

STYLES = 9
BARS = 48
WHOLE = "all"

# Role in traffic → name in the legend and colour, not one of the first cuts'. Stacked from the axis
# outwards in this order.
_ROLES = {
    "up/activation": ("activations", "c4"),
    "down/gradient": ("gradients", "c6"),
    "up/parameter": ("parameters", "c7"),
    "down/parameter": ("parameters", "c7"),
    "up/feature": ("features", "c5"),
    "down/prediction": ("predictions", "c8"),
    "up/control": ("control", "mute"),
    "down/control": ("control", "mute"),
}
_NO_EVALUATION = (
    "The coordinator had no test images: start it with a data set to have checkpoints scored."
)


def cuts_of(devices: Sequence[Mapping[str, Any]]) -> list[int]:
    """The cut layers in use, ascending."""
    return sorted({device["cut"] for device in devices})


def style_of(cut: int, cuts: Sequence[int]) -> str:
    """The CSS class of a cut's colour."""
    return f"c{cuts.index(cut) % STYLES}"


def accuracy_chart(result: Mapping[str, Any]) -> str:
    """Accuracy of each exit and of the full network after each round."""
    title = "Accuracy over rounds"
    meaning = (
        "Share of all test images that the merged network, and each early exit by itself, gets "
        "right after a round."
    )
    history = [r for r in result["history"] if r.get("server_accuracy") is not None]
    if not history:
        return _missing(title, _NO_EVALUATION if result["history"] else "No round was closed.")
    cuts = cuts_of(result["devices"])
    series = [
        Series(
            _exit_label(cut, result["devices"]),
            style_of(cut, cuts),
            [
                (record["round"], accuracy)
                for record in history
                if (accuracy := record.get("exit_accuracy", {}).get(str(cut))) is not None
            ],
        )
        for cut in cuts
    ]
    series = [line for line in series if line.points]
    full = [(record["round"], record["server_accuracy"]) for record in history]
    series.append(Series("full network", WHOLE, full))
    chart = line_chart(
        series,
        name=title,
        x_label="round",
        x_range=(history[0]["round"], history[-1]["round"]),
        y_range=share_range(y for line in series for _, y in line.points),
        x_format=lambda x: f"{x:.0f}",
        y_format=_share,
        whole_x=True,
    )
    return _figure(title, chart, _legend(series, values=True), meaning)


def bytes_chart(result: Mapping[str, Any]) -> str:
    """Bytes of each round by role, up above the axis and down below it."""
    title = "Bytes per round, by role"
    history = [record for record in result["history"] if record.get("bytes")]
    if not history:
        why = "This run has no byte counts by round." if result["history"] else None
        return _missing(title, why or "No round was closed.")
    meaning = (
        "Application payload between the devices together and the coordinator: upwards what "
        "devices send, downwards what they receive."
    )
    groups = _groups(history, BARS)
    if len(groups) < len(history):
        meaning += " Each bar is the mean of several rounds."
    bars = [_bar(group) for group in groups]
    shown = {
        (label, style): None
        for bar in bars
        for stack in (bar.up, bar.down)
        for label, style, _ in stack
    }
    order = list(dict.fromkeys(_ROLES.values()))
    legend = [Series(label, style, ()) for label, style in sorted(shown, key=order.index)]
    chart = mirrored_bars(
        bars, name=title, x_label="round", y_format=byte_size, tick_format=short_size
    )
    return _figure(title, chart, _legend(legend), meaning)


def exit_rate_chart(result: Mapping[str, Any], sweep: Sequence[Mapping[str, float]]) -> str:
    """Exit rate against threshold."""
    return _sweep_chart(
        result,
        sweep,
        "exit_rate",
        "Exit rate by threshold",
        "Share of the test images whose exit is more confident than τ, so that they never leave "
        "the device: a higher threshold offloads more.",
    )


def threshold_accuracy_chart(
    result: Mapping[str, Any], sweep: Sequence[Mapping[str, float]]
) -> str:
    """Accuracy of device and server together against threshold."""
    return _sweep_chart(
        result,
        sweep,
        "accuracy",
        "Accuracy by threshold",
        "Share of the test images that device and server together get right: the exit alone at "
        "τ = 0, nearly always the full network at τ = 1.",
    )


def _sweep_chart(
    result: Mapping[str, Any],
    mean: Sequence[Mapping[str, float]],
    key: str,
    title: str,
    meaning: str,
) -> str:
    devices = [device for device in result["devices"] if device.get("exit_sweep")]
    if not devices:
        trained = any(record.get("server_accuracy") is not None for record in result["history"])
        return _missing(title, "No device’s exit was trained." if trained else _NO_EVALUATION)
    cuts = cuts_of(result["devices"])
    by_cut = {device["cut"]: device["exit_sweep"] for device in devices}
    series = [
        Series(
            _exit_label(cut, devices),
            style_of(cut, cuts),
            [(point["threshold"], point[key]) for point in sweep],
        )
        for cut, sweep in sorted(by_cut.items())
    ]
    series.append(Series("fleet mean", WHOLE, [(p["threshold"], p[key]) for p in mean]))
    values = [y for line in series for _, y in line.points]
    threshold = result["settings"]["threshold"]
    chart = line_chart(
        series,
        name=title,
        x_label="threshold τ",
        x_range=(0.0, 1.0),
        y_range=(0.0, 1.0) if key == "exit_rate" else share_range(values),
        x_format=lambda x: f"{x:g}",
        y_format=_share,
        marker=(threshold, f"τ = {threshold:g}"),
    )
    return _figure(title, chart, _legend(series), meaning)


def _groups(history: Sequence[Mapping[str, Any]], limit: int) -> list[Sequence[Mapping[str, Any]]]:
    size = -(-len(history) // limit)
    return [history[i : i + size] for i in range(0, len(history), size)]


def _bar(records: Sequence[Mapping[str, Any]]) -> Bar:
    first, last = records[0]["round"], records[-1]["round"]
    stacks: dict[str, list[tuple[str, str, float]]] = {"up": [], "down": []}
    for role, (label, style) in _ROLES.items():
        size = sum(record["bytes"].get(role, 0) for record in records) / len(records)
        if size:
            stacks[role.partition("/")[0]].append((label, style, size))
    return Bar(str(first) if first == last else f"{first}–{last}", stacks["up"], stacks["down"])


def _exit_label(cut: int, devices: Sequence[Mapping[str, Any]]) -> str:
    names = [device["device"] for device in devices if device["cut"] == cut]
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return f"exit at cut {cut} ({', '.join(names[:2])}{more})"


def _legend(series: Sequence[Series], *, values: bool = False) -> str:
    """Colours and names, with ``values`` the last of each line too."""
    entries = "".join(
        f'<li><span class="swatch {line.style}"></span>{escape(line.label)}'
        + (f" <b>{percent(line.points[-1][1])}</b></li>" if values else "</li>")
        for line in series
    )
    return f'<ul class="legend">{entries}</ul>'


def _figure(title: str, chart: str, legend: str, meaning: str) -> str:
    return (
        f'<figure class="card"><h3>{escape(title)}</h3>{chart}{legend}'
        f"<figcaption>{escape(meaning)}</figcaption></figure>"
    )


def _missing(title: str, why: str) -> str:
    reason = f'<p class="missing">{escape(why)}</p>'
    return f'<figure class="card"><h3>{escape(title)}</h3>{reason}</figure>'


def _share(value: float) -> str:
    return f"{100 * value:.4g} %"
