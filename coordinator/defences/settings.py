"""What is done about devices that are broken or mean ill: a part of the coordinator's settings."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from coordinator.defences.robust import AggregationRule

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]

CHANGE_THE_MODEL = (
    "aggregation_rule",
    "trim_share",
    "upload_clip",
    "upload_norm",
    "gradient_clip",
    "loss_mads",
)
"""Those that belong to a run's identity."""


class DefenceSettings(BaseModel):
    """See docs/security.md; durations in seconds unless the name says otherwise."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    aggregation_rule: AggregationRule = "mean"
    """How blocks are merged at a round's end. trimmed-mean and median bear liars among the holders
    of a block, and take disk and time; see docs/security.md."""
    trim_share: float = Field(default=0.25, gt=0, lt=0.5)
    """With aggregation_rule = trimmed-mean: how much of the holders' weight is cut off at the
    lower and at the upper end of every coordinate."""
    contributions_bytes: int = Field(default=16 << 30, ge=1 << 20)
    """How much of the disk a round's contributions may take, where the rule is not the mean."""
    upload_clip: Positive | None = None
    """What a device changed in a block counts as if it were no longer (L2) than so many times the
    median of what devices last changed in that block."""
    upload_norm: Positive | None = None
    """The same with a fixed bound; with both the lower one."""
    gradient_clip: Positive | None = None
    """The server's gradient in a step is no longer (L2) than so many times the median of the last
    steps at that cut."""
    loss_mads: Positive | None = None
    """A batch is not trained on whose loss is above the median of the fleet's last losses by more
    than so many median absolute deviations."""

    device_packets_per_s: NotNegative = 1000.0
    """How many packets a device may send; what is beyond is dropped (rate_limited). 0: any."""
    device_bytes_per_s: NotNegative = 100e6
    """How many bytes, likewise."""
    device_roster_messages_per_s: NotNegative = 5.0
    """How many of these may be what takes the roster's disk: requests for a certificate, and what
    it says of its software. Those who share a join token have this together."""
    device_answer_bytes_per_s: NotNegative = 10e6
    """How many bytes of parameters and programs a device may ask for; beyond that it is not
    answered, and asks again."""
    device_burst_s: Positive = 10.0
    """A device may send, or ask for, at once what these rates allow in so many seconds."""
    breach_limit: int = Field(default=20, ge=1)
    """So many breaches of a device within breach_window_s bring it into quarantine: messages that
    are not well-formed or too large, batches and uploads that cannot be what they should be,
    seconds over its rate."""
    breach_window_s: Positive = 60.0
    quarantine_s: NotNegative = 60.0
    """How long a device is out of rounds and its messages are dropped; twice as long each time.
    0: breaches are only counted."""
    quarantine_max_s: Positive = 3600.0
    """The longest quarantine, and after how long without one the doubling begins anew."""
