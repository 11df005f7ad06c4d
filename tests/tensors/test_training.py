from __future__ import annotations

import pytest
import torch
from torch import nn

from tensors.errors import NetworkError
from tensors.networks import CutNetwork, NetworkSpec, build_network
from tensors.training import (
    Compute,
    choose_compute,
    make_optimizer,
    read_momentum,
    set_learning_rate,
    write_momentum,
)
from tests.tiny import SPEC, assert_same

SHAPE = (4, SPEC.channels, SPEC.size, SPEC.size)


def never() -> CutNetwork:
    raise AssertionError("nothing is to be timed")


def step(module: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    optimizer.zero_grad()
    module(torch.randn(4, 3)).square().mean().backward()
    optimizer.step()


def test_with_nothing_to_choose_nothing_is_timed() -> None:
    for precision, memory_format in (("fp32", "contiguous"), ("bf16", "channels_last")):
        chosen = choose_compute(
            never,
            SHAPE,
            device="cpu",
            precision=precision,  # type: ignore[arg-type]
            memory_format=memory_format,  # type: ignore[arg-type]
        )
        assert chosen == Compute("cpu", precision == "bf16", memory_format == "channels_last")


def test_auto_keeps_to_what_is_fixed_and_to_the_callers_random_numbers() -> None:
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    chosen = choose_compute(lambda: build_network(SPEC), SHAPE, device="cpu", precision="bf16")
    assert chosen.device == "cpu"
    assert chosen.bf16
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none() -> None:
    with pytest.raises(NetworkError, match="use cpu or auto"):
        choose_compute(never, SHAPE, device="cuda")


def test_labels_tell_the_ways_of_computing_apart() -> None:
    ways = [Compute("cpu", a, b) for a in (False, True) for b in (False, True)]
    assert len({way.label for way in ways}) == 4
    assert Compute("cpu", bf16=True).label == "cpu bf16 contiguous"


def test_channels_last_is_a_matter_of_strides_only() -> None:
    compute = Compute("cpu", channels_last=True)
    images = torch.randn(SHAPE[0], 3, 8, 8)
    placed = compute.tensor(images)
    assert placed.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(placed, images)
    assert torch.equal(compute.tensor(images.flatten(1)), images.flatten(1))
    network = build_network(SPEC).eval()
    x = torch.randn(SHAPE)
    with torch.no_grad():
        before = network(x)
        compute.place(network)
        torch.testing.assert_close(network(compute.tensor(x)), before)


def test_bf16_computes_in_bf16_and_keeps_parameters_in_float32() -> None:
    compute = Compute("cpu", bf16=True)
    layer = nn.Linear(4, 4)
    compute.place(layer)
    with compute.arithmetic():
        assert layer(torch.randn(2, 4)).dtype is torch.bfloat16
    assert layer.weight.dtype is torch.float32
    with Compute("cpu").arithmetic():
        assert layer(torch.randn(2, 4)).dtype is torch.float32


def test_an_optimizer_does_not_move_before_it_has_a_learning_rate() -> None:
    module = nn.Linear(3, 2)
    before = module.weight.detach().clone()
    optimizer = make_optimizer(module, momentum=0.9, weight_decay=0.1)
    step(module, optimizer, 0)
    assert torch.equal(module.weight, before)
    set_learning_rate(optimizer, 0.1)
    step(module, optimizer, 0)
    assert not torch.equal(module.weight, before)


def test_momentum_is_what_a_restored_optimizer_needs() -> None:
    """Three steps at once are one step, a transplant of weights and momentum, and two more."""
    torch.manual_seed(0)
    whole, first, second = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2)
    first.load_state_dict(whole.state_dict())
    optimizers = [make_optimizer(m, momentum=0.9, weight_decay=0.01) for m in (whole, first)]
    for optimizer in optimizers:
        set_learning_rate(optimizer, 0.1)
    for seed in range(3):
        step(whole, optimizers[0], seed)
    step(first, optimizers[1], 0)

    second.load_state_dict(first.state_dict())
    restored = make_optimizer(second, momentum=0.9, weight_decay=0.01)
    set_learning_rate(restored, 0.1)
    momentum = read_momentum(first, optimizers[1])
    write_momentum(second, restored, momentum)
    assert_same(read_momentum(second, restored), momentum)
    for seed in (1, 2):
        step(second, restored, seed)
    assert torch.equal(second.weight, whole.weight)
    assert torch.equal(second.bias, whole.bias)


def test_parameters_that_never_stepped_have_no_momentum() -> None:
    module = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2)})
    optimizer = make_optimizer(module, momentum=0.9, weight_decay=0.0)
    step(module["used"], optimizer, 0)
    assert read_momentum(module, optimizer).keys() == {"used.weight", "used.bias"}


def test_writing_momentum_forgets_what_was_there_before() -> None:
    module = nn.Linear(3, 2)
    optimizer = make_optimizer(module, momentum=0.9, weight_decay=0.0)
    step(module, optimizer, 0)
    kept = {"bias": read_momentum(module, optimizer)["bias"]}
    write_momentum(module, optimizer, kept)
    assert_same(read_momentum(module, optimizer), kept)


def test_momentum_that_was_read_is_a_copy() -> None:
    module = nn.Linear(3, 2)
    optimizer = make_optimizer(module, momentum=0.9, weight_decay=0.0)
    step(module, optimizer, 0)
    momentum = read_momentum(module, optimizer)
    kept = {name: values.copy() for name, values in momentum.items()}
    momentum["weight"][...] = 5
    assert_same(read_momentum(module, optimizer), kept)


@pytest.mark.parametrize("width", [4, 8])
def test_narrow_networks_are_never_tried_in_channels_last(width: int) -> None:
    # torch's backward corrupts the heap there: this test would end the process.
    spec = NetworkSpec(width=width, size=64, classes=3)
    compute = choose_compute(lambda: build_network(spec), (8, 3, 64, 64))
    assert not compute.channels_last
