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

AGENT_DROPS = (
    "corrupt",
    "foreign_version",
    "invalid",
    "malformed",
    "oversized",
    "reassembly_full",
    "reassembly_timeout",
    "too_busy",
    "unexpected_topic",
    "other",
)
"""Why a device drops a message; ``other`` stands for what is not named."""


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
    fold: Literal["sum", "mean", "min", "max"] = "sum"
    most_per_s: float = 1e6

    @property
    def exposed(self) -> str:
        """The name for Prometheus, without the suffixes of its samples."""
        return PREFIX + self.name


def _metrics() -> Iterable[Metric]:
    yield from _answering()
    yield from _training()
    yield from _privacy()
    yield from _being()


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
        values=(
            "offline",
            "budget",
            "latency",
            "busy",
            "timeout",
            "privacy",
            "refused:not_finite",
        ),
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
        name="batches_made",
        kind="counter",
        help="Training batches that devices computed and encoded",
        by_device=True,
    )
    yield Metric(
        name="batches_lost",
        kind="counter",
        help="Batches that came to nothing at the device: no answer in time, activations that were "
        "not finite, given up while there was no connection, or of images whose privacy budget is "
        "used up",
        label="reason",
        values=("timeout", "not_finite", "superseded", "expired_offline", "privacy"),
    )
    yield Metric(
        name="gradients_late",
        kind="counter",
        help="Gradients that came after their time-out and changed nothing",
    )
    yield Metric(
        name="activation_values",
        kind="counter",
        help="Values of activations that devices encoded for training",
        most_per_s=1e11,
    )
    yield Metric(
        name="activation_bytes",
        kind="counter",
        help="What those values took, encoded",
        most_per_s=1e10,
    )
    yield Metric(
        name="exit_training_images",
        kind="counter",
        help="Images that exits learnt from",
    )
    yield Metric(
        name="exit_training_correct",
        kind="counter",
        help="Of those, images that the exit got right before it learnt from them",
    )
    yield Metric(
        name="exit_training_loss",
        kind="counter",
        help="Cross entropy of the exit, summed over those images",
    )
    yield Metric(
        name="training_seconds",
        kind="histogram",
        help="Parts of a batch's work on the device: layers and exit forward, encoding of the "
        "activations, decoding of the gradient, backward with the step",
        label="part",
        values=("forward", "encode", "decode", "backward"),
        bounds=SECONDS_BOUNDS,
    )
    yield Metric(
        name="round_trip_seconds",
        kind="histogram",
        help="From a device sending activations to having their gradient",
        bounds=SECONDS_BOUNDS,
    )
    yield Metric(
        name="gradient_staleness_batches",
        kind="histogram",
        help="How many other batches a device learnt from between making a batch and learning "
        "from its gradient",
        bounds=(0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0),
    )
    yield Metric(
        name="batches_in_flight",
        kind="gauge",
        help="Batches that are sent and not answered yet",
    )
    yield Metric(
        name="batches_kept",
        kind="gauge",
        help="Batches that wait at devices for a connection",
    )
    yield Metric(
        name="credits",
        kind="gauge",
        help="Batches that devices may have out",
    )


def _privacy() -> Iterable[Metric]:
    yield Metric(
        name="privacy_rho",
        kind="gauge",
        help="The zCDP of the image that was released most, labels and parameters not covered; of "
        "several devices the largest",
        by_device=True,
        fold="max",
    )
    yield Metric(
        name="privacy_images",
        kind="gauge",
        help="Images in devices' accounts of releases: another release is within the budget, or "
        "would exceed it, or they left without noise since the account was begun",
        label="account",
        values=("within_budget", "exhausted", "without_noise"),
    )


def _being() -> Iterable[Metric]:
    yield Metric(
        name="held_version",
        kind="gauge",
        help="Version of the parameters that a device trains from; of several the oldest",
        by_device=True,
        fold="min",
    )
    yield Metric(
        name="uptime_seconds",
        kind="gauge",
        help="Since the agent started; of several the shortest",
        by_device=True,
        fold="min",
    )
    yield Metric(
        name="reconnects",
        kind="counter",
        help="Connections to the broker after the first one of a boot",
        by_device=True,
    )
    yield Metric(
        name="agent_cpu_seconds",
        kind="counter",
        help="Processor time of the agent's process",
        by_device=True,
        most_per_s=1024,
    )
    yield Metric(
        name="agent_memory_bytes",
        kind="gauge",
        help="Resident memory of the agent's process",
        by_device=True,
    )
    yield Metric(
        name="temperature_celsius",
        kind="gauge",
        help="The hottest sensor of the device, where there is one; of several devices the hottest",
        by_device=True,
        fold="max",
    )
    yield Metric(
        name="agent_message_bytes",
        kind="counter",
        help="Application payload over the devices' links, broadcasts counted at every device",
        label="direction",
        values=("up", "down"),
        by_device=True,
        most_per_s=1e10,
    )
    yield Metric(
        name="agent_messages_dropped",
        kind="counter",
        help="Messages that devices did not understand or had no room for",
        label="reason",
        values=AGENT_DROPS,
    )


METRICS = {metric.name: metric for metric in _metrics()}
"""Name on the wire → metric."""
