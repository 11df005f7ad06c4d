"""Computing a module with other tensors in the places of its parameters and buffers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

_Slot = dict[str, Any]
_Place = tuple[_Slot, str, int]


class Slots:
    """The places of a module's parameters and buffers, found once.

    What `torch.func.functional_call` does, without searching the module and building names at every
    call: that took as long as computing a tenth of a narrow network. `parameters` and `buffers` are
    the module's own, each once, in the order of `nn.Module.parameters` and `buffers`; they must
    stay the same objects.
    """

    def __init__(self, module: nn.Module) -> None:
        self.parameters: list[Tensor] = list(module.parameters())
        self.buffers: list[Tensor] = list(module.buffers())
        owners = list(module.modules())
        self._parameters = _places([owner._parameters for owner in owners], self.parameters)  # noqa: SLF001
        self._buffers = _places([owner._buffers for owner in owners], self.buffers)  # noqa: SLF001

    @contextmanager
    def filled(self, parameters: Sequence[Tensor], buffers: Sequence[Tensor]) -> Iterator[None]:
        """With these tensors in place of the module's own, in the same order."""
        _fill(self._parameters, parameters)
        _fill(self._buffers, buffers)
        try:
            yield
        finally:
            _fill(self._parameters, self.parameters)
            _fill(self._buffers, self.buffers)


def _places(slots: Sequence[_Slot], tensors: Sequence[Tensor]) -> list[_Place]:
    number = {id(tensor): index for index, tensor in enumerate(tensors)}
    return [
        (slot, name, number[id(tensor)])
        for slot in slots
        for name, tensor in slot.items()
        if tensor is not None
    ]


def _fill(places: Sequence[_Place], tensors: Sequence[Tensor]) -> None:
    for slot, name, index in places:
        slot[name] = tensors[index]
