from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tensors.errors import NetworkError
from tensors.networks import (
    CutNetwork,
    Exits,
    NetworkSpec,
    build_network,
    exit_head,
    feature_shapes,
    from_torchvision,
    normalisation,
    read_state,
    write_state,
)
from tensors.torchvision_compat import torchvision_module
from tests.tiny import SPEC, assert_close, assert_same, differs


def torchvisions_resnet18(*, small: bool, channels: int = 3) -> nn.Module:
    """torchvision's own ResNet-18; ``small`` has the stem everybody uses for 32 pixels."""
    torch.manual_seed(3)
    network: Any = torchvision_module().models.resnet18(num_classes=10)
    if small:
        network.conv1 = nn.Conv2d(channels, 64, 3, 1, 1, bias=False)
        network.maxpool = nn.Identity()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # or their part would hardly be compared
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    assert isinstance(network, nn.Module)
    return network


def backbone(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: values for name, values in state.items() if name.startswith("blocks.")}


def make_images(count: int, size: int, channels: int = 3) -> torch.Tensor:
    return torch.from_numpy(
        np.random.default_rng(1).standard_normal((count, channels, size, size)).astype(np.float32)
    )


@pytest.mark.parametrize("size", [32, 96], ids=["small stem", "large stem"])
def test_resnet18_is_torchvisions(size: int) -> None:
    reference = torchvisions_resnet18(small=size <= 64)
    network = build_network(NetworkSpec(size=size, head="linear"))
    renamed = from_torchvision(reference.state_dict())
    own = read_state(network)

    assert backbone(own).keys() == renamed.keys()
    assert sum(p.numel() for p in reference.parameters()) == sum(
        p.numel() for n, p in network.named_parameters() if n.startswith("blocks.")
    )

    write_state(network, own | renamed)
    images = make_images(3, size)
    for mode in (True, False):  # training first: it moves the BatchNorm statistics of both
        reference.train(mode)
        network.train(mode)
        with torch.no_grad():
            torch.testing.assert_close(network(images), reference(images), rtol=1e-5, atol=1e-5)
    assert_close(backbone(read_state(network)), from_torchvision(reference.state_dict()))


def test_large_inputs_have_the_large_stem() -> None:
    for size, kernel in ((64, 3), (65, 7)):
        network = build_network(NetworkSpec(width=4, size=size))
        assert read_state(network)["blocks.0.conv.weight"].shape == (4, 3, kernel, kernel)


@pytest.mark.parametrize("width", [1, 4, 16, 24])
def test_any_width_scales_all_stages(width: int) -> None:
    network = build_network(NetworkSpec(width=width, size=16, channels=1, classes=7))
    state = read_state(network)
    assert state["blocks.0.conv.weight"].shape[0] == width
    assert state["blocks.9.fc.weight"].shape == (7, 8 * width)
    with torch.no_grad():
        assert network(make_images(2, 16, channels=1)).shape == (2, 7)


@pytest.mark.parametrize("head", ["linear", "conv"])
def test_both_halves_together_are_the_whole_at_every_cut(head: str) -> None:
    network = build_network(NetworkSpec(width=4, size=16, channels=1, head=head)).eval()
    images = make_images(3, 16, channels=1)
    with torch.no_grad():
        whole = network(images)
        assert list(network.cuts) == list(range(1, 10))
        for cut in network.cuts:
            device, server = network.device_half(cut), network.server_half(cut)
            features, logits = Exits(device)(images)
            assert logits.shape == (3, 10)
            torch.testing.assert_close(server(features), whole, rtol=0, atol=0)
            torch.testing.assert_close(network(features, start=cut), whole, rtol=0, atol=0)


def test_halves_keep_the_names_of_the_whole_and_divide_its_blocks() -> None:
    network = build_network(SPEC)
    whole = read_state(network)
    device, server = read_state(network.device_half(4)), read_state(network.server_half(4))
    assert not device.keys() & server.keys()
    assert backbone(device).keys() | server.keys() == backbone(whole).keys()
    assert {name for name in device if name.startswith("heads.")} == {
        name for name in whole if name.startswith("heads.4.")
    }


