"""A fleet's training as somebody would write it who has one process and PyTorch, and nothing else.

The measure of ``splitfleet bench experiment``: nothing here comes from this project, so that what
its classes cost is seen. Every device has a whole copy of the network and an exit at its cut; a
round trains them one batch after another, each on the sum of its exit's and the network's cross
entropy, and ends with the average of all copies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = Callable[[int, int], tuple[Tensor, Tensor]]
"""Device and step → images (float32, N×C×H×W) and labels (int64, N)."""


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x), inplace=True)


class _Pooled(nn.Module):
    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x.mean((2, 3)))
        return y


def _resnet18(channels: int, width: int, classes: int) -> list[nn.Module]:
    stem = [nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)]
    blocks: list[nn.Module] = [nn.Sequential(*stem, nn.ReLU(inplace=True))]
    inputs = width
    for stage in range(4):
        outputs = width << stage
        for index in range(2):
            blocks.append(_Block(inputs, outputs, 2 if stage and not index else 1))
            inputs = outputs
    return [*blocks, _Pooled(inputs, classes)]


def _exit(channels: int, side: int, classes: int) -> nn.Module:
    layers: list[nn.Module] = []
    while side > 4:
        wider = min(2 * channels, max(256, channels))
        layers += [
            nn.Conv2d(channels, channels, 3, 2, 1, groups=channels, bias=False),
            nn.Conv2d(channels, wider, 1, bias=False),
            nn.BatchNorm2d(wider),
            nn.ReLU(inplace=True),
        ]
        channels, side = wider, (side + 1) // 2
    return nn.Sequential(*layers, _Pooled(channels, classes))


class _Copy(nn.Module):
    """One device's copy of the network, with an exit before block ``cut``."""

    def __init__(self, cut: int, *, channels: int, side: int, width: int, classes: int) -> None:
        super().__init__()
        self.cut = cut
        self.blocks = nn.ModuleList(_resnet18(channels, width, classes))
        stage = max(0, cut - 2) // 2 if cut > 1 else 0
        self.exit = _exit(width << stage, -(-side // (1 << stage)), classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.blocks[: self.cut]:
            x = block(x)
        with torch.autocast(x.device.type, enabled=False):  # as this project's exits do
            at_exit: Tensor = self.exit(x.float())
        for block in self.blocks[self.cut :]:
            x = block(x)
        return at_exit, x


class PlainTraining:
    """Devices with these ``cuts`` that train a ResNet-18 of this ``width`` on small images."""

    def __init__(
        self,
        cuts: Sequence[int],
        *,
        channels: int,
        side: int,
        width: int,
        classes: int,
        device: str = "cpu",
        bf16: bool = False,
        channels_last: bool = False,
        rate: float = 0.05,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
    ) -> None:
        torch.manual_seed(0)
        self._device = torch.device(device)
        self._bf16 = bf16
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self._copies = [
            _Copy(cut, channels=channels, side=side, width=width, classes=classes).to(self._device)
            for cut in cuts
        ]
        for copy in self._copies[1:]:
            copy.blocks.load_state_dict(self._copies[0].blocks.state_dict())
        self._optimizers = [
            torch.optim.SGD(
                copy.parameters(), lr=rate, momentum=momentum, weight_decay=weight_decay, fused=True
            )
            for copy in self._copies
        ]

    def round(self, batches: int, batch: Batch) -> tuple[float, float]:
        """Train every device on ``batches`` batches; mean loss of the exits and of the network."""
        totals = torch.zeros(2, device=self._device)
        for step in range(batches):
            for device, (copy, optimizer) in enumerate(
                zip(self._copies, self._optimizers, strict=True)
            ):
                images, labels = batch(device, step)
                x = images.to(self._device, memory_format=self._format)
                targets = labels.to(self._device)
                with self._arithmetic():
                    at_exit, at_end = copy(x)
                losses = torch.stack(
                    [F.cross_entropy(y.float(), targets) for y in (at_exit, at_end)]
                )
                optimizer.zero_grad()
                losses.sum().backward()
                optimizer.step()
                totals += losses.detach()
        self._average()
        exits, ends = (totals / (batches * len(self._copies))).tolist()
        return exits, ends

    def _arithmetic(self) -> AbstractContextManager[object]:
        if not self._bf16:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype=torch.bfloat16)

    @torch.no_grad()
    def _average(self) -> None:
        states = [copy.blocks.state_dict() for copy in self._copies]
        mean = {
            name: torch.stack([state[name].float() for state in states]).mean(0)
            for name in states[0]
        }
        for state in states:
            for name, value in mean.items():
                state[name].copy_(value)
