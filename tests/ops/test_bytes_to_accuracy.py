from __future__ import annotations

from typing import Any

import pytest

from ops.bytes_to_accuracy import Reached, bytes_to_accuracy
from ops.errors import SettingsWrong


def history(*scores: float | None, exits: list[float] | None = None) -> list[dict[str, Any]]:
    """Rounds of 10 samples each of two devices, 100 + 5 bytes up and 40 down."""
    return [
        {
            "round": number,
            "seconds": 2.0,
            "devices": {"a": {"samples": 10}, "b": {"samples": 10}},
            "bytes": {"up/activation": 100, "up/control": 5, "down/gradient": 40},
            **({} if score is None else {"server_accuracy": score}),
            **({} if exits is None else {"exit_accuracy": {"2": exits[number - 1]}}),
        }
        for number, score in enumerate(scores, 1)
    ]


def test_everything_up_to_the_first_good_round_counts() -> None:
    found = bytes_to_accuracy(history(0.2, 0.5, 0.7, 0.8), 0.7)
    assert found == Reached(3, 0.7, samples=60, bytes_up=315, bytes_down=120, seconds=6.0)


def test_a_lucky_round_does_not_count() -> None:
    scores = history(0.2, 0.7, 0.6, 0.7, 0.8)
    found = bytes_to_accuracy(scores, 0.7)
    assert found is not None
    assert found.round == 4
    once = bytes_to_accuracy(scores, 0.7, held=1)
    assert once is not None
    assert once.round == 2


def test_what_was_not_held_or_never_reached_is_none() -> None:
    assert bytes_to_accuracy(history(0.2, 0.3), 0.7) is None
    assert bytes_to_accuracy(history(0.2, 0.9), 0.7) is None, "the run ended too early to tell"
    assert bytes_to_accuracy(history(0.2, 0.9, 0.9), 0.7, held=3) is None
    assert bytes_to_accuracy([], 0.7) is None


def test_rounds_without_a_score_cost_bytes_and_say_nothing() -> None:
    found = bytes_to_accuracy(history(0.2, None, 0.7, None, 0.8), 0.7)
    assert found is not None
    assert (found.round, found.bytes_up) == (3, 315)
    assert bytes_to_accuracy(history(None, None), 0.0, held=1) is None
    assert bytes_to_accuracy(history(float("nan"), 0.1), 0.0, held=2) is None


def test_an_exit_is_asked_for_by_its_cut() -> None:
    rounds = history(0.9, 0.9, 0.9, exits=[0.1, 0.6, 0.7])
    for cut in (2, "2"):
        found = bytes_to_accuracy(rounds, 0.6, of=cut)
        assert found is not None
        assert (found.round, found.accuracy) == (2, 0.6)
    assert bytes_to_accuracy(rounds, 0.6, of=3) is None


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(SettingsWrong, match=r"accuracy = 70"):
        bytes_to_accuracy(history(0.7), 70)
    with pytest.raises(SettingsWrong, match=r"held = 0"):
        bytes_to_accuracy(history(0.7), 0.7, held=0)