@pytest.mark.parametrize("cut", [0, 10, -1])
def test_a_cut_the_network_does_not_have(cut: int) -> None:
    network = build_network(SPEC)
    for half in (network.device_half, network.server_half):
        with pytest.raises(NetworkError, match=r"cut layer .* 1 to 9"):
            half(cut)


def test_feature_shapes_are_those_of_the_features() -> None:
    network = build_network(SPEC)
    blocks = [network.blocks[str(i)] for i in range(network.stop)]
    shapes = feature_shapes(blocks, SPEC)
    images = make_images(2, SPEC.size, channels=1)
    with torch.no_grad():
        for cut in network.cuts:
            assert network(images, stop=cut).shape == (2, *shapes[cut - 1])
    assert shapes[-1] == (SPEC.classes,)


def test_feature_shapes_leave_the_blocks_as_they_were() -> None:
    network = build_network(SPEC).train()
    network.blocks["3"].eval()
    before = read_state(network)
    feature_shapes([network.blocks[str(i)] for i in range(network.stop)], SPEC)
    assert_same(read_state(network), before)
    assert network.blocks["0"].training
    assert not network.blocks["3"].training


def test_conv_heads_look_at_a_shallow_map_before_pooling_it() -> None:
    images = torch.zeros(1, 4, 16, 16)
    images[..., 0, 0] = 1.0
    moved = images.roll((9, 6), (2, 3))
    torch.manual_seed(0)
    linear, conv = (exit_head(kind, (4, 16, 16), 3).eval() for kind in ("linear", "conv"))
    with torch.no_grad():
        torch.testing.assert_close(linear(images), linear(moved))
        assert not torch.allclose(conv(images), conv(moved))


def test_heads_for_features_without_a_map() -> None:
    for kind in ("linear", "conv"):
        assert exit_head(kind, (6,), 3)(torch.zeros(2, 6)).shape == (2, 3)


# -- a user's network ---------------------------------------------------------------------------


def factory(name: str) -> NetworkSpec:
    return NetworkSpec(
        name=f"tests.tiny:{name}", width=6, channels=1, size=8, classes=4, head="linear"
    )


def test_a_users_network_can_be_cut_anywhere() -> None:
    network = build_network(factory("linear_blocks"))
    images = make_images(2, 8, channels=1)
    assert list(network.cuts) == [1, 2]
    with torch.no_grad():
        for cut in network.cuts:
            features, logits = Exits(network.device_half(cut))(images)
            assert logits.shape == (2, 4)
            torch.testing.assert_close(network(features, start=cut), network(images))


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("one_block", "a cut needs two"),
        ("wrong_classes", r"shape \(5,\).* 4 classes"),
        ("blocks_that_fail", "block 2 of .* fails on a 1×8×8 image"),
        ("blocks_that_return_pairs", "block 0 .* does not return one tensor"),
        ("does_not_exist", "cannot import it"),
        ("NOT_A_FACTORY", "not a function"),
    ],
)
def test_a_users_network_that_cannot_be_used(name: str, complaint: str) -> None:
    with pytest.raises(NetworkError, match=complaint):
        build_network(factory(name))


