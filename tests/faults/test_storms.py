"""What is said to all is not answered by all, again and again."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from broker.envelopes import Envelope
from broker.messages import Request
from edge_agent.phases import Phase
from ops.simulator import Device, Fault, LinkProfile, SimulatedFleet
from tests.faults.trial import SEED
from tests.tiny import make_settings

DEVICES, COPIES_LOG2, FROZEN_S = 20, 4, 10.0
CONNECTED_S = 0.09
"""When all have heard that the fleet gathers, and no round has been announced."""


def test_an_announcement_that_comes_again_is_not_answered_again(tmp_path: Path) -> None:
    """Every join to a round that is over calls one forth, to everybody."""
    joins: Counter[float] = Counter()

    def watch(envelope: Envelope) -> None:
        if isinstance(envelope.message, Request) and envelope.message.what == "join":
            joins[fleet.world.now] += 1

    fleet = SimulatedFleet(
        make_settings(state_dir=tmp_path, min_devices=DEVICES, rounds=1, batches_per_round=1),
        [Device(f"d{i}", cut=2, link=LinkProfile(latency_s=0.02)) for i in range(DEVICES)],
        seed=SEED,
        watch=watch,
    )
    for _ in range(COPIES_LOG2):
        fleet.faults.add(
            Fault("duplicate", kind="round", way="down", start=CONNECTED_S, delay_s=0.4)
        )

    def freeze() -> None:
        fleet.coordinator.freeze()
        fleet.world.after(FROZEN_S, fleet.coordinator.thaw)

    fleet.when(lambda: fleet.agents["d0"].alive and _is_entering(fleet), freeze)
    fleet.run(limit_s=120)
    fleet.books().check()
    # A question is said at once, and again after 2 s and 4 s more.
    assert sum(joins.values()) == 3 * DEVICES


def _is_entering(fleet: SimulatedFleet) -> bool:
    return fleet.agent("d0").phase is Phase.ENTERING
