"""The learning rate of a server network that many devices share."""

from __future__ import annotations

from typing import Any

import pytest

from broker.config import load_settings
from broker.errors import ConfigError
from coordinator import orders
from coordinator.settings import CoordinatorSettings
from tests.tiny import make_settings


@pytest.mark.parametrize(("rule", "shares"), [("same", 1), ("sqrt", 2), ("linear", 4)])
def test_it_is_divided_by_a_power_of_the_participants(rule: str, shares: float) -> None:
    settings = make_settings(strategy="sequential", server_rate=rule, learning_rate=0.08)
    assert orders.server_rate(settings, 1, 4) == pytest.approx(0.08 / shares)
    assert orders.server_rate(settings, 1, 1) == 0.08
    assert orders.rate(settings, 1) == 0.08, "devices keep theirs"


def test_it_follows_the_schedule() -> None:
    settings = make_settings(strategy="cascade", server_rate="linear", schedule="cosine", rounds=4)
    for number in range(1, 5):
        expected = orders.rate(settings, number) / 10
        assert orders.server_rate(settings, number, 10) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"server_rate": "sqrt"}, ["server_rate = sqrt", "sequential", "cascade", "averaging"]),
        ({"server_rate": "half"}, ["server_rate", "'half'", "'sqrt'"]),
    ],
)
def test_settings_that_cannot_be(flags: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(CoordinatorSettings, section="coordinator", flags=flags)
    for word in words:
        assert word in str(caught.value)


def test_a_run_cannot_go_on_with_another() -> None:
    assert "server_rate" in make_settings().identity()
