"""Training: how well the network does, how the rounds go, where the time goes."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from ops.dashboards import page
from ops.dashboards.page import Row
from ops.dashboards.panels import PER_SECOND, SECONDS, SHARE, Curve, graph, number
from ops.dashboards.promql import CUT, REPORTED, increase, quantile, rate, series

ROUNDS = "splitfleet_rounds"
STEP = "splitfleet_training_step_seconds"


def training() -> Dashboard:
    """The dashboard *Training*."""
    return page.page(
        "training",
        "training",
        "How well the network does, how its rounds go, and where their time goes.",
        [_now(), _learning(), _rounds(), _time()],
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
                "Cross entropy of the early exits, mean of their devices' last reports.",
                Curve(series("splitfleet_exit_loss", CUT), "cut {{cut}}"),
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
                width=6,
            ),
            graph(
                "Samples applied, by cut",
                "Training samples a second, by the cut at which they entered.",
                Curve(rate("splitfleet_samples_applied", CUT, by="cut"), "cut {{cut}}"),
                unit=PER_SECOND,
                stacked=True,
                width=6,
            ),
            graph(
                "Batches discarded, by reason",
                "Batches a second that came and were not trained on. not_finite are NaNs.",
                Curve(rate("splitfleet_batches_discarded", by="reason"), "{{reason}}"),
                unit=PER_SECOND,
                stacked=True,
                many=True,
                width=6,
            ),
            graph(
                "Late samples, by outcome",
                "Samples of contributions to earlier rounds: folded in at a discount, or dropped.",
                Curve(rate("splitfleet_late_samples", by="outcome"), "{{outcome}}"),
                unit=PER_SECOND,
                stacked=True,
                many=True,
                width=6,
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
                Curve(quantile(0.5, "splitfleet_round_trip_seconds", *REPORTED), "median"),
                Curve(quantile(0.95, "splitfleet_round_trip_seconds", *REPORTED), "95 %"),
                Curve(quantile(0.99, "splitfleet_round_trip_seconds", *REPORTED), "99 %"),
                unit=SECONDS,
                logarithmic=True,
                width=12,
            ),
            graph(
                "Training step of the coordinator, by cut",
                "From taking a batch up to having its gradient, decoding and encoding included: "
                "median.",
                Curve(quantile(0.5, STEP, CUT, by="cut"), "cut {{cut}}"),
                unit=SECONDS,
                logarithmic=True,
                width=12,
            ),
        ],
    )
