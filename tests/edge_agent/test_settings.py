from __future__ import annotations

import pytest

from broker.config import load_settings
from broker.errors import ConfigError
from edge_agent.settings import AgentSettings


@pytest.mark.parametrize(
    "key", ["heartbeat_s", "latency_s", "offload_burst_s", "offload_bytes_per_h", "noise_std"]
)
@pytest.mark.parametrize("value", ["inf", "nan"])
def test_numbers_are_finite(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"agent\.{key}.*finite"):
        load_settings(AgentSettings, section="agent", flags={"device": "a", key: value})
