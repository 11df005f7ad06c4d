"""What messages are made of: their base, and the types and bounds of their fields."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    PlainValidator,
    StringConstraints,
)

from broker.maps import Buffer, LazyBytes

MAX_BATCH = 4096
MAX_BLOCKS = 1024
MAX_RANGES = 65_536
MAX_REASONS = 64
MAX_METRICS = 128
MAX_LABELS = 64
MAX_PARAMETERS = 16_384
MAX_PROGRAM_BYTES = 1 << 24

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Text = Annotated[str, StringConstraints(max_length=256)]
Count = Annotated[int, Field(ge=0, le=2**53)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Real = Annotated[float, Field(allow_inf_nan=False)]
Duration = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Label = Annotated[int, Field(ge=0, le=2**31)]
Share = Annotated[float, Field(ge=0, le=1)]
Cut = Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]{0,3}$")]
"""A cut as the key of a map, decimal."""
RunPhase = Literal["gathering", "training", "inference", "finished"]
ExitRule = Literal["entropy", "max_softmax", "margin"]
Range = Annotated[tuple[Count, Count], Field(strict=False)]
"""First and last of a run of batch numbers, both included."""
Ranges = Annotated[list[Range], FailFast(), Field(max_length=MAX_RANGES)]


def at_most(items: int) -> BeforeValidator:
    """Bounds a map before its entries are looked at: each could cost an error."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > items:
            raise ValueError(f"Dictionary should have at most {items} items")
        return value

    return BeforeValidator(check)


BY_REASON = at_most(MAX_REASONS)
BY_CUT = at_most(MAX_BLOCKS)
BY_METRIC = at_most(MAX_METRICS)
BY_LABEL = at_most(MAX_LABELS)
BY_PARAMETER = at_most(MAX_PARAMETERS)


def blob(limit: int, *, lazy: bool = False) -> PlainValidator:
    def check(value: Any) -> Any:
        if not (isinstance(value, Buffer) or (lazy and isinstance(value, LazyBytes))):
            raise ValueError("Input should be bytes")
        if len(value) > limit:
            raise ValueError(f"Data should have at most {limit} bytes")
        return value

    return PlainValidator(check)


Blob = Annotated[Buffer, blob(1 << 30)]
"""Bytes that are not looked into here; of a message that arrived, a view of what arrived."""
Tensor = Annotated[Buffer | LazyBytes, blob(1 << 30, lazy=True)]
"""A blob that need not be made as long as nobody sends it anywhere."""


class Message(BaseModel):
    """Base of all messages."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")
