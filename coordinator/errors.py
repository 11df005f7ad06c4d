"""Everything the coordinator raises.

CoordinatorError
├── BatchRefused       one batch cannot be trained on (.reason, for receipt and counter)
├── DeviceRefused      a device cannot take part in this run
├── ProgramUnavailable a network cannot be given to a device as a program
├── StoreError         a checkpoint cannot be written or read
├── ResumeError        the run in the state folder does not fit the configuration
└── IdentityError      a certificate, key or entry of the roster cannot be had, or is not allowed
    └── EnrolmentRefused   a device gets no certificate (.reason, for counter; the rest is for it)
"""

from __future__ import annotations


class CoordinatorError(Exception):
    """Base of every error of this package."""


class BatchRefused(CoordinatorError):
    """A batch is not trained on; ``reason`` is a short snake_case name."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class DeviceRefused(CoordinatorError):
    """A device cannot take part in this run; the message is told to the device."""


class ProgramUnavailable(CoordinatorError):
    """A network cannot be made into a program; says why."""


class StoreError(CoordinatorError):
    """A checkpoint cannot be written or read; says which file and what to do."""


class ResumeError(CoordinatorError):
    """The run in the state folder was made with another configuration."""


class IdentityError(CoordinatorError):
    """A certificate, key or entry of the roster cannot be had, or is not allowed."""


class EnrolmentRefused(IdentityError):
    """A device gets no certificate; ``reason`` is a short snake_case name."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
