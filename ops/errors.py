"""Everything the command line raises, and the exit code each leads to.

OpsError                 1   something went wrong; the message says what to do
├── SettingsWrong        2   a flag, variable or file is wrong; nothing was started
├── BrokerUnreachable    3   there is no broker, or it refuses this client
├── DataMissing          4   images are missing or unreadable
├── DiskTrouble          5   the disk is full, or state cannot be read or written
├── PortInUse            6   something else listens on a port that is needed
├── FleetFailed          7   a device was refused, or a process of the demo died
├── AgentUnreachable     8   no agent answers pictures there, or it refuses this client
└── CoordinatorSilent    9   no coordinator says there how its fleet is

0 is success, also of a service that was told to stop with SIGTERM; 130 is Ctrl-C (the run can be
resumed). ``docs/cli.md`` lists the codes.
"""

from __future__ import annotations


class OpsError(Exception):
    """Base of every error of this package."""

    exit_code = 1


class SettingsWrong(OpsError):
    """A flag, variable or file is wrong; nothing was started."""

    exit_code = 2


class BrokerUnreachable(OpsError):
    """There is no broker, or it refuses this client."""

    exit_code = 3


class DataMissing(OpsError):
    """Images are missing or unreadable."""

    exit_code = 4


class DiskTrouble(OpsError):
    """The disk is full, or state cannot be read or written."""

    exit_code = 5


class PortInUse(OpsError):
    """Something else listens on a port that is needed."""

    exit_code = 6


class FleetFailed(OpsError):
    """A device was refused, or a process of the demo died."""

    exit_code = 7


class AgentUnreachable(OpsError):
    """No agent answers pictures there, or it refuses this client."""

    exit_code = 8


class CoordinatorSilent(OpsError):
    """No coordinator says there how its fleet is."""

    exit_code = 9
