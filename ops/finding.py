"""What one check of ``splitfleet doctor`` found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

State = Literal["ok", "warning", "failed"]


@dataclass(frozen=True, slots=True)
class Finding:
    """``detail`` says what was seen, ``advice`` what to do; the latter is empty if all is well."""

    name: str
    state: State
    detail: str
    advice: str = ""

    def __post_init__(self) -> None:
        assert self.state == "ok" or self.advice, "whoever complains says what to do"

    def as_dict(self) -> dict[str, str]:
        """For JSON."""
        return asdict(self)
