"""How a network's halves are computed and optimised: what device and coordinator share."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from tensors.errors import NetworkError
from tensors.networks import CutNetwork, State

Precision = Literal["auto", "fp32", "bf16"]
MemoryFormat = Literal["auto", "contiguous", "channels_last"]


@dataclass(frozen=True, slots=True)
class Compute:
    """Where and how the arithmetic is done. ``bf16`` is autocast: parameters stay float32."""

    device: str = "cpu"
    bf16: bool = False
    channels_last: bool = False

    def place(self, module: nn.Module) -> None:
        """Move a module to the device, in place.

        Weights stay contiguous in every memory format: the convolutions are as fast, and the
        optimizer, whose gradients come contiguous, is three times as fast.
        """
        module.to(device=self.device)

    def tensor(self, array: np.ndarray | Tensor) -> Tensor:
        """An input on the device, in the precision and memory format of the arithmetic."""
        x = torch.from_numpy(array) if isinstance(array, np.ndarray) else array
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        if self.channels_last and x.ndim == 4:
            return x.to(self.device, dtype, memory_format=torch.channels_last)
        return x.to(self.device, dtype)

    @contextlib.contextmanager
    def arithmetic(self) -> Iterator[None]:
        """The context of a forward pass."""
        with torch.autocast(
            torch.device(self.device).type, dtype=torch.bfloat16, enabled=self.bf16
        ):
            yield

    @property
    def label(self) -> str:
        """For logs and reports, e.g. ``cpu bf16 channels_last``."""
        return " ".join(
            [
                self.device,
                "bf16" if self.bf16 else "fp32",
                "channels_last" if self.channels_last else "contiguous",
            ]
        )


def choose_compute(
    network: Callable[[], CutNetwork],
    shape: tuple[int, ...],
    *,
    device: str = "auto",
    precision: Precision = "auto",
    memory_format: MemoryFormat = "auto",
) -> Compute:
    """The fastest arithmetic among those allowed, by timing a few training steps of each.

    ``network()`` makes a throw-away network of which blocks are timed, ``shape`` is that of a
    batch of its input. What is not ``auto`` is taken as it is; with nothing to choose nothing is
    timed. Raises :class:`NetworkError` for a device that torch does not have here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise NetworkError(f"device = {device!r}: torch finds no CUDA here; use cpu or auto")
    if memory_format == "auto" and _is_narrow(network()):
        memory_format = "contiguous"
    candidates = [
        Compute(device, bf16, channels_last)
        for bf16 in {"auto": (False, True), "fp32": (False,), "bf16": (True,)}[precision]
        for channels_last in {
            "auto": (False, True),
            "contiguous": (False,),
            "channels_last": (True,),
        }[memory_format]
    ]
    if len(candidates) == 1:
        return candidates[0]
    with torch.random.fork_rng(devices=[]):
        return min(candidates, key=lambda compute: _step_seconds(compute, network(), shape))


def _is_narrow(network: nn.Module) -> bool:
    """Whether a convolution has fewer than 16 channels.

    torch 2.13's float32 channels_last backward corrupts the heap on such ones (seen with 4 and 8
    channels at 64×64), and there is nothing to gain there.
    """
    return any(
        isinstance(module, nn.Conv2d) and module.out_channels < 16 for module in network.modules()
    )


def _step_seconds(compute: Compute, network: CutNetwork, shape: tuple[int, ...]) -> float:
    compute.place(network)
    x = compute.tensor(torch.randn(shape))
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        with compute.arithmetic():
            y = network(x)
        y.float().square().mean().backward()
        if compute.device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def make_optimizer(module: nn.Module, *, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """SGD over the module's parameters; the learning rate is set for every round."""
    return torch.optim.SGD(
        module.parameters(), lr=0.0, momentum=momentum, weight_decay=weight_decay, fused=True
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use ``rate`` from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def laid_out_like(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient with the parameter's strides: the fused optimizer takes them to be the same."""
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def read_momentum(module: nn.Module, optimizer: torch.optim.SGD) -> State:
    """Momentum buffers by parameter name, as numpy copies; those not there yet are left out."""
    return {
        name: buffer.detach().cpu().numpy().copy()
        for name, parameter in module.named_parameters()
        if (buffer := optimizer.state.get(parameter, {}).get("momentum_buffer")) is not None
    }


def write_momentum(
    module: nn.Module, optimizer: torch.optim.SGD, momentum: Mapping[str, np.ndarray]
) -> None:
    """Set the momentum buffers; parameters without an entry start without momentum."""
    optimizer.state.clear()
    for name, parameter in module.named_parameters():
        if name in momentum:
            buffer = torch.empty_like(parameter).copy_(torch.from_numpy(momentum[name]))
            optimizer.state[parameter]["momentum_buffer"] = buffer
