"""What a cut costs, counted from the network alone: operations, features, memory.

Operations are FLOPs, two for each multiply–accumulate, of convolutions and matrix products, as
``torch.utils.flop_counter`` counts them; positions in the padding count as others. BatchNorm,
activations, pooling, the losses and the optimizer are left out: they are additions and
multiplications in proportion to the features, not to their product with the weights. In a backward
pass the gradient of the weights and that of the input cost as much as the forward pass each.

Everything is for one image, in bytes of float32. Nothing here is measured.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from tensors.errors import ExitRuleError, NetworkError
from tensors.networks import CutNetwork, NetworkSpec, build_network

FLOAT = 4
"""Bytes of a float32."""


@dataclass(frozen=True, slots=True)
class PartCost:
    """Of one block or exit head, for one image.

    ``backward_flops`` includes the gradient of the input, which takes ``input_gradient_flops``.
    ``kept_bytes`` is what forward leaves for backward: the output counts, the input, which is
    another part's, does not. ``parameters`` and ``buffers`` are bytes of the part itself.
    """

    forward_flops: int
    backward_flops: int
    input_gradient_flops: int
    kept_bytes: int
    output_values: int
    parameters: int
    buffers: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that training needs at its peak, at least: workspace of the arithmetic comes on top.

    ``snapshots`` are the parameters that each batch in flight was computed with, ``round_start``
    what a device must be able to return to.
    """

    parameters: int
    buffers: int
    gradients: int
    momentum: int
    snapshots: int
    round_start: int
    activations: int

    @property
    def total(self) -> int:
        """The sum."""
        return (
            self.parameters
            + self.buffers
            + self.gradients
            + self.momentum
            + self.snapshots
            + self.round_start
            + self.activations
        )


@dataclass(frozen=True, slots=True)
class Expected:
    """Mean of one image at an exit rate: FLOPs of device and server, bytes that go up."""

    device_flops: float
    server_flops: float
    uplink_bytes: float


@dataclass(frozen=True, slots=True)
class CutCost:
    """Of one image at one cut. The device's share includes its exit head.

    ``server_training_flops`` includes the gradient at the cut, which costs ``feedback_flops``;
    with ``feedback = "none"`` it is not computed.
    """

    cut: int
    device_training_flops: int
    device_inference_flops: int
    server_training_flops: int
    server_inference_flops: int
    feedback_flops: int
    feature_values: int

    def expected(self, exit_rate: float, *, bits: float = 32.0) -> Expected:
        """An answer's cost if a share ``exit_rate`` of the images exits on the device.

        The rest goes on with features of ``bits`` a value: device + (1 − exit_rate) · server.
        Raises :class:`ExitRuleError` for a rate outside [0, 1] or bits not above 0.
        """
        if not 0 <= exit_rate <= 1:
            raise ExitRuleError(f"exit_rate = {exit_rate}: it must be between 0 and 1")
        if not bits > 0:
            raise ExitRuleError(f"bits = {bits}: it must be above 0")
        offloaded = 1 - exit_rate
        return Expected(
            self.device_inference_flops,
            offloaded * self.server_inference_flops,
            offloaded * self.feature_values * bits / 8,
        )


@dataclass(frozen=True, slots=True)
class NetworkCost:
    """The parts of a network: its blocks in order, and its exit heads by cut."""

    blocks: tuple[PartCost, ...]
    heads: Mapping[int, PartCost]
    image_values: int

    @property
    def training_flops(self) -> int:
        """Of the whole network without exits, for one image; images need no gradient."""
        return _forward(self.blocks) + _backward(self.blocks)

    @property
    def inference_flops(self) -> int:
        """Of the whole network without exits, for one image."""
        return _forward(self.blocks)

    def at(self, cut: int) -> CutCost:
        """Of a cut. Raises :class:`NetworkError` for one that does not exist."""
        device, server = self._device(cut), self.blocks[cut:]
        feedback = server[0].input_gradient_flops
        return CutCost(
            cut=cut,
            device_training_flops=_forward(device) + _backward(device),
            device_inference_flops=_forward(device),
            server_training_flops=_forward(server) + _backward(server) + feedback,
            server_inference_flops=_forward(server),
            feedback_flops=feedback,
            feature_values=self.blocks[cut - 1].output_values,
        )

    def device_memory(self, cut: int, *, batch_size: int, window: int = 1) -> Memory:
        """Of training on a device with up to ``window`` batches out.

        Raises :class:`NetworkError` for a cut that does not exist or numbers below 1.
        """
        return _memory(
            self._device(cut),
            self.image_values,
            batch_size=batch_size,
            window=window,
            restartable=True,
        )

    def server_memory(
        self, cuts: Sequence[int], *, batch_size: int, replicas: bool, together: int = 1
    ) -> Memory:
        """Of the server's copies alone, with one device for each of ``cuts``, all active at once.

        ``replicas`` says whether each has its own (strategy *averaging*), or all share one that
        holds every block a device may leave to it. ``together`` batches are in a step at once.
        Raises :class:`NetworkError` for a cut that does not exist, no cut, or numbers below 1.
        """
        if not cuts:
            raise NetworkError("cuts = []: name the cut of one device at least")
        for cut in cuts:
            self._require(cut)
        held = [self.blocks[cut:] for cut in cuts] if replicas else [self.blocks[1:]]
        copies = [_memory(parts, 0, batch_size=batch_size, window=1) for parts in held]
        entered = sorted(cuts)[:together]
        activations = sum(
            FLOAT * self.blocks[cut - 1].output_values
            + sum(p.kept_bytes for p in self.blocks[cut:])
            for cut in entered
        )
        return Memory(
            parameters=sum(copy.parameters for copy in copies),
            buffers=sum(copy.buffers for copy in copies),
            gradients=sum(copy.gradients for copy in copies),
            momentum=sum(copy.momentum for copy in copies),
            snapshots=0,
            round_start=0,
            activations=batch_size * activations,
        )

    def whole_memory(self, *, batch_size: int) -> Memory:
        """Of training the whole network in one place, without exits."""
        return _memory(self.blocks, self.image_values, batch_size=batch_size, window=0)

    def _device(self, cut: int) -> tuple[PartCost, ...]:
        self._require(cut)
        return (*self.blocks[:cut], self.heads[cut])

    def _require(self, cut: int) -> None:
        if cut not in self.heads:
            raise NetworkError(
                f"cut layer {cut}: this network has cuts {min(self.heads)} to {max(self.heads)}"
            )


