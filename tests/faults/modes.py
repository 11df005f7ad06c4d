"""What ends otherwise, or has to be shown again, where learning goes another way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.faults.processes import KNOWN, MADE
from tests.faults.trial import ALL, CUTS, NOTHING, PHASES, QUOTA, WINDOW, Outcome, Phase

Rows = Mapping[str, Mapping[Phase, Outcome]]

EVERYBODYS = WINDOW * len(CUTS)
"""A window of batches of each device."""

# Batches are answered by receipts; a device that knows that it is offline goes on and keeps them.
NONE: Rows = {
    "agent killed": {
        "mid-round": Outcome(
            missed={"d1": (2, 3)},
            produced=ALL - (QUOTA - 2) - QUOTA,
            unfolded=2,
            late={"not_brought": 2},
        ),
    },
    "agent frozen": {
        # It wakes up in a round that is over, and makes a batch before it hears of that.
        "joining": Outcome(produced=ALL - (QUOTA - 1), expired=1, late={"not_kept": 0}),
        "mid-round": Outcome(produced=ALL - 3, expired=2, late={"folded": KNOWN}),
        "aggregating": NOTHING,
    },
    "agent restarted": dict.fromkeys(PHASES, NOTHING),
    # The rest of its round it made offline; what it kept is void when it is back.
    "agent partitioned": {
        "mid-round": Outcome(expired=QUOTA - 2, late={"folded": 2}, timeouts=WINDOW),
        "aggregating": Outcome(late={"folded": QUOTA}),
    },
    "agent slowed": {
        "joining": Outcome(produced=ALL - 2, expired=2, late={"folded": 4}),
        "mid-round": NOTHING,  # it has learnt from what it sent: less is left to do
    },
    "coordinator killed": {"mid-round": Outcome(attempts=(0, 1, 0, 0))},
    "coordinator frozen": {"mid-round": Outcome(extended=1, timeouts=EVERYBODYS)},
    "coordinator partitioned": {"mid-round": Outcome(timeouts=EVERYBODYS)},
    "coordinator restarted": {
        "joining": Outcome(attempts=(1, 0, 0, 0)),
        "mid-round": Outcome(attempts=(0, 1, 0, 0)),
    },
    # What was out is kept and sent again: nothing expires, as it does with gradients.
    "broker killed": {"mid-round": NOTHING},
    "broker frozen": {"mid-round": Outcome(timeouts=EVERYBODYS)},
    # Until it is noticed a window of each device is lost.
    "broker partitioned": {"mid-round": Outcome(expired=EVERYBODYS, timeouts=EVERYBODYS)},
    "broker restarted": {"mid-round": NOTHING},
    # Two windows in a row wait for 30 s each, for a batch or a receipt that is gone: that is too
    # long for the deadline, and the round is folded in late.
    "messages lost": {
        "mid-round": Outcome(expired=1, late={"folded": QUOTA - 1}, timeouts=WINDOW),
    },
    "messages duplicated": {"mid-round": NOTHING},
    "messages late": {"mid-round": Outcome(late={"folded": QUOTA}, timeouts=WINDOW)},
    "NaN: features": {"mid-round": Outcome(expired=1)},
}

# The server's one copy has learnt from every batch at once, so none of them needs a device's half.
SEQUENTIAL: Rows = {
    "agent killed": {
        "mid-round": Outcome(
            missed={"d1": (2, 3)},
            produced=ALL - (QUOTA - KNOWN) - QUOTA,
            late={"not_brought": KNOWN},
        ),
        "aggregating": Outcome(
            missed={"d1": (2, 3)}, produced=ALL - QUOTA, late={"not_brought": QUOTA}
        ),
    },
    "agent frozen": {
        "mid-round": Outcome(
            produced=ALL - (QUOTA - MADE),
            expired=MADE - KNOWN,
            late={"folded": KNOWN},
            timeouts=WINDOW,
        ),
    },
    "agent slowed": {"mid-round": Outcome(late={"folded": QUOTA})},
    "coordinator killed": {"aggregating": Outcome(attempts=(0, 1, 0, 0))},
    "broker killed": {"mid-round": Outcome(expired=2, timeouts=EVERYBODYS)},
    "NaN: server's loss": {"mid-round": Outcome(discarded={"diverged": 1})},
    "NaN: upload": {"mid-round": Outcome(left_out=1)},
}

# Nobody waits for a device that is gone: no version is late or given up because of it.
_GOES_ON: Mapping[Phase, Outcome] = dict.fromkeys(PHASES[:-1], NOTHING)
BUFFERED: Rows = {
    "agent killed": _GOES_ON,
    "agent frozen": _GOES_ON,
    "agent restarted": _GOES_ON,
    "agent partitioned": _GOES_ON,
    "agent slowed": _GOES_ON,
    "coordinator killed": {
        "joining": Outcome(attempts=(1, 0, 0, 0)),
        "checkpointing": Outcome(timeouts=EVERYBODYS),
        "offloading": NOTHING,
    },
    "coordinator frozen": {
        "joining": Outcome(extended=1),
        "mid-round": Outcome(timeouts=2 * EVERYBODYS),
    },
    "broker killed": {"joining": NOTHING, "mid-round": Outcome(expired=2, timeouts=EVERYBODYS)},
    "broker frozen": {"mid-round": Outcome(timeouts=2 * EVERYBODYS)},
    "broker restarted": _GOES_ON,
    "messages lost": {"mid-round": Outcome(expired=1, timeouts=2)},
    "messages duplicated": _GOES_ON,
    "clock jump: coordinator": {"joining": Outcome(extended=1)},
    "NaN: server's loss": {"mid-round": Outcome(discarded={"diverged": 1})},
    "NaN: upload": {"mid-round": Outcome(left_out=1)},
}

MODES: Mapping[str, tuple[dict[str, Any], Rows]] = {
    "none": ({"feedback": "none"}, NONE),
    "sequential": ({"strategy": "sequential"}, SEQUENTIAL),
    "cascade": ({"strategy": "cascade"}, SEQUENTIAL),
    "buffered": ({"aggregation": "buffered", "buffer_size": 3}, BUFFERED),
}
CELLS = [
    (mode, fault, phase)
    for mode, (_, rows) in MODES.items()
    for fault, outcomes in rows.items()
    for phase in outcomes
]
