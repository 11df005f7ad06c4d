"""What a fuzz target is."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from typing import ClassVar


class Target(ABC):
    """One way in for a stranger's bytes, with the state it keeps over a batch of inputs."""

    reasons: ClassVar[frozenset[str]]
    """Every reason it is documented to give."""
    memory: ClassVar[int]
    """Bytes it may have taken at most at any time in a batch, its inputs and ours included."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.input: bytes = b""
        """The last input, for whoever has to find out what went wrong."""

    @abstractmethod
    def once(self) -> str:
        """Make an input and try it; the reason for which it was refused, or ``""``."""
