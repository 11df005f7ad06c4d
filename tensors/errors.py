"""What can go wrong in `tensors`.

TensorsError
├── CodecError      a codec that does not exist, or values it cannot carry
├── FormatError     bytes that are not a tensor or a parameter pack; `.reason` is for counters
├── NetworkError    a network that cannot be built or cut
├── DataError       a data set or a split that cannot be had
├── AveragingError  a contribution that does not fit what is averaged
├── ProgramError    a network that cannot be written as a program for another runtime, or be run
└── ExitRuleError   an exit rule that does not exist, or input that it cannot be used on
"""

from __future__ import annotations


class TensorsError(Exception):
    """Base of every error this package raises."""


class CodecError(TensorsError):
    """An unknown codec name, or values the codec cannot carry."""


class FormatError(TensorsError):
    """Bytes from elsewhere that do not follow the format, or exceed the limits."""

    reason: str
    """Short snake_case word for counters, such as `truncated` or `too_large`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class NetworkError(TensorsError):
    """A network that cannot be built, cut or loaded as asked."""


class DataError(TensorsError):
    """A data set that is missing or malformed, or a split that cannot be made."""


class AveragingError(TensorsError):
    """A contribution whose names, shapes, values or weight do not fit."""


class ProgramError(TensorsError):
    """A network that cannot be written as a program for another runtime, or be run as one."""


class ExitRuleError(TensorsError):
    """An unknown exit rule, or probabilities, labels or wishes no threshold can be found for."""
