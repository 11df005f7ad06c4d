"""Everything the edge agent raises.

AgentError
├── TrainingError      a batch could not be learnt from (not finite, wrong shape)
├── AssignmentError    the coordinator asks for something this device cannot or may not do
├── StateError         the device's own state folder is unreadable or cannot be written
├── IdentityError      the device's identity is missing, damaged, or not what it should be
├── BundleError        an update is not signed by this fleet, damaged, or cannot be installed
├── ListenError        the HTTP API cannot listen where it should
├── InputError         what is to be answered is no picture, or not one the network takes
└── Unanswered         a request to answer pictures that got no answer, by its own fault or not
    ├── NotReady       there are no trained parameters to answer with yet
    ├── Overloaded     more is asked than the device can do; the oldest requests give way
    └── Stopped        the agent is not running, or stopped before it answered
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


class IdentityError(AgentError):
    """There is no usable identity; says which file or answer is wrong and what to do."""


class BundleError(AgentError):
    """An update cannot be used; says why."""


class InputError(AgentError):
    """What is to be answered is no picture, or none the network takes; says what is."""


class Unanswered(AgentError):
    """A request got no answer; it may be made again."""


class NotReady(Unanswered):
    """The device holds no trained parameters yet; says what it waits for."""


class Overloaded(Unanswered):
    """The device is asked for more than it can do: this request gave way to newer ones."""


class Stopped(Unanswered):
    """The agent is not running, or it stopped before it could answer."""


class ListenError(AgentError):
    """The HTTP API cannot listen where it should; says where and why."""
