"""The fleet at a glance: is it well, what does it do, where to look next."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from ops.dashboards import page
from ops.dashboards.page import Row
from ops.dashboards.panels import (
    BYTES,
    BYTES_PER_SECOND,
    COUNT,
    PER_SECOND,
    SECONDS,
    SHARE,
    Curve,
    falling,
    graph,
    number,
    rising,
    rows,
)
from ops.dashboards.promql import (
    CUT,
    REPORTED,
    behind,
    increase,
    largest,
    rate,
    ratio,
    series,
    total,
)

ONLINE = series("splitfleet_devices", 'state="online"')


def fleet() -> Dashboard:
    """The dashboard *Fleet overview*."""
    return page.page(
        "fleet",
        "fleet overview",
        "Is the fleet well, what does it do, and where to look next.",
        [_now(), _devices(), _work(), _resources(), _trouble(), _identity(), _privacy(), _each()],
        variables=[page.cut(), page.device_class()],
    )


def _now() -> Row:
    return Row(
        "Now",
        [
            number(
                "Coordinator",
                "Whether Prometheus reaches the coordinator.",
                Curve(series("up"), "up"),
                levels=((None, "red"), (1, "green")),
                words={"0": "down", "1": "up"},
                width=3,
            ),
            number(
                "Broker",
                "Whether the coordinator is connected to the broker.",
                Curve(series("splitfleet_broker_up"), "up"),
                levels=((None, "red"), (1, "green")),
                words={"0": "down", "1": "up"},
                width=3,
            ),
            number(
                "Phase",
                "What the run is at.",
                Curve(f"{series('splitfleet_run_phase')} == 1", "{{phase}}"),
                named=True,
                width=3,
            ),
            number(
                "Devices online",
                "Share of the known devices whose last status says that they are connected.",
                Curve(f"sum({ONLINE}) / {total('splitfleet_devices')}", "online"),
                unit=SHARE,
                levels=falling(0.9, 0.7),
                width=3,
            ),
            number(
                "Last checkpoint",
                "Age of the newest checkpoint: what a coordinator that fails now would lose.",
                Curve(f"time() - {series('splitfleet_checkpoint_timestamp_seconds')}", "age"),
                unit=SECONDS,
                width=3,
            ),
            number(
                "Accuracy",
                "The whole network on the test images, after the last closed round.",
                Curve(series("splitfleet_server_accuracy"), "whole network"),
                unit=SHARE,
                decimals=1,
                width=3,
            ),
            number(
                "Samples trained on",
                "Training samples a second, all devices together.",
                Curve(rate("splitfleet_samples_applied", CUT), "samples/s"),
                unit=PER_SECOND,
                width=3,
            ),
            number(
                "Images answered",
                "Images a second that devices have answered.",
                Curve(rate("splitfleet_predictions", *REPORTED), "images/s"),
                unit=PER_SECOND,
                width=3,
            ),
        ],
    )


def _devices() -> Row:
    return Row(
        "Devices",
        [
            graph(
                "Online and offline",
                "Devices known to the coordinator.",
                Curve(series("splitfleet_devices"), "{{state}}"),
                stacked=True,
                width=12,
            ),
            graph(
                "What they are doing",
                "Devices online, by phase.",
                Curve(series("splitfleet_devices_by_phase"), "{{phase}}"),
                stacked=True,
                width=12,
            ),
        ],
    )


def _work() -> Row:
    return Row(
        "Work",
        [
            graph(
                "Samples trained on, by cut",
                "Training samples a second, by the cut at which they entered.",
                Curve(rate("splitfleet_samples_applied", CUT, by="cut"), "cut {{cut}}"),
                unit=PER_SECOND,
                stacked=True,
            ),
            graph(
                "Answers by origin",
                "Images a second answered by a sure exit, by the server, or by the exit as a "
                "fallback.",
                Curve(
                    rate("splitfleet_predictions", *REPORTED, by="answered_by"), "{{answered_by}}"
                ),
                unit=PER_SECOND,
                stacked=True,
            ),
            graph(
                "Offloads that failed, by cut",
                "Share of the images the server was asked about whose answer did not come in time, "
                "or was refused.",
                Curve(
                    ratio(
                        rate(
                            "splitfleet_offloads",
                            'outcome!~"answered|cancelled"',
                            *REPORTED,
                            by="cut",
                        ),
                        rate("splitfleet_offloads", 'outcome!="cancelled"', *REPORTED, by="cut"),
                    ),
                    "cut {{cut}}",
                ),
                unit=SHARE,
                high=1,
            ),
        ],
    )


def _resources() -> Row:
    return Row(
        "What it takes",
        [
            graph(
                "Processor cores in use, by device class",
                "Of the agents' processes, all devices of a class together.",
                Curve(
                    rate("splitfleet_agent_cpu_seconds", *REPORTED, by="device_class"),
                    "{{device_class}}",
                ),
                unit="none",
                stacked=True,
            ),
            graph(
                "Largest agent, by device class",
                "Resident memory of the agent that has most of it.",
                Curve(
                    largest("splitfleet_agent_memory_bytes", *REPORTED, by="device_class"),
                    "{{device_class}}",
                ),
                unit=BYTES,
            ),
            graph(
                "Bytes on the wire",
                "Application payload over the coordinator's link, from devices (up) and to them.",
                Curve(rate("splitfleet_message_bytes", by="direction"), "{{direction}}"),
                unit=BYTES_PER_SECOND,
                stacked=True,
            ),
        ],
    )


def _trouble() -> Row:
    return Row(
        "Trouble",
        [
            graph(
                "Messages dropped, by reason",
                "Messages a second that the coordinator did not understand or want. Quiet when "
                "all is well.",
                Curve(rate("splitfleet_messages_dropped", by="reason"), "{{reason}}"),
                unit=PER_SECOND,
                stacked=True,
                many=True,
                width=12,
            ),
            graph(
                "Batches discarded, by reason",
                "Batches a second that came and were not trained on.",
                Curve(rate("splitfleet_batches_discarded", by="reason"), "{{reason}}"),
                unit=PER_SECOND,
                stacked=True,
                many=True,
                width=12,
            ),
            graph(
                "Breaches, by reason",
                "Rules a second that devices broke: with too many of them within a while a device "
                "is in quarantine. Who it is: splitfleet status --sort breaches.",
                Curve(rate("splitfleet_breaches", by="reason"), "{{reason}}"),
                unit=PER_SECOND,
                stacked=True,
                many=True,
                width=12,
            ),
            graph(
                "Devices in quarantine",
                "They have no part in rounds, and their messages are dropped, for a minute and "
                "twice as long each time.",
                Curve(series("splitfleet_devices_quarantined"), "in quarantine"),
                levels=rising(1, 5),
                width=12,
            ),
        ],
    )


def _identity() -> Row:
    server = 'of=~"broker|coordinator"'
    certificate = series("splitfleet_certificate_expires_timestamp_seconds", server)
    listed = series("splitfleet_revocation_list_expires_timestamp_seconds")
    return Row(
        "Identity",
        [
            graph(
                "Devices on the roster",
                "By their certificates: valid, near its end (it should have been renewed), ended, "
                "awaited with a new key, revoked. Empty where the coordinator has no fleet_dir.",
                Curve(series("splitfleet_roster_devices"), "{{state}}"),
                stacked=True,
                many=True,
                absent="no fleet_dir",
            ),
            graph(
                "What ends soon",
                "Time that is left of what all depends on: certificates of broker and coordinator, "
                "and revocation lists. Signed anew when two thirds are left.",
                Curve(f"{certificate} - time()", "{{of}}"),
                Curve(f"{listed} - time()", "list of {{of}}"),
                unit=SECONDS,
            ),
            graph(
                "Certificates asked for",
                "What devices that asked for a certificate got: one, or the reason why not.",
                Curve(rate("splitfleet_certificate_requests", by="outcome"), "{{outcome}}"),
                unit=PER_SECOND,
                stacked=True,
                many=True,
            ),
        ],
    )


def _privacy() -> Row:
    return Row(
        "Privacy",
        [
            graph(
                "Privacy spent, by cut",
                "The zCDP (ρ) of the image that was released most; labels and parameters are not "
                "covered. Empty where no noise is added (clip_norm, noise_std).",
                Curve(largest("splitfleet_privacy_rho", *REPORTED, by="cut"), "cut {{cut}}"),
                unit="none",
                absent="no noise is added",
                width=12,
            ),
            graph(
                "Images in the devices' accounts",
                "Within the budget, at its end (they are released no more), or released without "
                "noise since the account was begun. Empty where no noise is added.",
                Curve(total("splitfleet_privacy_images", *REPORTED, by="account"), "{{account}}"),
                stacked=True,
                absent="no noise is added",
                width=12,
            ),
        ],
    )


def _each() -> Row:
    place = "device, cut, device_class"
    images = rate("splitfleet_predictions", *REPORTED, by=place)
    exits = rate("splitfleet_predictions", 'answered_by="exit"', *REPORTED, by=place)
    return Row(
        "Device by device",
        [
            rows(
                "Devices",
                "Those that are shown by name, and the others together: uptime, versions behind, "
                "batches and images a second, share answered by the exit, bytes up, processor "
                "cores, memory, reconnects within a day. A name leads to what is known of that "
                "device.",
                "device",
                {
                    "Uptime": (total("splitfleet_uptime_seconds", *REPORTED, by=place), SECONDS),
                    "Behind": (behind(*REPORTED, by=place), COUNT),
                    "Batches": (
                        rate("splitfleet_batches_made", *REPORTED, by=place),
                        PER_SECOND,
                    ),
                    "Images": (images, PER_SECOND),
                    "By the exit": (ratio(exits, images), SHARE),
                    "Up": (
                        rate(
                            "splitfleet_agent_message_bytes",
                            'direction="up"',
                            *REPORTED,
                            by=place,
                        ),
                        BYTES_PER_SECOND,
                    ),
                    "Cores": (
                        rate("splitfleet_agent_cpu_seconds", *REPORTED, by=place),
                        "none",
                    ),
                    "Memory": (
                        total("splitfleet_agent_memory_bytes", *REPORTED, by=place),
                        BYTES,
                    ),
                    "Reconnects": (
                        increase("splitfleet_reconnects", "1d", *REPORTED, by=place),
                        COUNT,
                    ),
                },
                link=page.link_to("device", "var-device=${__value.text}"),
            ),
        ],
    )
