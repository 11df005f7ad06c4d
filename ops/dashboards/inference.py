"""Inference: who answers, how well, how fast, at what cost; and the coordinator's side of it."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from ops.dashboards import page
from ops.dashboards.page import Row
from ops.dashboards.panels import (
    BYTES,
    JOULES,
    PER_SECOND,
    SECONDS,
    SHARE,
    Curve,
    bars,
    falling,
    graph,
    number,
    rising,
)
from ops.dashboards.promql import (
    CUT,
    REPORTED,
    average,
    mean,
    quantile,
    rate,
    ratio,
    series,
    total,
)

PREDICTIONS = "splitfleet_predictions"
OFFLOADS = "splitfleet_offloads"
AUDITS = "splitfleet_audits"
LABELLED = "splitfleet_labelled"
SECONDS_BY_STAGE = "splitfleet_prediction_seconds"
FEATURES = "splitfleet_feature"
ANSWER = "splitfleet_answer"

BY_EXIT = 'answered_by="exit"'
ANSWERED = 'outcome="answered"'
COMPARED = 'outcome=~"agreed|disagreed"'


def inference() -> Dashboard:
    """The dashboard *Inference and early exits*."""
    return page.page(
        "inference",
        "inference and early exits",
        "Which images the devices answer by themselves and which they ask about, how good the "
        "answers are, how long they take and what they cost.",
        [_now(), _who_answers(), _how_well(), _how_fast(), _what_it_costs(), _server()],
        variables=[page.cut(), page.device_class()],
    )


def _now() -> Row:
    return Row(
        "Now",
        [
            number(
                "Images answered",
                "Images a second that devices have answered, by whomever.",
                Curve(rate(PREDICTIONS, *REPORTED), "images/s"),
                unit=PER_SECOND,
            ),
            number(
                "Answered by the exit",
                "Share of the answered images whose exit was sure: neither sent nor waited for.",
                Curve(
                    ratio(
                        rate(PREDICTIONS, BY_EXIT, *REPORTED),
                        rate(PREDICTIONS, *REPORTED),
                    ),
                    "exit",
                ),
                unit=SHARE,
            ),
            number(
                "Offloads that failed",
                "Share of the images the server was asked about whose answer did not come in time, "
                "or was refused. Withdrawn ones are left out.",
                Curve(
                    ratio(
                        rate(OFFLOADS, 'outcome!~"answered|cancelled"', *REPORTED),
                        rate(OFFLOADS, 'outcome!="cancelled"', *REPORTED),
                    ),
                    "failed",
                ),
                unit=SHARE,
                levels=rising(0.05, 0.25),
            ),
            number(
                "Exits that agree",
                "Of the sure answers that were checked with the server (audits), the share in "
                "which both said the same.",
                Curve(_agreement(), "agreed"),
                unit=SHARE,
                levels=falling(0.9, 0.8),
            ),
            number(
                "Devices that drift",
                "Devices that trust their exit less than they were told to, for its audits agreed "
                "too seldom.",
                Curve(total("splitfleet_drifting_devices", *REPORTED), "devices"),
                levels=rising(1, 5),
            ),
            number(
                "Version that answers",
                "The version of the parameters that the coordinator answers with.",
                Curve(series("splitfleet_serving_version"), "version"),
            ),
        ],
    )


def _who_answers() -> Row:
    return Row(
        "Who answers",
        [
            graph(
                "Answers by origin",
                "Images a second answered by a sure exit, by the server, or by an unsure exit as a "
                "fallback, because the server was not asked or did not answer.",
                Curve(rate(PREDICTIONS, *REPORTED, by="answered_by"), "{{answered_by}}"),
                unit=PER_SECOND,
                stacked=True,
            ),
            graph(
                "Share answered by the exit, by cut",
                "Deeper exits are surer. A share that falls while the threshold stays says that "
                "the images have become harder.",
                Curve(
                    ratio(
                        rate(PREDICTIONS, BY_EXIT, *REPORTED, by="cut"),
                        rate(PREDICTIONS, *REPORTED, by="cut"),
                    ),
                    "cut {{cut}}",
                ),
                unit=SHARE,
                high=1,
            ),
            graph(
                "Threshold, by cut",
                "Confidence above which an exit answers: as the coordinator serves it, and as it "
                "is in force, mean of the devices; the drift guard tightens it where it must.",
                Curve(mean("splitfleet_exit_threshold", *REPORTED, by="cut"), "cut {{cut}}"),
                Curve(series("splitfleet_served_threshold", CUT), "cut {{cut}}, served"),
                unit="none",
                low=None,
            ),
            graph(
                "Offloads by outcome",
                "What came of the images that the server was asked about. Anything but answered "
                "ends in the exit's own answer.",
                Curve(rate(OFFLOADS, *REPORTED, by="outcome"), "{{outcome}}"),
                unit=PER_SECOND,
                stacked=True,
                many=True,
                width=9,
            ),
            graph(
                "Unsure, and not asked",
                "Images of unsure exits that the server was not asked about, by why: no "
                "connection, budget spent, link too slow, too many under way.",
                Curve(rate("splitfleet_offloads_held", *REPORTED, by="reason"), "{{reason}}"),
                unit=PER_SECOND,
                stacked=True,
                many=True,
                width=8,
            ),
            graph(
                "Not answered",
                "Images without any answer: given up for newer ones, withdrawn by who asked, or "
                "impossible to compute with.",
                Curve(rate("splitfleet_predictions_failed", *REPORTED, by="reason"), "{{reason}}"),
                unit=PER_SECOND,
                stacked=True,
                width=7,
            ),
        ],
    )


def _how_well() -> Row:
    images = rate(f"{LABELLED}_images", *REPORTED, by="cut")
    return Row(
        "How well",
        [
            graph(
                "Agreement of sure exits with the server, by cut",
                "From audits: a sampled share of the sure images is sent all the same. Beside it "
                "what was measured on held-out images when the threshold was chosen.",
                Curve(_agreement(by="cut"), "cut {{cut}}"),
                Curve(series("splitfleet_served_agreement_ratio", CUT), "cut {{cut}}, held out"),
                unit=SHARE,
                high=1,
            ),
            graph(
                "Accuracy of the answers, by cut",
                "Where images come with labels: the share that whoever answered got right.",
                Curve(
                    ratio(rate(f"{LABELLED}_correct", 'by="answer"', *REPORTED, by="cut"), images),
                    "cut {{cut}}",
                ),
                unit=SHARE,
                high=1,
            ),
            graph(
                "Accuracy of the exits alone, by cut",
                "Of the same images, the share that the exit got right, sure or not. The distance "
                "to the accuracy of the answers is what offloading is good for.",
                Curve(
                    ratio(rate(f"{LABELLED}_correct", 'by="exit"', *REPORTED, by="cut"), images),
                    "cut {{cut}}",
                ),
                unit=SHARE,
                high=1,
            ),
        ],
    )


def _how_fast() -> Row:
    def whole(q: float, name: str) -> Curve:
        return Curve(quantile(q, SECONDS_BY_STAGE, 'stage="total"', *REPORTED), name)

    return Row(
        "How fast",
        [
            graph(
                "Time of a request",
                "From taking a request to its answer, on the device: median, 90th and 99th "
                "percentile of all requests, offloaded or not.",
                whole(0.5, "median"),
                whole(0.9, "90 %"),
                whole(0.99, "99 %"),
                unit=SECONDS,
                logarithmic=True,
            ),
            graph(
                "Median by stage",
                "Waiting for its turn, the way through the exit, encoding the features, the round "
                "trip to the server and back.",
                Curve(
                    quantile(0.5, SECONDS_BY_STAGE, 'stage!="total"', *REPORTED, by="stage"),
                    "{{stage}}",
                ),
                unit=SECONDS,
                logarithmic=True,
            ),
            graph(
                "99th percentile by stage",
                "The same for the slowest of a hundred.",
                Curve(
                    quantile(0.99, SECONDS_BY_STAGE, 'stage!="total"', *REPORTED, by="stage"),
                    "{{stage}}",
                ),
                unit=SECONDS,
                logarithmic=True,
            ),
        ],
    )


def _what_it_costs() -> Row:
    images = rate(PREDICTIONS, *REPORTED, by="device_class")
    offloaded = rate("splitfleet_offloads_requested", *REPORTED, by="cut")
    return Row(
        "What it costs",
        [
            graph(
                "Processor time an image, by device class",
                "Of the threads that answer.",
                Curve(
                    ratio(
                        rate("splitfleet_answering_cpu_seconds", *REPORTED, by="device_class"),
                        images,
                    ),
                    "{{device_class}}",
                ),
                unit=SECONDS,
            ),
            bars(
                "Energy an image, by device class",
                "Estimated, not measured: processor time times the watts of a busy core of the "
                "class, and bytes times the joules of its radio (ops/energy.toml). Only classes "
                "that are in that table.",
                Curve(
                    ratio(
                        rate("splitfleet_answering_energy_joules", *REPORTED, by="device_class"),
                        images,
                    ),
                    "{{device_class}}",
                ),
                unit=JOULES,
            ),
            graph(
                "Bytes an offload, by cut",
                "Encoded features sent up, for each image that the server was asked about.",
                Curve(
                    ratio(
                        rate("splitfleet_offload_bytes", 'direction="up"', *REPORTED, by="cut"),
                        offloaded,
                    ),
                    "cut {{cut}}",
                ),
                unit=BYTES,
            ),
        ],
    )


def _server() -> Row:
    return Row(
        "The coordinator's side",
        [
            graph(
                "Requests answered and refused",
                "Requests with features by outcome: answered, or why they were refused.",
                Curve(rate(f"{FEATURES}_requests", by="outcome"), "{{outcome}}"),
                unit=PER_SECOND,
                stacked=True,
                many=True,
            ),
            graph(
                "Images answered, by cut",
                "Images a second that the server answered for devices.",
                Curve(rate(f"{FEATURES}_images", CUT, by="cut"), "cut {{cut}}"),
                unit=PER_SECOND,
                stacked=True,
            ),
            graph(
                "Images that wait",
                "Images in the queue for the server's answer. One that stays long says that the "
                "coordinator needs a faster machine or the devices a lower threshold.",
                Curve(series(f"{ANSWER}_queue_images"), "images"),
            ),
            graph(
                "Images in one forward pass",
                "Mean size of the batches that questions are answered in.",
                Curve(average(f"{ANSWER}_batch_images"), "images"),
            ),
            graph(
                "Wait for a turn",
                "How long answered requests waited at the coordinator: median and 99th percentile.",
                Curve(quantile(0.5, f"{ANSWER}_queue_seconds"), "median"),
                Curve(quantile(0.99, f"{ANSWER}_queue_seconds"), "99 %"),
                unit=SECONDS,
                logarithmic=True,
            ),
            graph(
                "Forward pass",
                "One forward pass that answers, decoding and encoding not included: median and "
                "99th percentile.",
                Curve(quantile(0.5, f"{ANSWER}_forward_seconds"), "median"),
                Curve(quantile(0.99, f"{ANSWER}_forward_seconds"), "99 %"),
                unit=SECONDS,
                logarithmic=True,
            ),
        ],
    )


def _agreement(by: str = "") -> str:
    return ratio(
        rate(AUDITS, 'outcome="agreed"', *REPORTED, by=by), rate(AUDITS, COMPARED, *REPORTED, by=by)
    )
