"""Grafana's dashboards by code: ``python -m ops.dashboards`` writes ``ops/grafana/dashboards``.

``promql`` has the expressions' grammar, ``panels`` the style, ``page`` what all dashboards share;
one module for each dashboard says what it shows. Needs Grafana's foundation SDK, which only
development brings: people and containers take the files.
"""

from ops.dashboards.files import FOLDER, dashboards, text_of, write

__all__ = ["FOLDER", "dashboards", "text_of", "write"]
