"""Numbers as people read them. ``None``, which stands for not measured, is a dash."""

from __future__ import annotations

import re

MISSING = "–"


def percent(share: float | None) -> str:
    """0.8075 → 80.8 %."""
    return MISSING if share is None else f"{100 * share:.1f} %"


def amount(number: float | None) -> str:
    """1234.5 → 1,234; below 10 with one decimal unless whole."""
    if number is None:
        return MISSING
    return f"{number:.1f}" if 0 < number < 10 and number != int(number) else f"{number:,.0f}"


def mebibytes(size: float) -> str:
    """1234.5 → 1,234 MiB; below 10 with two digits: 0.0012 → 0.0012 MiB."""
    return f"{size:,.0f} MiB" if size >= 9.95 else f"{size:.2g} MiB"


def byte_size(size: float | None) -> str:
    """Decimal units, three digits: 1200000 → 1.20 MB."""
    if size is None:
        return MISSING
    value, unit = _scaled(size)
    digits = 0 if unit == "B" or value >= 99.95 else 2 if value < 9.995 else 1
    return f"{value:.{digits}f} {unit}"


def short_size(size: float) -> str:
    """The same without needless zeros: 1200000 → 1.2 MB."""
    value, unit = _scaled(size)
    return f"{value:.3g} {unit}" if size else "0"


def _scaled(size: float) -> tuple[float, str]:
    value, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return value, unit


def seconds(duration: float | None) -> str:
    """97.7 → 1 min 38 s."""
    if duration is None:
        return MISSING
    if duration < 9.95:
        return f"{duration:.1f} s"
    minutes, rest = divmod(round(duration), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def milliseconds(duration: float | None) -> str:
    """0.429 → 0.43 ms."""
    if duration is None:
        return MISSING
    return f"{duration:.2f} ms" if duration < 10 else f"{duration:,.0f} ms"


_SPANS = {"d": 1.0, "h": 1 / 24, "min": 1 / 1440, "w": 7.0}


def parse_days(text: str) -> float:
    """7d, 12h, 30min, 2w → days. Raises ValueError, which says what is allowed."""
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]+)?)(min|h|d|w)", text.strip())
    if found is None or not float(found[1]):
        raise ValueError(f"{text!r} is no length of time; write 7d, 12h, 30min or 2w")
    return float(found[1]) * _SPANS[found[2]]
