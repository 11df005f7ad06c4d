"""What the messages of a run weigh: one count for the simulator's wire and for the planner."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from coordinator.aggregation import block_of, is_in_half
from coordinator.settings import CoordinatorSettings
from tensors.codecs import parse_codec
from tensors.networks import NetworkSpec, build_network, feature_shapes


@dataclass(frozen=True, slots=True)
class MessageSizes:
    """Bytes by cut layer; entry ``c − 1`` is that of cut ``c``.

    ``shapes`` are of one image's features; ``activations`` and ``gradients`` of a batch;
    ``parameters`` of a device's half as it is sent. ``device_weights`` and ``server_weights`` count
    the numbers in a device's half with its exit head, and in the blocks from the cut on.
    """

    shapes: list[tuple[int, ...]]
    activations: list[int]
    gradients: list[int]
    parameters: list[int]
    device_weights: list[int]
    server_weights: list[int]

    @property
    def blocks(self) -> int:
        """Of the whole network."""
        return len(self.shapes) + 1


def message_sizes(settings: CoordinatorSettings) -> MessageSizes:
    """Of the network and the codecs in the settings.

    Codecs are counted without their lossless stage, parameters whole, and of a budget of bytes for
    each sample that it is used up.

    Raises ``NetworkError`` if the network cannot be built.
    """
    spec = NetworkSpec(**settings.network.model_dump())
    # A factory may do what cannot be done without storage; ours need not take any to be counted.
    with torch.device("meta" if spec.name == "resnet18" else "cpu"):
        network = build_network(spec)
        blocks = [network.blocks[str(index)] for index in range(network.stop)]
        shapes = feature_shapes(blocks, spec)[:-1]
    images, budget = settings.batch_size, settings.bytes_per_sample or math.inf

    def batch_bytes(bits: int) -> list[int]:
        return [int(images * min(budget, math.prod(shape) * bits / 8)) for shape in shapes]

    logits = 2 * images * spec.classes if settings.distill_weight else 0
    numbers = {name: tensor.numel() for name, tensor in network.state_dict().items()}
    weights = [
        sum(n for name, n in numbers.items() if is_in_half(name, cut))
        for cut in range(1, len(shapes) + 1)
    ]
    bits = parse_codec(settings.parameter_codec).bits
    return MessageSizes(
        shapes=shapes,
        activations=batch_bytes(parse_codec(settings.codec).bits),
        gradients=[size + logits for size in batch_bytes(settings.codec_of_gradients.bits)],
        parameters=[size * bits // 8 for size in weights],
        device_weights=weights,
        server_weights=[
            sum(n for name, n in numbers.items() if (block_of(name) or 0) >= cut)
            for cut in range(1, len(shapes) + 1)
        ],
    )
