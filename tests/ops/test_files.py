from __future__ import annotations

import tomllib
from typing import Any

from ops.files import to_toml


def test_settings_come_back_from_toml() -> None:
    settings: dict[str, Any] = {
        "broker": {"url": 'mqtt://ä "quoted"', "keepalive_s": 5},
        "coordinator": {"stay": True, "network": {"width": 4}, "labels": [1, 2], "rate": 0.05},
    }
    assert tomllib.loads(to_toml(settings)) == settings
