"""A weight of the feedback that changes over the rounds."""

from __future__ import annotations

from typing import Any

import pytest

from broker.config import load_settings
from broker.errors import ConfigError
from broker.training_messages import Round
from coordinator import orders
from coordinator.rounds import feedback_share
from coordinator.settings import CoordinatorSettings
from tests.tiny import make_settings


def announced(number: int, **settings: Any) -> Round:
    made = make_settings(rounds=4, **settings)
    message = orders.announcement(made, ("run", number, 0), "training", 0, 1.0).message
    assert isinstance(message, Round)
    return message


def test_it_rises_and_falls_by_the_same_step() -> None:
    shares = {
        schedule: [feedback_share(schedule, number, 4) for number in range(1, 5)]
        for schedule in ("constant", "rising", "falling")
    }
    assert shares == {
        "constant": [1, 1, 1, 1],
        "rising": [0.25, 0.5, 0.75, 1],
        "falling": [1, 0.75, 0.5, 0.25],
    }


@pytest.mark.parametrize("schedule", ["rising", "falling"])
def test_one_round_has_it_all_and_none_has_nothing(schedule: str) -> None:
    assert feedback_share(schedule, 1, 1) == 1
    assert 0 < feedback_share(schedule, 0, 5) <= 1
    assert 0 < feedback_share(schedule, 9, 5) <= 1


def test_devices_are_told_with_the_round() -> None:
    told = [
        announced(number, feedback_schedule="rising", feedback_weight=2).feedback_weight
        for number in (1, 2, 4)
    ]
    assert told == [0.5, 1.0, 2.0]
    assert announced(2).feedback_weight is None, "that of the assignment"


def test_it_needs_feedback() -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(
            CoordinatorSettings,
            section="coordinator",
            flags={"feedback_schedule": "falling", "feedback": "none"},
        )
    for word in ("feedback_schedule = falling", "feedback = gradient"):
        assert word in str(caught.value)
    assert "feedback_schedule" in make_settings().identity()
