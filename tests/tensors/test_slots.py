from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from tensors.networks import Exits, build_network
from tensors.slots import Slots
from tests.tiny import SPEC


class Tied(nn.Module):
    """Two layers with one weight, and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x)) * self.scale
        return y


def test_it_computes_what_functional_call_computes() -> None:
    exits = Exits(build_network(SPEC).device_half(3)).train()
    x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in exits.state_dict().items()}
    named = {name: p.detach() * 1.5 for name, p in exits.named_parameters()}
    changed = {name: b.clone() for name, b in exits.named_buffers()}
    expected = functional_call(exits, {**named, **changed}, (x,))
    slots = Slots(exits)
    buffers = [buffer.clone() for buffer in slots.buffers]
    with slots.filled(list(named.values()), buffers):
        got = exits(x)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(buffers, changed.values(), strict=True):
        assert torch.equal(a, b)
    for name, value in exits.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_shared_parameter_is_one_slot_with_two_places() -> None:
    module = Tied()
    slots = Slots(module)
    assert len(slots.parameters) == 2
    assert len(slots.buffers) == 1
    weight, bias = torch.eye(3), torch.zeros(3)
    with slots.filled([weight, bias], [torch.tensor(5.0)]):
        assert torch.equal(module(torch.ones(1, 3)), torch.full((1, 3), 5.0))
    assert module.second.weight is module.first.weight
    assert module.first.weight is slots.parameters[0]


def test_the_module_is_itself_again_after_an_error() -> None:
    module = Tied()
    slots = Slots(module)
    with (
        pytest.raises(RuntimeError),
        slots.filled([torch.eye(4), torch.zeros(4)], [torch.tensor(1.0)]),
    ):
        module(torch.ones(1, 3))
    assert module.first.weight is slots.parameters[0]
    assert isinstance(module.first.weight, nn.Parameter)