def network_cost(spec: NetworkSpec) -> NetworkCost:
    """Count the network of ``spec``. Raises :class:`NetworkError` where it cannot be built."""
    return count(build_network(spec), spec)


def count(network: CutNetwork, spec: NetworkSpec) -> NetworkCost:
    """Count a whole ``network`` on images of ``spec``; it is left as it was.

    A part is run forward and backward on two batches of random numbers, so that what grows with
    the batch is told from what does not.
    """
    network = copy.deepcopy(network).cpu().float().train()
    parts, heads = [], {}
    inputs = [torch.randn(size, spec.channels, spec.size, spec.size) for size in (2, 4)]
    for index in range(network.start, network.stop):
        part, outputs = _count(network.blocks[str(index)], inputs)
        parts.append(part)
        if index + 1 < network.stop:
            heads[index + 1], _ = _count(network.heads[str(index + 1)], outputs)
        inputs = outputs
    return NetworkCost(tuple(parts), heads, spec.channels * spec.size**2)


def _count(part: nn.Module, inputs: Sequence[Tensor]) -> tuple[PartCost, list[Tensor]]:
    small, large = inputs
    grown = len(large) - len(small)
    kept = [_kept_bytes(part, x) for x in inputs]
    forward, weights, output = _flops(part, small, input_gradient=False)
    _, backward, _ = _flops(part, small, input_gradient=True)
    cost = PartCost(
        forward_flops=forward // len(small),
        backward_flops=backward // len(small),
        input_gradient_flops=(backward - weights) // len(small),
        kept_bytes=(kept[1] - kept[0]) // grown,
        output_values=output[0].numel(),
        parameters=_bytes(part.parameters()),
        buffers=_bytes(part.buffers()),
    )
    with torch.no_grad():
        return cost, [output, part(large)]


def _flops(part: nn.Module, x: Tensor, *, input_gradient: bool) -> tuple[int, int, Tensor]:
    """FLOPs of a batch, forward and backward, and the output, detached."""
    entering = _entering(x, gradient=input_gradient)
    with FlopCounterMode(display=False, custom_mapping=_CORRECTED) as forward:
        y: Tensor = part(entering)
    with FlopCounterMode(display=False, custom_mapping=_CORRECTED) as backward:
        if y.requires_grad:
            y.sum().backward()
    part.zero_grad()
    return forward.get_total_flops(), backward.get_total_flops(), y.detach()


def _kept_bytes(part: nn.Module, x: Tensor) -> int:
    """Bytes alive for the backward pass: what autograd saved, and the output, without the input."""
    entering = _entering(x, gradient=True)
    own = {_storage(tensor) for tensor in (entering, *part.parameters(), *part.buffers())}
    alive: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        alive[_storage(tensor)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y: Tensor = part(entering)
    note(y)
    return sum(t.untyped_storage().nbytes() for key, t in alive.items() if key not in own)


def _entering(x: Tensor, *, gradient: bool) -> Tensor:
    """A copy of a part's input that it may write into, which it may not if that were a leaf."""
    return x.detach().requires_grad_(gradient).clone()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _convolution_backward(
    grad_shape: Any,
    x_shape: Any,
    w_shape: Any,
    _bias: Any,
    _stride: Any,
    _padding: Any,
    _dilation: Any,
    transposed: Any,
    _output_padding: Any,
    _groups: Any,
    output_mask: Any,
    **_: Any,
) -> int:
    """The forward's operations for each gradient that is wanted, of input and weights.

    torch's own formula takes the gradient of a grouped convolution's weights for that of an
    ungrouped one: ``groups`` times too much for the depthwise ones of the exit heads.
    """
    forward: int = conv_flop_count(x_shape, w_shape, grad_shape, transposed=transposed)
    return forward * (bool(output_mask[0]) + bool(output_mask[1]))


_CORRECTED = {torch.ops.aten.convolution_backward: _convolution_backward}


def _forward(parts: Sequence[PartCost]) -> int:
    return sum(part.forward_flops for part in parts)


def _backward(parts: Sequence[PartCost]) -> int:
    """Of a run of parts whose input needs no gradient."""
    return sum(part.backward_flops for part in parts) - parts[0].input_gradient_flops


def _memory(
    parts: Sequence[PartCost],
    image_values: int,
    *,
    batch_size: int,
    window: int,
    restartable: bool = False,
) -> Memory:
    """Of parts trained together; ``window`` 0 where no batch keeps parameters of its own."""
    if batch_size < 1 or (restartable and window < 1):
        raise NetworkError(f"batch_size = {batch_size}, window = {window}: 1 at least")
    parameters = sum(part.parameters for part in parts)
    buffers = sum(part.buffers for part in parts)
    kept = FLOAT * image_values + sum(part.kept_bytes for part in parts)
    return Memory(
        parameters=parameters,
        buffers=buffers,
        gradients=parameters,
        momentum=parameters,
        snapshots=window * parameters,
        round_start=(2 * parameters + buffers) if restartable else 0,
        activations=max(1, window) * batch_size * kept,
    )
