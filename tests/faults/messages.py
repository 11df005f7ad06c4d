"""Messages that are lost, doubled, overtaken, damaged or late, and what comes of it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from ops.simulator import Fault as MessageFault
from ops.simulator.faults import Action, Way
from tests.faults.fault import Fault
from tests.faults.trial import (
    ALL,
    NOTHING,
    OPEN_QUESTIONS,
    PHASES,
    QUOTA,
    STRUCK,
    VICTIM,
    Outcome,
    Phase,
    Trial,
)

MESSAGES: Mapping[Phase, list[tuple[Way, str, int]]] = {
    "joining": [
        ("up", "hello", 1),
        ("down", "assignment", 1),
        ("up", "request", 2),
        ("down", "parameters", 1),
        ("down", "receipt", 1),
    ],
    "mid-round": [("up", "activations", 1), ("down", "gradients", 1), ("down", "receipt", 2)],
    "aggregating": [("up", "parameters", 1), ("down", "receipt", 2)],
    "checkpointing": [("down", "manifest", 1), ("down", "parameters", 1), ("down", "round", 1)],
    "offloading": [("up", "features", 2), ("down", "prediction", 2), ("up", "report", 1)],
}
"""Direction, kind and number of the victim's messages that are hit, from the instant on."""
DELAYS_S: Mapping[Action, float] = {"duplicate": 1.0, "reorder": 1.0, "late": 40.0}
"""Late is later than whoever waits for it waits."""


def messages_hit(trial: Trial, phase: Phase, *, action: Action) -> None:
    def strike() -> None:
        for way, kind, times in MESSAGES[phase]:
            fault = MessageFault(action, kind=kind, way=way, device=VICTIM, times=times)
            fault.delay_s = DELAYS_S.get(action, 0.0)
            trial.fleet.faults.add(fault)

    if phase == "joining":
        trial.strike(strike)
    elif phase == "checkpointing":
        trial.at_server(phase, strike)
    elif phase == "aggregating":
        trial.when(lambda: _about_to_upload(trial), strike)
    else:
        trial.at_device(phase, strike)


def _about_to_upload(trial: Trial) -> bool:
    attempt = trial.fleet.agent(VICTIM).attempt if trial.victim.alive else None
    return attempt is not None and attempt.stamp[1] == STRUCK and attempt.complete


# What is asked or uploaded is said again after 2 s, 4 s and so on, until it is answered. A batch
# whose activations are gone expires, one whose gradient is gone is applied all the same; the device
# waits 30 s for both together. An announcement that is gone is not said again: the device learns of
# the round after it. A question about four images that is gone is answered by the exit.
GONE: Mapping[Phase, Outcome] = {
    "joining": NOTHING,
    "mid-round": Outcome(expired=1, timeouts=2),
    "aggregating": NOTHING,
    "checkpointing": Outcome(missed={"d1": (STRUCK + 1,)}, produced=ALL - QUOTA),
    "offloading": Outcome(fallbacks=4 * OPEN_QUESTIONS),
}
NONE_GONE: Mapping[Phase, Outcome] = dict.fromkeys(PHASES, NOTHING)

FAULTS = [
    Fault("messages lost", partial(messages_hit, action="lose"), lasts_s=60, outcomes=GONE),
    Fault(
        "messages duplicated",
        partial(messages_hit, action="duplicate"),
        lasts_s=60,
        outcomes=NONE_GONE,
    ),
    Fault(
        "messages reordered",
        partial(messages_hit, action="reorder"),
        lasts_s=60,
        outcomes=NONE_GONE,
    ),
    Fault(
        "messages truncated", partial(messages_hit, action="truncate"), lasts_s=60, outcomes=GONE
    ),
    Fault("messages flipped", partial(messages_hit, action="flip"), lasts_s=60, outcomes=GONE),
    # The activations come when the round has closed; the announcement comes before it does.
    Fault(
        "messages late",
        partial(messages_hit, action="late"),
        lasts_s=60,
        outcomes={**GONE, "checkpointing": NOTHING},
    ),
]
