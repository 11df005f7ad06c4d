"""What ``/status`` says of a fleet; ``coordinator.snapshot`` makes it.

Fields that a reader does not know are of a later version.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from broker.fields import RunPhase
from coordinator.health import Health


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True)


class DeviceStatus(_Model):
    """One device. ``heard_s`` ago it sent a message; None if not since the coordinator started.

    ``samples`` are those that were merged, ``open_samples`` those trained on since; ``share`` is
    what it is given of its work. Loss and accuracy of the exit are None until they are known.
    ``predictions``: images answered since the coordinator began, by ``exit``, ``server`` or
    ``fallback``. ``bytes_up`` and ``bytes_down`` are of this run, what goes to several devices left
    out. ``breaches``: how often it broke a rule; it is in quarantine for ``quarantine_s`` yet.
    ``frozen``: it computes its half of the network and does not train it (``agent --lite``).
    """

    name: str
    device_class: str
    state: str
    cut: int | None
    heard_s: float | None
    software: str | None
    rounds: int
    samples: int
    open_samples: int
    credits: int
    share: float
    exit_loss: float | None
    exit_accuracy: float | None
    predictions: dict[str, int]
    bytes_up: int
    bytes_down: int
    breaches: int = 0
    quarantine_s: float = 0.0
    frozen: bool = False


class RoundStatus(_Model):
    """The round that runs. ``loss``: cut → mean of the whole network's over its batches so far.

    ``batches`` of ``quota`` have arrived, as devices that take part now have it; ``deadline_s`` is
    what is left, None while the coordinator has no connection.
    """

    number: int
    attempt: int
    version: int
    seconds: float
    deadline_s: float | None
    extended: bool
    participants: int
    finished: int
    batches: int
    quota: int
    loss: dict[str, float]


class ClosedRound(_Model):
    """The last round that closed; accuracies on held-out images, if there are any."""

    number: int
    version: int
    seconds: float
    samples: int
    server_accuracy: float | None
    exit_accuracy: dict[str, float]


class ServingStatus(_Model):
    """What answers images; ``pinned``: chosen by hand. ``waiting_images`` wait for an answer."""

    version: int
    pinned: bool
    waiting_images: int


class FleetStatus(_Model):
    """All of it. ``time`` is UTC, ``uptime_s`` this process's; bytes by ``direction/role``.

    ``quarantined`` of the ``known`` devices are in quarantine; ``left_out`` have no place in
    ``devices``.
    """

    time: str
    uptime_s: float
    boot: str
    fleet: str
    run: str
    phase: RunPhase
    version: int
    rounds: int
    health: Health
    round: RoundStatus | None
    closed: ClosedRound | None
    serving: ServingStatus
    bytes: dict[str, int]
    predictions: dict[str, int]
    online: int
    known: int
    states: dict[str, int]
    quarantined: int = 0
    devices: list[DeviceStatus]
    left_out: int
