"""Training: how well the network does, how the rounds go, where the time goes."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from ops.dashboards import page
from ops.dashboards.page import Row
from ops.dashboards.panels import BYTES, PER_SECOND, SECONDS, SHARE, Curve, graph, number
from ops.dashboards.promql import (
    CUT,
    REPORTED,
    average,
    behind,
    increase,
    quantile,
    rate,
    ratio,
    series,
    total,
)

ROUNDS = "splitfleet_rounds"
EXIT = "splitfleet_exit_training"
PARTS = "splitfleet_training_seconds"
ROUND_TRIP = "splitfleet_round_trip_seconds"
STALENESS = "splitfleet_gradient_staleness_batches"
STEP = "splitfleet_training_step_seconds"


def training() -> Dashboard:
    """The dashboard *Training*."""
    return page.page(
        "training",
        "training",
        "How well the network does, how its rounds go, and where their time goes.",
        [_now(), _learning(), _rounds(), _pipeline(), _time(), _losses()],
        variables=[page.cut(), page.device_class()],
    )


def _now() -> Row:
    return Row(
        "Now",
        [
            number(
                "Phase",
                "What the run is at: gathering devices, training, answering the test images, "
                "finished.",
                Curve(f"{series('splitfleet_run_phase')} == 1", "{{phase}}"),
                named=True,
            ),
            number(
                "Round",
                "The round that the coordinator is in.",
                Curve(series("splitfleet_round"), "round"),
            ),
            number(
                "Parameter version",
                "Grows by one with each closed round.",
                Curve(series("splitfleet_parameter_version"), "version"),
            ),
            number(
                "Accuracy",
                "The whole network on the test images, after the last closed round.",
                Curve(series("splitfleet_server_accuracy"), "whole network"),
                unit=SHARE,
                decimals=1,
            ),
            number(
                "Samples trained on",
                "Training samples a second that the server has applied.",
                Curve(rate("splitfleet_samples_applied", CUT), "samples/s"),
                unit=PER_SECOND,
            ),
            number(
                "Rounds abandoned",
                "Within a day: too few devices finished, twice in a row.",
                Curve(increase(ROUNDS, "1d", 'outcome="abandoned"'), "rounds"),
                levels=((None, "green"), (1, "orange"), (5, "red")),
                decimals=0,
            ),
        ],
    )


def _learning() -> Row:
    exit_images = rate(f"{EXIT}_images", *REPORTED, by="cut")
    return Row(
        "Learning",
        [
            graph(
                "Accuracy after each round",
                "On the test images, after each closed round: the whole network, and the exit at "
                "each cut.",
                Curve(series("splitfleet_server_accuracy"), "whole network"),
                Curve(series("splitfleet_exit_accuracy", CUT), "exit at cut {{cut}}"),
                unit=SHARE,
                low=None,
                high=1,
            ),
            graph(
                "Loss of the whole network, by cut",
                "Cross entropy on the activations that enter at a cut, mean of the round so far.",
                Curve(series("splitfleet_server_loss", CUT), "cut {{cut}}"),
                unit="none",
                low=None,
            ),
            graph(
                "Loss of the exits, by cut",
                "Cross entropy of the early exits on the images that they learn from.",
                Curve(ratio(rate(f"{EXIT}_loss", *REPORTED, by="cut"), exit_images), "cut {{cut}}"),
                unit="none",
                low=None,
            ),
        ],
    )


def _rounds() -> Row:
    return Row(
        "Rounds",
        [
            graph(
                "Rounds by outcome",
                "Within an hour: closed with enough devices, extended for want of them, or "
                "abandoned.",
                Curve(increase(ROUNDS, "1h", by="outcome"), "{{outcome}}"),
                stacked=True,
            ),
            graph(
                "Time of a round",
                "From its opening to its close, mean of an hour.",
                Curve(average("splitfleet_round_seconds", window="1h"), "round"),
                unit=SECONDS,
            ),
            graph(
                "Samples applied, by cut",
                "Training samples a second, by the cut at which they entered.",
                Curve(rate("splitfleet_samples_applied", CUT, by="cut"), "cut {{cut}}"),
                unit=PER_SECOND,
                stacked=True,
            ),
            graph(
                "Versions behind, by cut",
                "How far the device that is furthest behind trains from older parameters than the "
                "last closed round's. 1 is what a device has that is still fetching them.",
                Curve(behind(*REPORTED, by="cut"), "cut {{cut}}"),
            ),
            graph(
                "Age of the newest checkpoint",
                "What a coordinator that fails now would lose.",
                Curve(f"time() - {series('splitfleet_checkpoint_timestamp_seconds')}", "age"),
                unit=SECONDS,
            ),
            graph(
                "Size of the newest checkpoint",
                "Parameters and momentum of the whole network, and what else a round begins with.",
                Curve(series("splitfleet_checkpoint_bytes"), "checkpoint"),
                unit=BYTES,
            ),
        ],
    )


def _losses() -> Row:
    return Row(
        "Work that came to nothing",
        [
            graph(
                "At the coordinator, by reason",
                "Batches a second that came and were not trained on; not_finite are NaNs.",
                Curve(rate("splitfleet_batches_discarded", by="reason"), "{{reason}}"),
                unit=PER_SECOND,
                stacked=True,
                many=True,
                width=12,
            ),
            graph(
                "At the devices, by reason",
                "Batches a second without an answer in time, with activations that were not "
                "finite, or given up without a connection.",
                Curve(rate("splitfleet_batches_lost", *REPORTED, by="reason"), "{{reason}}"),
                unit=PER_SECOND,
                stacked=True,
                many=True,
                width=12,
            ),
            graph(
                "Late samples, by outcome",
                "Samples of contributions to earlier rounds: folded in at a discount, or dropped.",
                Curve(rate("splitfleet_late_samples", by="outcome"), "{{outcome}}"),
                unit=PER_SECOND,
                stacked=True,
                many=True,
                width=12,
            ),
            graph(
                "Late contributions folded in",
                "Within an hour: how many, and by how many versions they were late, all together.",
                Curve(f"increase({series('splitfleet_late_versions_count')}[1h])", "contributions"),
                Curve(f"increase({series('splitfleet_late_versions_sum')}[1h])", "versions"),
                width=12,
            ),
        ],
    )


def _pipeline() -> Row:
    return Row(
        "Batches under way",
        [
            graph(
                "In flight, kept, allowed",
                "Batches of all devices that are sent and not answered yet, that wait for a "
                "connection, and that may be out at once (credits).",
                Curve(total("splitfleet_batches_in_flight", *REPORTED), "in flight"),
                Curve(total("splitfleet_batches_kept", *REPORTED), "kept"),
                Curve(total("splitfleet_credits", *REPORTED), "credits"),
            ),
            graph(
                "Staleness of gradients, by cut",
                "How many other batches a device learnt from between making a batch and learning "
                "from its gradient, mean.",
                Curve(average(STALENESS, *REPORTED, by="cut"), "cut {{cut}}"),
                unit="none",
            ),
            graph(
                "Gradients that came too late",
                "Gradients a second that came after their time-out and changed nothing.",
                Curve(rate("splitfleet_gradients_late", *REPORTED, by="cut"), "cut {{cut}}"),
                unit=PER_SECOND,
                stacked=True,
            ),
        ],
    )


def _time() -> Row:
    return Row(
        "Where the time goes",
        [
            graph(
                "Round trip of a batch",
                "From a device sending activations to having their gradient: median, 95th and 99th "
                "percentile.",
                Curve(quantile(0.5, ROUND_TRIP, *REPORTED), "median"),
                Curve(quantile(0.95, ROUND_TRIP, *REPORTED), "95 %"),
                Curve(quantile(0.99, ROUND_TRIP, *REPORTED), "99 %"),
                unit=SECONDS,
                logarithmic=True,
            ),
            graph(
                "Work of a device on a batch, by part",
                "Layers and exit forward, encoding the activations, decoding the gradient, "
                "backward with the step: medians.",
                Curve(quantile(0.5, PARTS, *REPORTED, by="part"), "{{part}}"),
                unit=SECONDS,
                logarithmic=True,
            ),
            graph(
                "Training step of the coordinator, by cut",
                "From taking a batch up to having its gradient, decoding and encoding included: "
                "median.",
                Curve(quantile(0.5, STEP, CUT, by="cut"), "cut {{cut}}"),
                unit=SECONDS,
                logarithmic=True,
            ),
        ],
    )