def test_a_module_that_cannot_be_imported() -> None:
    with pytest.raises(NetworkError, match="is the package installed here"):
        build_network(NetworkSpec(name="no_such_package.models:make"))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"width": 0}, "width = 0"),
        ({"channels": -1}, "channels = -1"),
        ({"size": 0}, "size = 0"),
        ({"classes": 0}, "classes = 0"),
        ({"head": "deep"}, "'deep': choose one of linear, conv"),
        ({"name": "resnet50"}, "'resnet50': give resnet18 or a factory"),
    ],
)
def test_specifications_that_make_no_sense(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(NetworkError, match=complaint):
        NetworkSpec(**changes)


# -- initial weights ----------------------------------------------------------------------------


def test_a_seed_decides_the_weights() -> None:
    assert_same(read_state(build_network(SPEC, seed=5)), read_state(build_network(SPEC, seed=5)))
    other = differs(read_state(build_network(SPEC, seed=5)), read_state(build_network(SPEC)))
    assert {"blocks.0.conv.weight", "blocks.9.fc.weight", "heads.1.0.fc.weight"} <= other


def test_building_leaves_the_callers_random_numbers_alone() -> None:
    torch.manual_seed(11)
    expected = torch.rand(4)
    torch.manual_seed(11)
    build_network(SPEC, seed=3)
    assert torch.equal(torch.rand(4), expected)


# -- states -------------------------------------------------------------------------------------


def test_a_state_is_a_copy() -> None:
    network = build_network(SPEC)
    state = read_state(network)
    kept = {name: values.copy() for name, values in state.items()}
    for values in state.values():
        values[...] = 7
    assert_same(read_state(network), kept)


def test_a_state_goes_from_one_network_to_another() -> None:
    source, target = build_network(SPEC, seed=1), build_network(SPEC, seed=2)
    write_state(target, read_state(source))
    assert_same(read_state(target), read_state(source))


def without(state: dict[str, np.ndarray]) -> None:
    del state["blocks.0.conv.weight"]


def with_one_more(state: dict[str, np.ndarray]) -> None:
    state["blocks.99.conv.weight"] = np.zeros(1, np.float32)


def of_another_shape(state: dict[str, np.ndarray]) -> None:
    state["blocks.9.fc.bias"] = np.zeros(5, np.float32)


@pytest.mark.parametrize("damage", [without, with_one_more, of_another_shape])
def test_a_state_that_does_not_fit_changes_nothing(
    damage: Callable[[dict[str, np.ndarray]], None],
) -> None:
    network = build_network(SPEC, seed=1)
    before = read_state(network)
    state = read_state(build_network(SPEC, seed=2))
    damage(state)
    with pytest.raises(NetworkError, match=r"blocks\.(0|99|9)\."):
        write_state(network, state)
    assert_same(read_state(network), before)


def test_a_name_torchvisions_resnet18_does_not_have() -> None:
    with pytest.raises(NetworkError, match=r"head\.weight is not a parameter"):
        from_torchvision({"head.weight": torch.zeros(1)})


def test_blocks_must_be_consecutive() -> None:
    with pytest.raises(AssertionError):
        CutNetwork({0: nn.Identity(), 2: nn.Identity()}, {})


# -- GroupNorm in place of BatchNorm --------------------------------------------------------------


@pytest.mark.parametrize("head", ["linear", "conv"])
def test_with_norm_group_there_is_no_batchnorm_and_no_statistic(head: str) -> None:
    network = build_network(NetworkSpec(width=8, size=16, head=head, norm="group"))
    usual = build_network(NetworkSpec(width=8, size=16, head=head))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert not list(network.named_buffers())
    parameters = {name for name, _ in usual.named_parameters()}
    assert {name for name, _ in network.named_parameters()} == parameters


def test_a_group_has_eight_channels_at_least_and_there_are_32_at_most() -> None:
    groups = {}
    for channels in (4, 8, 12, 16, 20, 64, 100, 256, 512, 1024):
        module = normalisation("group", channels)
        assert isinstance(module, nn.GroupNorm)
        groups[channels] = module.num_groups
    assert groups == {4: 1, 8: 1, 12: 1, 16: 2, 20: 2, 64: 8, 100: 4, 256: 32, 512: 32, 1024: 32}


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_only_with_batchnorm_an_image_depends_on_those_beside_it(norm: str) -> None:
    network = build_network(NetworkSpec(width=8, size=16, norm=norm)).train()
    images = make_images(6, 16)
    with torch.no_grad():
        alone, together = network(images[:3]), network(images)[:3]
    assert torch.allclose(alone, together, rtol=1e-4, atol=1e-5) is (norm == "group")


def test_training_and_answering_are_the_same_with_groups() -> None:
    network = build_network(NetworkSpec(width=8, size=16, norm="group"))
    images = make_images(4, 16)
    with torch.no_grad():
        torch.testing.assert_close(network.train()(images), network.eval()(images))


def test_an_unknown_norm_is_an_error() -> None:
    with pytest.raises(NetworkError, match="norm = 'layer': choose one of batch, group"):
        NetworkSpec(norm="layer")
