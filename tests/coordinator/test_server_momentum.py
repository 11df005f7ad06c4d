"""What becomes of the server's momentum between two versions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from broker.config import load_settings
from broker.errors import ConfigError
from coordinator.aggregation import Model
from coordinator.server_momentum import carry_over
from coordinator.settings import CoordinatorSettings
from tests.server_side import START
from tests.tiny import assert_close, assert_same, make_settings

BETA = 0.75


def moved(model: Model, by: float) -> Model:
    """What a round came to in which every number has grown by this much."""
    state = {
        name: values + (1 if values.dtype.kind == "i" else np.float32(by))
        for name, values in model.state.items()
    }
    momentum = {name: np.full_like(values, by) for name, values in model.momentum.items()}
    return Model(state, momentum)


def is_buffer(name: str) -> bool:
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def test_averaged_is_what_was_merged() -> None:
    merged = moved(START, 0.5)
    assert carry_over("averaged", START, merged, outer=BETA) is merged


@pytest.mark.parametrize("rule", ["reset", "outer"])
def test_the_others_begin_every_round_without(rule: Any) -> None:
    after = carry_over(rule, START, moved(START, 0.5), outer=BETA)
    assert after.momentum.keys() == START.momentum.keys()
    assert not any(values.any() for values in after.momentum.values())


def test_reset_keeps_what_was_learnt() -> None:
    merged = moved(START, 0.5)
    after = carry_over("reset", START, merged, outer=BETA)
    assert_same(after.state, merged.state)
    assert not after.velocity


def test_outer_is_fedavgm() -> None:
    """Against a loop over one number: v ← βv + Δ, w ← w + v."""
    model, weight, velocity = START, 0.0, 0.0
    for step in (0.5, -0.125, 0.25):
        merged = moved(model, step)
        after = carry_over("outer", model, merged, outer=BETA)
        velocity = BETA * velocity + step
        weight += velocity
        for name, values in after.state.items():
            if is_buffer(name):
                np.testing.assert_array_equal(values, merged.state[name])
        model = after
    trained = {name for name in START.state if not is_buffer(name)}
    assert model.velocity.keys() == trained
    assert any(name.startswith("heads.") for name in trained), "exit heads have it too"
    assert_close(
        {name: model.state[name] for name in trained},
        {name: START.state[name] + np.float32(weight) for name in trained},
    )


def test_with_nothing_to_carry_outer_is_reset() -> None:
    merged = moved(START, 0.5)
    outer = carry_over("outer", START, merged, outer=0.0)
    assert_close(outer.state, carry_over("reset", START, merged, outer=0.0).state)


def test_dtypes_stay() -> None:
    first = carry_over("outer", START, moved(START, 0.5), outer=BETA)
    after = carry_over("outer", first, moved(first, 0.5), outer=BETA)
    assert {n: v.dtype for n, v in after.state.items()} == {
        n: v.dtype for n, v in START.state.items()
    }
    assert {v.dtype for v in after.velocity.values()} == {np.dtype(np.float32)}


def test_a_tensor_that_nobody_trained_stays() -> None:
    name = "heads.2.0.fc.weight"
    first = carry_over("outer", START, moved(START, 0.5), outer=BETA)
    merged = moved(first, 0.5)
    merged.state[name] = first.state[name]
    after = carry_over("outer", first, merged, outer=BETA)
    np.testing.assert_array_equal(after.state[name], first.state[name])
    np.testing.assert_array_equal(after.velocity[name], first.velocity[name])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"server_momentum": "none"}, ["server_momentum", "'none'", "'reset'"]),
        ({"outer_momentum": 1}, ["outer_momentum = 1", "less than 1"]),
    ],
)
def test_settings_that_cannot_be(flags: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(CoordinatorSettings, section="coordinator", flags=flags)
    for word in words:
        assert word in str(caught.value)


def test_a_run_cannot_go_on_with_another() -> None:
    assert {"server_momentum", "outer_momentum"} <= make_settings().identity().keys()
