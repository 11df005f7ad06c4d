"""What devices report of themselves: the one table that both ends go by.

A device counts by it, the message ``up/telemetry`` carries the counts by name, the coordinator adds
what is new and shows the fleet at ``/metrics``; docs/metrics.md is written from it. A metric keeps
its meaning, label and bounds for good: what changes gets a new name, and names that the other end
does not know are ignored there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

PREFIX = "splitfleet_"
UNLABELLED = ""
"""The label value of a metric without a label."""

Kind = Literal["counter", "gauge", "histogram"]

SECONDS_BOUNDS = (
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
)

RefusalReason = Literal[
    "version",
    "untrained",
    "bad_tensor",
    "wrong_shape",
    "not_finite",
    "overloaded",
    "expired",
    "unknown_device",
]
REFUSALS: tuple[RefusalReason, ...] = get_args(RefusalReason)
"""Why a coordinator refuses features; docs/protocol.md §11."""

_REFUSED = tuple(f"refused:{reason}" for reason in (*REFUSALS, "other", "nonsense"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One thing that is counted, measured or distributed over buckets.

    ``name`` is that on the wire, with its base unit at the end. ``values`` are all that ``label``
    can have. ``bounds`` are a histogram's upper bounds, the bucket above the last one not included.
    ``fold`` is how gauges of several devices become one. ``most_per_s`` is more than any device can
    do in a second: what grows faster is not believed.
    """

    name: str
    kind: Kind
    help: str
    label: str = ""
    values: tuple[str, ...] = (UNLABELLED,)
    bounds: tuple[float, ...] = ()
    by_device: bool = False
    """Shown for each device, as far as devices are shown one by one."""
    fold: Literal["sum", "mean"] = "sum"
    most_per_s: float = 1e6

    @property
    def exposed(self) -> str:
        """The name for Prometheus, without the suffixes of its samples."""
        return PREFIX + self.name


def _metrics() -> Iterable[Metric]:
    yield from _answering()
    yield from _training()


def _answering() -> Iterable[Metric]:
    yield Metric(
        name="prediction_requests",
        kind="counter",
        help="Requests for answers that devices took",
    )
    yield Metric(
        name="predictions",
        kind="counter",
        help="Images answered: by a sure exit, by the server, or by the exit as fallback",
        label="answered_by",
        values=("exit", "server", "fallback"),
        by_device=True,
    )
    yield Metric(
        name="predictions_failed",
        kind="counter",
        help="Images not answered: given up for newer ones or out of time, withdrawn by who asked, "
        "or the network could not compute with them",
        label="reason",
        values=("overloaded", "cancelled", "failed"),
    )
    yield Metric(
        name="offloads_requested",
        kind="counter",
        help="Images of unsure exits that the server was asked about",
    )
    yield Metric(
        name="offloads",
        kind="counter",
        help="What came of the images that the server was asked about, at the device",
        label="outcome",
        values=("answered", "cancelled", "timeout", "offline", "superseded", *_REFUSED),
    )
    yield Metric(
        name="offloads_held",
        kind="counter",
        help="Images of unsure exits that the server was not asked about, and why",
        label="reason",
        values=("offline", "budget", "latency", "busy", "timeout", "refused:not_finite"),
    )
    yield Metric(
        name="audits_requested",
        kind="counter",
        help="Images of sure exits that the server was asked about all the same",
    )
    yield Metric(
        name="audits",
        kind="counter",
        help="What came of them: the server said the same as the exit, something else, or nothing",
        label="outcome",
        values=("agreed", "disagreed", "lost"),
    )
    yield Metric(
        name="labelled_images",
        kind="counter",
        help="Images with a label that an exit has seen",
    )
    yield Metric(
        name="labelled_correct",
        kind="counter",
        help="Of those, images that the exit alone, and whoever answered, got right",
        label="by",
        values=("exit", "answer"),
    )
    yield Metric(
        name="offload_messages",
        kind="counter",
        help="Questions sent to the server, replies in time, and replies too late or twice",
        label="what",
        values=("sent", "reply", "late"),
    )
    yield Metric(
        name="offload_bytes",
        kind="counter",
        help="Encoded features sent and encoded probabilities received",
        label="direction",
        values=("up", "down"),
        most_per_s=1e10,
    )
    yield Metric(
        name="answering_cpu_seconds",
        kind="counter",
        help="Processor time of the threads that answer images",
        by_device=True,
        most_per_s=1024,
    )
    yield Metric(
        name="prediction_seconds",
        kind="histogram",
        help="By stage: a request's wait for its turn and its whole time, a batch's way through "
        "the exit, a question's encoding and its round trip",
        label="stage",
        values=("queue", "exit", "encode", "round_trip", "total"),
        bounds=SECONDS_BOUNDS,
    )
    yield Metric(
        name="exit_threshold",
        kind="gauge",
        help="The confidence above which the exit answers, as it is in force on the device",
        by_device=True,
        fold="mean",
    )
    yield Metric(
        name="drifting_devices",
        kind="gauge",
        help="Devices that trust their exit less than served, for its audits agreed too seldom",
        by_device=True,
    )


def _training() -> Iterable[Metric]:
    yield Metric(
        name="round_trip_seconds",
        kind="histogram",
        help="From a device sending activations to having their gradient",
        bounds=SECONDS_BOUNDS,
    )


METRICS = {metric.name: metric for metric in _metrics()}
"""Name on the wire → metric."""
