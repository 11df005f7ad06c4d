from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from tensors.cost import NetworkCost, PartCost, count, network_cost
from tensors.errors import ExitRuleError, NetworkError
from tensors.networks import CutNetwork, NetworkSpec, build_network
from tests.tiny import SPEC, assert_same

WIDTH = NetworkSpec(width=4, channels=3, size=8, classes=10, head="linear")


@pytest.fixture(scope="module")
def cost() -> NetworkCost:
    return network_cost(WIDTH)


def of(*blocks: nn.Module, channels: int = 3, size: int = 6, classes: int = 5) -> NetworkCost:
    """Any modules as a network, with a trivial exit behind each."""
    spec = NetworkSpec(channels=channels, size=size, classes=classes)
    heads = {cut: nn.Flatten() for cut in range(1, len(blocks))}
    return count(CutNetwork(dict(enumerate(blocks)), heads), spec)


class Flat(nn.Module):
    """Linear on all pixels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.fc = nn.Linear(inputs, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.fc(x.flatten(1))
        return logits


def test_a_convolution_is_counted_by_hand() -> None:
    """3 → 8 channels, 3×3, stride 2 on 6×6: 3×3 outputs of 27 products each."""
    first = of(nn.Conv2d(3, 8, 3, 2, 1), Flat(72, 5)).blocks[0]
    macs = 8 * 9 * 27
    assert first.forward_flops == 2 * macs
    assert first.backward_flops == 2 * 2 * macs
    assert first.input_gradient_flops == 2 * macs
    assert first.output_values == 72
    assert first.kept_bytes == 4 * 72, "of its own only the output; the input is not its own"
    assert first.parameters == 4 * (8 * 27 + 8)


def test_a_linear_layer_is_counted_by_hand() -> None:
    last = of(nn.Conv2d(3, 8, 3, 2, 1), Flat(72, 5)).blocks[1]
    assert last.forward_flops == 2 * 72 * 5
    assert last.backward_flops == 2 * 2 * 72 * 5
    assert last.input_gradient_flops == 2 * 72 * 5
    assert last.kept_bytes == 4 * 5


@pytest.mark.parametrize("groups", [2, 8])
def test_groups_divide_every_pass_of_a_convolution(groups: int) -> None:
    first = of(nn.Conv2d(8, 8, 3, 1, 1, groups=groups), Flat(288, 5), channels=8).blocks[0]
    macs = 36 * 9 * 8 * 8 // groups
    assert first.forward_flops == 2 * macs
    assert first.backward_flops == 4 * macs
    assert first.input_gradient_flops == 2 * macs


def test_batchnorm_and_activations_have_no_operations_but_keep_features() -> None:
    parts = of(nn.BatchNorm2d(3), nn.ReLU(), nn.Sigmoid(), Flat(108, 5)).blocks
    assert [part.forward_flops for part in parts[:3]] == [0, 0, 0]
    assert [part.backward_flops for part in parts[:3]] == [0, 0, 0]
    assert [part.kept_bytes for part in parts[:3]] == [4 * 108] * 3
    assert parts[0].parameters == 4 * 6
    assert parts[0].buffers == 4 * 6 + 8


def test_a_part_that_writes_into_its_input_keeps_nothing_more() -> None:
    parts = of(nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(inplace=True), Flat(288, 5)).blocks
    assert parts[1].kept_bytes == 0, "its output is its input's memory"
    assert parts[1].output_values == 288


def test_a_residual_block_is_counted_by_hand(cost: NetworkCost) -> None:
    """Block 3 halves 8×8 and doubles 4 channels; beside it a 1×1 convolution does the same."""
    outputs = 8 * 4 * 4
    macs = outputs * (4 * 9 + 8 * 9 + 4)
    assert cost.blocks[3].forward_flops == 2 * macs
    assert cost.blocks[3].backward_flops == 4 * macs
    assert cost.blocks[3].input_gradient_flops == 2 * outputs * (4 * 9 + 4)


def test_the_network_is_left_as_it_was() -> None:
    network = build_network(SPEC)
    before = copy.deepcopy(network.state_dict())
    count(network.eval(), SPEC)
    assert_same(
        {name: value.numpy() for name, value in network.state_dict().items()},
        {name: value.numpy() for name, value in before.items()},
    )
    assert not network.training
    assert all(parameter.grad is None for parameter in network.parameters())


def test_device_and_server_together_make_the_whole_network(cost: NetworkCost) -> None:
    for cut, head in cost.heads.items():
        at = cost.at(cut)
        device = at.device_inference_flops - head.forward_flops
        assert device + at.server_inference_flops == cost.inference_flops
        exit_flops = head.forward_flops + head.backward_flops
        both = at.device_training_flops - exit_flops + at.server_training_flops
        assert both == cost.training_flops, "the whole network needs the gradient at the cut too"
        assert 0 < at.feedback_flops < at.server_training_flops


def test_the_deeper_the_cut_the_more_the_device_has_to_do(cost: NetworkCost) -> None:
    for shallow, deep in pairwise(sorted(cost.heads)):
        assert cost.at(shallow).device_training_flops < cost.at(deep).device_training_flops
        assert cost.at(shallow).server_training_flops > cost.at(deep).server_training_flops


def test_width_quadruples_a_convolution_and_doubles_its_features() -> None:
    wide = network_cost(NetworkSpec(width=8, channels=3, size=8, head="linear")).blocks[1]
    narrow = network_cost(WIDTH).blocks[1]
    assert wide.forward_flops == 4 * narrow.forward_flops
    assert wide.kept_bytes == 2 * narrow.kept_bytes


def test_exits_spare_the_server_and_the_link(cost: NetworkCost) -> None:
    at = cost.at(2)
    nobody, most, all_of_them = (at.expected(rate) for rate in (0.0, 0.75, 1.0))
    assert nobody.device_flops == most.device_flops == at.device_inference_flops
    assert nobody.server_flops == at.server_inference_flops
    assert nobody.uplink_bytes == 4 * at.feature_values
    assert most.server_flops == pytest.approx(at.server_inference_flops / 4)
    assert most.uplink_bytes == pytest.approx(at.feature_values)
    assert (all_of_them.server_flops, all_of_them.uplink_bytes) == (0, 0)
    assert at.expected(0.0, bits=4).uplink_bytes == at.feature_values / 2


def test_training_needs_memory_by_the_part(cost: NetworkCost) -> None:
    parts: list[PartCost] = [*cost.blocks[:2], cost.heads[2]]
    weights = sum(part.parameters for part in parts)
    kept = 4 * cost.image_values + sum(part.kept_bytes for part in parts)
    memory = cost.device_memory(2, batch_size=8, window=3)
    assert (memory.parameters, memory.gradients, memory.momentum) == (weights,) * 3
    assert memory.snapshots == 3 * weights, "each batch has the weights it was computed with"
    assert memory.activations == 3 * 8 * kept
    assert memory.round_start == 2 * weights + memory.buffers
    assert memory.total == 8 * weights + 2 * memory.buffers + 24 * kept


def test_replicas_grow_with_the_devices_and_a_shared_copy_does_not(cost: NetworkCost) -> None:
    def copies(devices: int, *, replicas: bool) -> int:
        memory = cost.server_memory([2, 5] * (devices // 2), batch_size=8, replicas=replicas)
        return memory.parameters + memory.gradients + memory.momentum + memory.buffers

    assert copies(48, replicas=False) == copies(4, replicas=False)
    assert copies(48, replicas=True) == 12 * copies(4, replicas=True)
    one = cost.server_memory([1], batch_size=8, replicas=True)
    shared = cost.server_memory([1], batch_size=8, replicas=False)
    assert one == shared, "a replica for a single device at cut 1 is the shared copy"


def test_a_joint_step_keeps_the_features_of_all_its_batches(cost: NetworkCost) -> None:
    def kept(together: int) -> int:
        return cost.server_memory(
            [3, 3, 3], batch_size=8, replicas=False, together=together
        ).activations

    assert kept(3) == 3 * kept(1)


@pytest.mark.parametrize("cut", [0, -1, 10])
def test_a_cut_that_does_not_exist_is_named_with_those_that_do(cost: NetworkCost, cut: int) -> None:
    with pytest.raises(NetworkError, match=rf"cut layer {cut}.*1 to 9"):
        cost.at(cut)
    with pytest.raises(NetworkError, match=rf"cut layer {cut}"):
        cost.device_memory(cut, batch_size=8)
    with pytest.raises(NetworkError, match=rf"cut layer {cut}"):
        cost.server_memory([2, cut], batch_size=8, replicas=True)


def test_what_cannot_be_counted_is_refused(cost: NetworkCost) -> None:
    with pytest.raises(ExitRuleError, match=r"exit_rate = 1\.5"):
        cost.at(2).expected(1.5)
    with pytest.raises(ExitRuleError, match="bits = 0"):
        cost.at(2).expected(0.5, bits=0)
    with pytest.raises(NetworkError, match="batch_size = 0"):
        cost.device_memory(2, batch_size=0)
    with pytest.raises(NetworkError, match="window = 0"):
        cost.device_memory(2, batch_size=8, window=0)
    with pytest.raises(NetworkError, match="cuts"):
        cost.server_memory([], batch_size=8, replicas=True)
    with pytest.raises(NetworkError, match="width = 0"):
        network_cost(NetworkSpec(width=0))
