"""What a device is doing."""

from __future__ import annotations

from enum import StrEnum


class Phase(StrEnum):
    """What the device is doing; published in its status."""

    JOINING = "joining"
    WAITING = "waiting"
    FETCHING = "fetching"
    ENTERING = "entering"
    TRAINING = "training"
    FINISHING = "finishing"
    ANSWERING = "answering"
    REPORTING = "reporting"
    FINISHED = "finished"
