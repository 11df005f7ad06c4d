"""Networks that can be cut: a backbone is an ordered list of blocks and any boundary is a cut.

Cut ``c`` leaves blocks ``0 … c-1`` on the device and blocks ``c …`` on the coordinator, so the
legal cuts of a network with ``B`` blocks are ``1 … B-1``. One :class:`CutNetwork` can hold the
whole network with an exit head per cut, a device's half, or the coordinator's half: the parameter
names (``blocks.{i}.*`` and ``heads.{cut}.*``) are the same in all three, so states can be
exchanged freely.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from tensors.errors import NetworkError

HEADS = ("linear", "conv")
NORMS = ("batch", "group")
SMALL_INPUT = 64
"""Up to this many pixels the ResNet stem is a 3×3 convolution without pooling."""

State = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSpec:
    """What both ends must agree on to build the same network.

    ``name`` is ``resnet18`` or a user's factory ``package.module:function``, which is called with
    this specification and returns the list of blocks. ``size`` is the input's height and width in
    pixels, ``channels`` its channels, ``width`` the channels of the first stage. ``norm`` says how
    backbone and exit heads normalise, see :func:`normalisation`; a factory may follow it or not.
    """

    name: str = "resnet18"
    width: int = 64
    channels: int = 3
    size: int = 32
    classes: int = 10
    head: str = "conv"
    norm: str = "batch"

    def __post_init__(self) -> None:
        for key in ("width", "channels", "size", "classes"):
            if getattr(self, key) < 1:
                raise NetworkError(f"network {key} = {getattr(self, key)}: it must be at least 1")
        if self.head not in HEADS:
            raise NetworkError(f"network head = {self.head!r}: choose one of {', '.join(HEADS)}")
        if self.norm not in NORMS:
            raise NetworkError(f"network norm = {self.norm!r}: choose one of {', '.join(NORMS)}")
        if self.name != "resnet18" and ":" not in self.name:
            raise NetworkError(
                f"network name = {self.name!r}: give resnet18 or a factory package.module:function"
            )


def normalisation(kind: str, channels: int) -> nn.Module:
    """What follows a convolution: ``batch`` or ``group``.

    ``group`` knows no other image and no statistics of training, so no mixture of devices disturbs
    it (Wu, He, arXiv 1803.08494; in place of BatchNorm on devices of unlike data, Hsieh et al.,
    arXiv 1910.00189). Its groups have 8 channels at least, and are 32 at most: the greatest common
    divisor of the channels and min(32, channels // 8).
    """
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(math.gcd(channels, max(1, min(32, channels // 8))), channels)


class Stem(nn.Module):
    """First convolution: 3×3 for small inputs, 7×7 with stride and pooling for large ones."""

    def __init__(self, channels: int, width: int, norm: str, *, small: bool) -> None:
        super().__init__()
        kernel, stride, padding = (3, 1, 1) if small else (7, 2, 3)
        self.conv = nn.Conv2d(channels, width, kernel, stride, padding, bias=False)
        self.norm = normalisation(norm, width)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.Identity() if small else nn.MaxPool2d(3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.pool(self.relu(self.norm(self.conv(x)))))


class Residual(nn.Module):
    """The basic residual block (He et al. 2015, arXiv 1512.03385), named as torchvision does."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = normalisation(norm, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = normalisation(norm, outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), normalisation(norm, outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        return cast(Tensor, self.relu(self.bn2(self.conv2(y)) + identity))


class Classifier(nn.Module):
    """Pool over height and width (if there are any), then one linear layer."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.fc(x.mean(dim=(2, 3)) if x.ndim == 4 else x.flatten(1)))


class Separable(nn.Module):
    """Depthwise 3×3 with stride 2, pointwise to twice the channels, norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, norm: str) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(inputs, inputs, 3, 2, 1, groups=inputs, bias=False)
        self.pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.norm = normalisation(norm, outputs)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.relu(self.norm(self.pointwise(self.depthwise(x)))))


def resnet18(spec: NetworkSpec) -> list[nn.Module]:
    """ResNet-18 as 10 blocks: stem, 8 residual blocks, classifier."""
    small = spec.size <= SMALL_INPUT
    blocks: list[nn.Module] = [Stem(spec.channels, spec.width, spec.norm, small=small)]
    inputs = spec.width
    for stage in range(4):
        outputs = spec.width * 2**stage
        for index in range(2):
            stride = 2 if stage and not index else 1
            blocks.append(Residual(inputs, outputs, stride, spec.norm))
            inputs = outputs
    blocks.append(Classifier(inputs, spec.classes))
    return blocks


