"""PromQL of the dashboards: sums, rates, shares and quantiles of what the variables choose.

Every selector has ``FLEET``: one coordinator is one fleet, and an agent that is scraped itself
shows series of the same names. ``REPORTED`` goes with what devices report: it chooses by cut layer
and device class.
"""

from __future__ import annotations

FLEET = 'instance="$coordinator"'
CUT = 'cut=~"$cut"'
DEVICE = 'device="$device"'
REPORTED = (CUT, 'device_class=~"$device_class"')

WINDOW = "$__rate_interval"


def series(name: str, *matchers: str) -> str:
    """The series of ``name`` in this fleet that match."""
    return f"{name}{{{', '.join((FLEET, *matchers))}}}"


def total(name: str, *matchers: str, by: str = "") -> str:
    """The sum of the series that match, by the labels in ``by``."""
    return f"sum{_by(by)} ({series(name, *matchers)})"


def mean(name: str, *matchers: str, by: str = "") -> str:
    """The mean of the series that match."""
    return f"avg{_by(by)} ({series(name, *matchers)})"


def largest(name: str, *matchers: str, by: str = "") -> str:
    """The largest of the series that match."""
    return f"max{_by(by)} ({series(name, *matchers)})"


def rate(name: str, *matchers: str, by: str = "") -> str:
    """How fast counters grow, a second; ``name`` without its suffix ``_total``."""
    return f"sum{_by(by)} (rate({series(f'{name}_total', *matchers)}[{WINDOW}]))"


def increase(name: str, window: str, *matchers: str, by: str = "") -> str:
    """By how much counters have grown within ``window``; ``name`` without ``_total``."""
    return f"sum{_by(by)} (increase({series(f'{name}_total', *matchers)}[{window}]))"


def ratio(part: str, whole: str) -> str:
    """One expression over another; absent where the other is 0, for 0/0 says nothing."""
    return f"{part} / ({whole} > 0)"


def quantile(q: float, name: str, *matchers: str, by: str = "") -> str:
    """The ``q``-quantile of a histogram over the last minutes."""
    buckets = f"rate({series(f'{name}_bucket', *matchers)}[{WINDOW}])"
    return f"histogram_quantile({q:g}, sum{_by(', '.join(filter(None, (by, 'le'))))} ({buckets}))"


def average(name: str, *matchers: str, by: str = "", window: str = WINDOW) -> str:
    """The mean of a histogram's values within ``window``."""
    parts = (f"{name}_sum", f"{name}_count")
    gains = [f"sum{_by(by)} (increase({series(part, *matchers)}[{window}]))" for part in parts]
    return ratio(*gains)


def behind(*matchers: str, by: str) -> str:
    """By how many versions the devices that are furthest behind are behind, by ``by``."""
    held = series("splitfleet_held_version", *matchers)
    newest = series("splitfleet_parameter_version")
    return f"max{_by(by)} ({newest} - on (instance) group_right () {held})"


def _by(labels: str) -> str:
    return f" by ({labels})" if labels else ""
