"""The books of answering as metrics."""

from __future__ import annotations

from edge_agent.answer_counts import Counts
from edge_agent.meters import Meters


def enter_counts(meters: Meters, counts: Counts) -> None:
    """Add these books; they may be kept in another thread meanwhile."""
    meters.count("prediction_requests", counts.requests)
    meters.count_all(
        "predictions",
        {"exit": counts.exits, "server": counts.answered, "fallback": counts.fallbacks},
    )
    meters.count_all(
        "predictions_failed",
        {
            "overloaded": counts.overloaded,
            "cancelled": counts.cancelled,
            "failed": counts.failed,
        },
    )
    meters.count("offloads_requested", counts.offloads)
    meters.count_all("offloads", {"answered": counts.answered, **dict(counts.lost)})
    meters.count("offloads", counts.offloads_cancelled, "cancelled")
    meters.count_all("offloads_held", dict(counts.held))
    meters.count("audits_requested", counts.audits)
    agreed = counts.audits_agreed
    meters.count_all(
        "audits",
        {
            "agreed": agreed,
            "disagreed": counts.audits_disagreed,
            "lost": counts.audits_lost,
        },
    )
    meters.count("labelled_images", counts.labelled)
    meters.count_all("labelled_correct", {"exit": counts.exit_correct, "answer": counts.correct})
    meters.count_all(
        "offload_messages",
        {"sent": counts.messages, "reply": counts.replies, "late": counts.late},
    )
    meters.count_all("offload_bytes", {"up": counts.bytes_up, "down": counts.bytes_down})
    meters.count("answering_cpu_seconds", counts.cpu_s)
    for stage, seconds in counts.seconds.items():
        meters.distribution("prediction_seconds", stage).add(seconds)
