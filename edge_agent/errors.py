"""Everything the edge agent raises.

AgentError
├── TrainingError      a batch could not be learnt from (not finite, wrong shape)
├── AssignmentError    the coordinator asks for something this device cannot or may not do
└── StateError         the device's own state folder is unreadable or cannot be written
"""

from __future__ import annotations


class AgentError(Exception):
    """Base of every error of this package."""


class TrainingError(AgentError):
    """A batch could not be learnt from; it is left out and counted."""


class AssignmentError(AgentError):
    """The coordinator's assignment does not fit this device; says why."""


class StateError(AgentError):
    """The state folder cannot be read or written; says which file and what to do."""
