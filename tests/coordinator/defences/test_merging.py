"""Uploads are judged when enough is known, whoever comes first; see ``coordinator.merging``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tensors.networks import State
from tensors.parameters import pack_parameters
from tests.fake_coordinator import Harness
from tests.server_side import STATE, trained_half
from tests.tiny import assert_close, assert_same

HONEST = ("a", "b", "c", "d")
WEIGHT = "blocks.0.conv.weight"


def far_off() -> bytes:
    """As far the other way as it takes to outweigh four others ten times."""
    half = {
        name: values if name.endswith(("tracked", "running_var")) else values - np.float32(10)
        for name, values in trained_half(2).items()
    }
    return pack_parameters(half)


def merged(*order: str, **settings: Any) -> State:
    """What a round comes to in which devices upload in this order."""
    server = Harness(min_devices=len(order), rounds=2, **settings)
    for name in sorted(order):
        server.join(name, 2)
    for name in sorted(order):
        server.send(name, 0, 1, 2)
    for name in order:
        server.upload(name, **({"state": far_off()} if name == "liar" else {}))
    assert server.round.round == 2
    return server.checkpoint().model.state


@pytest.mark.parametrize("order", [("liar", *HONEST), (*HONEST, "liar")])
def test_a_liar_is_clipped_also_if_it_is_the_first(order: tuple[str, ...]) -> None:
    honest = trained_half(2)[WEIGHT]
    assert np.abs(merged(*order)[WEIGHT] - honest).max() > 1.5
    clipped = merged(*order, upload_clip=2.0)[WEIGHT]
    step = 0.25
    np.testing.assert_allclose(
        clipped - STATE[WEIGHT], (4 * step - 2 * step) / 5, rtol=1e-3, err_msg="as one vote of two"
    )


def test_the_order_is_all_one() -> None:
    first = merged("liar", *HONEST, upload_clip=2.0)
    assert_close(merged(*HONEST, "liar", upload_clip=2.0), first)


def test_those_who_are_alone_are_taken_as_they_are() -> None:
    assert_same(merged("a", "b", upload_clip=2.0), merged("a", "b"))


@pytest.mark.parametrize("rule", ["trimmed-mean", "median"])
def test_a_rule_that_bears_liars_merges_without_it(rule: str) -> None:
    found = merged("liar", *HONEST, aggregation_rule=rule)
    np.testing.assert_allclose(found[WEIGHT], trained_half(2)[WEIGHT], rtol=1e-5)
