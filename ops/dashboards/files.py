"""The files that Grafana is provisioned with."""

from __future__ import annotations

from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

import ops
from ops.dashboards.device import device
from ops.dashboards.fleet import fleet
from ops.dashboards.inference import inference
from ops.dashboards.training import training
from ops.dashboards.wire import wire

FOLDER = Path(ops.__file__).parent / "grafana" / "dashboards"


def dashboards() -> dict[str, Dashboard]:
    """All of them, by the name of their file without its suffix."""
    return {make.__name__: make() for make in (fleet, training, inference, wire, device)}


def text_of(dashboard: Dashboard) -> str:
    """Classic JSON, as Grafana's file provisioner reads it."""
    return JSONEncoder(indent=2, ensure_ascii=False).encode(dashboard) + "\n"


def write(folder: Path = FOLDER) -> list[Path]:
    """Write all dashboards, and take away what is none of them; the files that have changed."""
    wanted = {folder / f"{name}.json": text_of(made) for name, made in dashboards().items()}
    changed = [path for path in folder.glob("*.json") if path not in wanted]
    for path in changed:
        path.unlink()
    for path, text in wanted.items():
        if not path.exists() or path.read_text("utf-8") != text:
            path.write_text(text, "utf-8")
            changed.append(path)
    return changed
