"""Processes that are killed, frozen, restarted, cut off or slowed, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ops.simulator import Killed
from tests.faults.fault import Fault
from tests.faults.trial import (
    ALL,
    CUTS,
    NOTHING,
    OPEN_QUESTIONS,
    PHASES,
    QUOTA,
    STRUCK,
    UNSURE,
    WINDOW,
    Act,
    Outcome,
    Phase,
    Trial,
)

AWAY_S = 60.0
"""How long coordinator or broker are away: till the deadline, and longer than goes unnoticed."""
MOMENT_S = 0.5
LAZY = 20
"""A slowed device makes a batch in 12 s instead of 0.6 s, and five of eight until the deadline."""


# -- an agent -------------------------------------------------------------------------------------


def _strike_agent(trial: Trial, phase: Phase, then: Act) -> None:
    """Kill it; at *checkpointing* in the midst of writing."""
    if phase == "checkpointing":

        def die() -> None:
            trial.after(0.0, then)
            raise Killed

        trial.in_device_disk(die)
    else:

        def kill() -> None:
            trial.victim.kill()
            then()

        trial.at_device(phase, kill)


def agent_killed(trial: Trial, phase: Phase) -> None:
    _strike_agent(trial, phase, lambda: trial.when_gone_on(trial.victim.restart))


def agent_restarted(trial: Trial, phase: Phase, *, new_disk: bool) -> None:
    def back() -> None:
        if new_disk:
            trial.disk.lose()
        trial.victim.restart()

    _strike_agent(trial, phase, lambda: trial.after(MOMENT_S, back))


def agent_hit(
    trial: Trial, phase: Phase, *, begin: Callable[[Trial], object], end: Callable[[Trial], object]
) -> None:
    def strike() -> None:
        begin(trial)
        trial.when_gone_on(lambda: end(trial))

    trial.at_device(phase, strike)


# -- the coordinator ------------------------------------------------------------------------------


def coordinator_killed(trial: Trial, phase: Phase, *, away_s: float) -> None:
    """Kill it; at *aggregating* before it writes the round down, at *checkpointing* after that."""
    coordinator = trial.fleet.coordinator

    def die() -> None:
        trial.after(away_s, coordinator.restart)
        raise Killed

    def kill() -> None:
        coordinator.kill()
        trial.after(away_s, coordinator.restart)

    if phase in ("aggregating", "checkpointing"):
        trial.in_store("save:before" if phase == "aggregating" else "save:after", STRUCK, die)
    else:
        trial.at_server(phase, kill)


def hit_for(
    trial: Trial,
    phase: Phase,
    *,
    seconds: float,
    begin: Callable[[Trial], object],
    end: Callable[[Trial], object],
) -> None:
    """Something at the coordinator or the broker, for a while."""

    def strike() -> None:
        begin(trial)
        trial.after(seconds, lambda: end(trial))

    trial.at_server(phase, strike)


def _cut_all_off(trial: Trial) -> None:
    for process in trial.fleet.processes:
        process.partition()


def _heal_all(trial: Trial) -> None:
    for process in trial.fleet.processes:
        process.heal()


def _slow_broker(trial: Trial, service_s: float) -> None:
    trial.fleet.broker.service_s = service_s


MADE = QUOTA // 2
"""Batches that the victim has made of the round when it is hit in its middle."""
KNOWN = MADE - 1
"""Those of them that the server has trained on: the last is not on its way yet."""
UNANSWERED = UNSURE * len(CUTS)
"""Test images about which the devices ask in all."""

# A device that is gone: its round waits for it until the deadline, then closes with the others. Its
# last will keeps it out of the next if that has come by then (killed: after 45 s; frozen or cut
# off: after 90 s, too late). The work of a killed device is lost with its memory.
AGENTS = [
    Fault(
        "agent killed",
        agent_killed,
        lasts_s=100,
        outcomes={
            "joining": Outcome(missed={"d1": (1, 2)}, produced=ALL - 2 * QUOTA),
            "mid-round": Outcome(
                missed={"d1": (2, 3)},
                produced=ALL - (QUOTA - KNOWN) - QUOTA,
                unfolded=KNOWN,
                late={"not_brought": KNOWN},
            ),
            "aggregating": Outcome(
                missed={"d1": (2, 3)},
                produced=ALL - QUOTA,
                unfolded=QUOTA,
                late={"not_brought": QUOTA},
            ),
            "checkpointing": Outcome(missed={"d1": (3, 4)}, produced=ALL - 2 * QUOTA),
            "offloading": Outcome(silent=("d1",)),
        },
    ),
    Fault(
        "agent frozen",
        partial(agent_hit, begin=lambda t: t.victim.freeze(), end=lambda t: t.victim.thaw()),
        lasts_s=100,
        outcomes={
            "joining": Outcome(missed={"d1": (1,)}, produced=ALL - QUOTA),
            # What was out when it froze is overdue when it wakes; the rest it brings late.
            "mid-round": Outcome(
                produced=ALL - (QUOTA - MADE),
                expired=MADE - KNOWN,
                late={"folded": KNOWN},
                timeouts=WINDOW,
            ),
            "aggregating": NOTHING,  # its upload is on its way
            "checkpointing": Outcome(missed={"d1": (3,)}, produced=ALL - QUOTA),
            "offloading": Outcome(silent=("d1",)),
        },
    ),
    # It joins again and goes on at the next number, in every phase.
    Fault(
        "agent restarted",
        partial(agent_restarted, new_disk=False),
        lasts_s=1,
        outcomes=dict.fromkeys(PHASES, NOTHING),
    ),
    Fault(
        "agent restarted, disk lost",
        partial(agent_restarted, new_disk=True),
        lasts_s=1,
        outcomes=dict.fromkeys(PHASES, NOTHING),
    ),
    Fault(
        "agent partitioned",
        partial(agent_hit, begin=lambda t: t.victim.partition(), end=lambda t: t.victim.heal()),
        lasts_s=100,
        outcomes={
            "joining": Outcome(missed={"d1": (1,)}, produced=ALL - QUOTA),
            # It goes on until it notices, a window of batches each time that the last has timed
            # out; at its return there is one more, before it hears that the round is over.
            "mid-round": Outcome(
                expired=QUOTA - KNOWN, late={"folded": KNOWN}, timeouts=2 * WINDOW
            ),
            "aggregating": Outcome(late={"folded": QUOTA}),
            "checkpointing": Outcome(missed={"d1": (3,)}, produced=ALL - QUOTA),
            "offloading": Outcome(silent=("d1",)),
        },
    ),
    # It misses the deadline, and what it has made by then is folded in late.
    Fault(
        "agent slowed",
        partial(agent_hit, begin=lambda t: t.victim.slow(LAZY), end=lambda t: t.victim.slow(1)),
        lasts_s=100,
        outcomes={
            "joining": Outcome(produced=ALL - (QUOTA - 6), late={"folded": 6}),
            "mid-round": Outcome(late={"folded": QUOTA}),
            "aggregating": NOTHING,
            "checkpointing": Outcome(produced=ALL - (QUOTA - 6), late={"folded": 6}),
            "offloading": NOTHING,
        },
    ),
]

# A round that was interrupted is made again, as its next attempt; one that was written down is not.
AGAIN: dict[Phase, Outcome] = {
    "joining": Outcome(attempts=(1, 0, 0, 0)),
    "mid-round": Outcome(attempts=(0, 1, 0, 0), timeouts=WINDOW * len(CUTS)),
    "aggregating": Outcome(attempts=(0, 1, 0, 0)),
    "checkpointing": NOTHING,
    "offloading": NOTHING,
}
# A coordinator's deadlines stand still while it has no connection. One that was frozen wakes up
# behind its deadline, below quorum, and extends the round. Devices stop when they are told that it
# is gone, after 45 s: till then a window of each times out twice.
COORDINATOR = [
    Fault(
        "coordinator killed",
        partial(coordinator_killed, away_s=AWAY_S),
        lasts_s=AWAY_S,
        outcomes=AGAIN,
    ),
    Fault(
        "coordinator frozen",
        partial(
            hit_for,
            seconds=AWAY_S,
            begin=lambda t: t.fleet.coordinator.freeze(),
            end=lambda t: t.fleet.coordinator.thaw(),
        ),
        lasts_s=AWAY_S,
        outcomes={
            "joining": Outcome(extended=1),
            "mid-round": Outcome(extended=1, timeouts=2 * WINDOW * len(CUTS)),
            "aggregating": Outcome(extended=1),
            "checkpointing": Outcome(extended=1),
            "offloading": Outcome(fallbacks=UNANSWERED),
        },
    ),
    Fault(
        "coordinator restarted",
        partial(coordinator_killed, away_s=MOMENT_S),
        lasts_s=1,
        outcomes=AGAIN | {"mid-round": Outcome(attempts=(0, 1, 0, 0))},
    ),
    Fault(
        "coordinator partitioned",
        partial(
            hit_for,
            seconds=AWAY_S,
            begin=lambda t: t.fleet.coordinator.partition(),
            end=lambda t: t.fleet.coordinator.heal(),
        ),
        lasts_s=AWAY_S,
        outcomes={
            "joining": NOTHING,
            "mid-round": Outcome(timeouts=2 * WINDOW * len(CUTS)),
            "aggregating": NOTHING,
            "checkpointing": NOTHING,
            "offloading": Outcome(fallbacks=UNANSWERED),
        },
    ),
    Fault(
        "coordinator slowed",
        partial(
            hit_for,
            seconds=AWAY_S,
            begin=lambda t: t.fleet.coordinator.slow(100),
            end=lambda t: t.fleet.coordinator.slow(1),
        ),
        lasts_s=AWAY_S,
        outcomes=dict.fromkeys(PHASES, NOTHING),
    ),
]

BROKER = [
    Fault(
        "broker killed",
        partial(
            hit_for,
            seconds=AWAY_S,
            begin=lambda t: t.fleet.broker.kill(),
            end=lambda t: t.fleet.broker.restart(keep_sessions=False),
        ),
        lasts_s=AWAY_S,
        outcomes={
            "joining": NOTHING,
            # What was out when it died is given up after 30 s, at most a window of each device.
            "mid-round": Outcome(expired=2, timeouts=WINDOW * len(CUTS)),
            "aggregating": NOTHING,
            "checkpointing": NOTHING,
            "offloading": Outcome(fallbacks=UNANSWERED),
        },
    ),
    # It keeps what it has taken: nothing is lost, only late.
    Fault(
        "broker frozen",
        partial(
            hit_for,
            seconds=AWAY_S,
            begin=lambda t: t.fleet.broker.freeze(),
            end=lambda t: t.fleet.broker.thaw(),
        ),
        lasts_s=AWAY_S,
        outcomes={
            "joining": NOTHING,
            "mid-round": Outcome(timeouts=2 * WINDOW * len(CUTS)),
            "aggregating": NOTHING,
            "checkpointing": NOTHING,
            "offloading": Outcome(fallbacks=UNANSWERED),
        },
    ),
    # Everybody is back within seconds and says again what is out, but for questions about images:
    # the four that each device has open, of four unsure images each, time out.
    Fault(
        "broker restarted",
        partial(
            hit_for,
            seconds=MOMENT_S,
            begin=lambda t: t.fleet.broker.kill(),
            end=lambda t: t.fleet.broker.restart(keep_sessions=True),
        ),
        lasts_s=1,
        outcomes=dict.fromkeys(PHASES, NOTHING)
        | {"offloading": Outcome(fallbacks=4 * OPEN_QUESTIONS * len(CUTS))},
    ),
    # As when it is frozen, but what is sent meanwhile is lost: what times out has expired.
    Fault(
        "broker partitioned",
        partial(
            hit_for,
            seconds=AWAY_S,
            begin=_cut_all_off,
            end=_heal_all,
        ),
        lasts_s=AWAY_S,
        outcomes={
            "joining": NOTHING,
            "mid-round": Outcome(expired=11, timeouts=2 * WINDOW * len(CUTS)),
            "aggregating": NOTHING,
            "checkpointing": NOTHING,
            "offloading": Outcome(fallbacks=UNANSWERED),
        },
    ),
    Fault(
        "broker slowed",
        partial(
            hit_for,
            seconds=AWAY_S,
            begin=lambda t: _slow_broker(t, 0.1),
            end=lambda t: _slow_broker(t, 0.0),
        ),
        lasts_s=AWAY_S,
        outcomes=dict.fromkeys(PHASES, NOTHING),
    ),
]

FAULTS = AGENTS + COORDINATOR + BROKER