def exit_head(kind: str, shape: Sequence[int], classes: int, norm: str = "batch") -> nn.Module:
    """An early exit for features of ``shape`` ``(C, H, W)`` or ``(F,)``; logits ``(N, classes)``.

    ``conv`` halves the map with separable convolutions until it is at most 4 pixels wide, doubling
    the channels up to 256, before it pools: shallow features are too local to be pooled at once.
    """
    channels = shape[0]
    layers: list[nn.Module] = []
    if kind == "conv" and len(shape) == 3:
        side = max(shape[1:])
        while side > 4:
            wider = min(2 * channels, max(256, channels))
            layers.append(Separable(channels, wider, norm))
            channels, side = wider, (side + 1) // 2
    features = channels if len(shape) == 3 else int(np.prod(shape))
    return nn.Sequential(*layers, Classifier(features, classes))


class CutNetwork(nn.Module):
    """A run of consecutive blocks and the exit heads that belong to it.

    ``blocks`` maps block index → module (consecutive), ``heads`` maps cut → exit head.
    ``classifier`` is the whole network's last block with its index, where a device keeps that
    besides its run; :meth:`forward` does not go through it.
    """

    def __init__(
        self,
        blocks: Mapping[int, nn.Module],
        heads: Mapping[int, nn.Module],
        *,
        classifier: tuple[int, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.start, self.stop = min(blocks), max(blocks) + 1
        assert sorted(blocks) == list(range(self.start, self.stop))
        self.blocks = nn.ModuleDict({str(i): blocks[i] for i in sorted(blocks)})
        self.classifier = None if classifier is None else str(classifier[0])
        if classifier is not None:
            self.blocks[str(classifier[0])] = classifier[1]
        self.heads = nn.ModuleDict({str(cut): heads[cut] for cut in sorted(heads)})

    @property
    def cuts(self) -> range:
        """Legal cuts, if this is a whole network."""
        return range(self.start + 1, self.stop)

    def forward(self, x: Tensor, start: int | None = None, stop: int | None = None) -> Tensor:
        """Blocks ``start … stop-1`` (default: all here) on ``x``: features or logits."""
        first = self.start if start is None else start
        last = self.stop if stop is None else stop
        for index in range(first, last):
            x = self.blocks[str(index)](x)
        return x

    def exit(self, features: Tensor, cut: int) -> Tensor:
        """Logits ``(N, K)`` of the exit head at ``cut`` for the features there.

        Always in float32: the backward pass of a depthwise convolution in bfloat16 has no fast
        kernel on CPUs and takes about eight times as long.
        """
        with torch.autocast(features.device.type, enabled=False):
            return cast(Tensor, self.heads[str(cut)](features.float()))

    def classify(self, features: Tensor) -> Tensor:
        """Logits ``(N, K)`` of the classifier kept here, for the features before it; in float32."""
        assert self.classifier is not None
        with torch.autocast(features.device.type, enabled=False):
            return cast(Tensor, self.blocks[self.classifier](features.float()))

    def require_cut(self, cut: int, *, classifier: bool = False) -> None:
        """Raise :class:`NetworkError` unless ``cut`` is legal in this whole network.

        ``classifier``: the device keeps the last block, and the server must have one before it.
        """
        last = self.cuts.stop - 1 - classifier
        if not self.cuts.start <= cut <= last:
            raise NetworkError(
                f"cut layer {cut}: this network has cuts {self.cuts.start} to {last}"
            )

    def device_half(self, cut: int, *, classifier: bool = False) -> CutNetwork:
        """Blocks before ``cut`` and the exit head there; modules are shared, not copied.

        With ``classifier`` also the last block.
        """
        self.require_cut(cut, classifier=classifier)
        last = self.stop - 1
        return CutNetwork(
            self._range(0, cut),
            {cut: self.heads[str(cut)]},
            classifier=(last, self.blocks[str(last)]) if classifier else None,
        )

    def server_half(self, cut: int, *, classifier: bool = True) -> CutNetwork:
        """Blocks from ``cut`` on; modules are shared, not copied.

        Without ``classifier`` all but the last.
        """
        self.require_cut(cut, classifier=not classifier)
        return CutNetwork(self._range(cut, self.stop - (not classifier)), {})

    def _range(self, start: int, stop: int) -> dict[int, nn.Module]:
        return {i: self.blocks[str(i)] for i in range(start, stop)}


class Exits(nn.Module):
    """A device half as one call: images → (features at the cut, exit logits)."""

    def __init__(self, half: CutNetwork) -> None:
        super().__init__()
        (self.cut,) = (int(cut) for cut in half.heads)
        self.network = half

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.network(images)
        return features, self.network.exit(features, self.cut)


def _factory(name: str) -> Callable[[NetworkSpec], list[nn.Module]]:
    if name == "resnet18":
        return resnet18
    module, _, function = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as exc:
        raise NetworkError(
            f"network name = {name!r}: cannot import it ({exc}); is the package installed here?"
        ) from exc
    if not callable(factory):
        raise NetworkError(f"network name = {name!r}: it is not a function that returns blocks")
    return cast(Callable[[NetworkSpec], list[nn.Module]], factory)


def feature_shapes(blocks: Sequence[nn.Module], spec: NetworkSpec) -> list[tuple[int, ...]]:
    """Shape, without the batch, of what leaves each block for one image of ``spec``."""
    shapes = []
    x = torch.zeros(1, spec.channels, spec.size, spec.size)
    modes = [(block, block.training) for block in blocks]
    try:
        with torch.no_grad():
            for index, block in enumerate(blocks):
                x = block.eval()(x)
                if not isinstance(x, Tensor):
                    raise NetworkError(f"block {index} of {spec.name} does not return one tensor")
                shapes.append(tuple(x.shape[1:]))
    except RuntimeError as exc:
        raise NetworkError(
            f"block {len(shapes)} of {spec.name} fails on a {spec.channels}×{spec.size}×{spec.size}"
            f" image: {exc}"
        ) from exc
    finally:
        for block, training in modes:
            block.train(training)
    if shapes[-1] != (spec.classes,):
        raise NetworkError(
            f"{spec.name} ends in shape {shapes[-1]}, not in the {spec.classes} classes of the data"
        )
    return shapes


def build_network(spec: NetworkSpec, *, seed: int = 0) -> CutNetwork:
    """The whole network of ``spec`` with an exit head at every cut, initialised from ``seed``.

    Convolutions start from He's normal distribution (fan out), as torchvision's ResNet does. The
    caller's random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks = _factory(spec.name)(spec)
        if len(blocks) < 2:
            raise NetworkError(f"{spec.name} returned {len(blocks)} blocks: a cut needs two")
        shapes = feature_shapes(blocks, spec)
        heads = {
            cut: exit_head(spec.head, shapes[cut - 1], spec.classes, spec.norm)
            for cut in range(1, len(blocks))
        }
        network = CutNetwork(dict(enumerate(blocks)), heads)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


def read_state(module: nn.Module) -> State:
    """Parameters and buffers as numpy copies."""
    return {
        name: tensor.detach().cpu().numpy().copy() for name, tensor in module.state_dict().items()
    }


def write_state(module: nn.Module, state: Mapping[str, np.ndarray]) -> None:
    """Copy ``state`` into ``module`` in place.

    The names must be exactly the module's, the shapes equal; raises :class:`NetworkError` if not.
    """
    own = module.state_dict()
    if own.keys() != state.keys():
        odd = sorted(own.keys() ^ state.keys())
        raise NetworkError(f"parameters do not fit this network: {', '.join(odd[:4])} …")
    for name, tensor in own.items():
        if tuple(tensor.shape) != state[name].shape:
            raise NetworkError(
                f"parameter {name} has shape {state[name].shape}, "
                f"this network's has {tuple(tensor.shape)}"
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(torch.from_numpy(np.array(state[name])))


def from_torchvision(state: Mapping[str, Tensor]) -> State:
    """torchvision's ResNet-18 state under this project's names (``blocks.*``), as numpy arrays."""
    renamed = {}
    for name, tensor in state.items():
        first, _, rest = name.partition(".")
        match first:
            case "conv1":
                new = f"blocks.0.conv.{rest}"
            case "bn1":
                new = f"blocks.0.norm.{rest}"
            case "fc":
                new = f"blocks.9.fc.{rest}"
            case _ if first.startswith("layer"):
                index, _, tail = rest.partition(".")
                new = f"blocks.{1 + 2 * (int(first[5:]) - 1) + int(index)}.{tail}"
            case _:
                raise NetworkError(f"{name} is not a parameter of torchvision's ResNet-18")
        renamed[new] = tensor.detach().cpu().numpy().copy()
    return renamed
