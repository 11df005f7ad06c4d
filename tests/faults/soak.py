"""Rounds and rounds in which everything happens that can, at times drawn from a seed."""

from __future__ import annotations

import gc
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

from broker.drive import INBOX
from coordinator.errors import StoreError
from coordinator.rounds import FILL
from edge_agent.core import AgentCore
from ops.simulator import (
    Device,
    DeviceCost,
    Fault,
    Killed,
    LinkProfile,
    Process,
    ServerCost,
    SimulatedFleet,
)
from ops.simulator.faults import Action
from tests.faults.trial import Act, Watcher
from tests.tiny import make_settings

DEVICES = 8
QUOTA, WINDOW = 8, 4
EVERY_S = 10.0
"""Mean time between two faults; one lasts a minute on average, so there are several at once."""
LONGEST_S = 120.0
ROUND_S = 60.0
"""So long for each round, at most, things happen; then it must end by itself."""
QUIET_S = 30.0
"""For each round and then; the first has to wait for devices that are still to come back."""
FORGOTTEN = re.compile(r"d\d (says|has) \d+ applied")
ACTIONS: Sequence[Action] = ("lose", "duplicate", "reorder", "truncate", "flip", "late")


class Soak:
    """A fleet of eight, cuts mixed, on links that jitter and lose, and its misfortunes."""

    def __init__(self, folder: Path, *, seed: int, rounds: int, **settings: Any) -> None:
        self.rounds = rounds
        self.calm = False
        self.happened: Counter[str] = Counter()
        self.watcher = Watcher()
        self.weights: dict[int, int] = {}
        """Round → objects that its machines held when it began."""
        self.most_out = 0
        rng = random.Random(f"soak/{seed}")
        self._rng = rng
        self._barrier = settings.get("aggregation") != "buffered"
        fields: dict[str, Any] = {
            "state_dir": folder,
            "rounds": rounds,
            "batches_per_round": QUOTA,
            "min_devices": DEVICES,
            "max_devices": DEVICES,
            "window": WINDOW,
            "codec": "int8",
            "round_deadline_s": 60.0,
            "gradient_timeout_s": 10.0,
        }
        self.fleet = SimulatedFleet(
            make_settings(**(fields | settings)),
            [
                Device(
                    f"d{i}",
                    cut=rng.choice((2, 3, 4, 5)),
                    link=LinkProfile(1e6, 1e6, latency_s=0.02, jitter_s=0.01, loss=0.01),
                    cost=DeviceCost(0.02, 0.04),
                    settings={"offline_batches": 4, "offline_expiry_s": 60.0},
                )
                for i in range(DEVICES)
            ],
            seed=seed,
            server=ServerCost(step_s=0.002, merge_s=0.05),
            restart_s=5.0,
            observer=self.watcher,
        )
        self.fleet.poisoned = lambda device, batch: self._happens("NaN features", 0.002)
        self.fleet.on_store = self._store
        self.fleet.when(self._watch, lambda: None)
        self._full_until = 0.0
        self._next()

    def run(self) -> None:
        """Through all that happens, then to the end in bounded time; then what always holds."""
        fleet = self.fleet
        fleet.world.after(ROUND_S * self.rounds, self._calm_down)
        fleet.when(lambda: self._last_round, self._calm_down)
        fleet.run(
            until=lambda: self._over, limit_s=(ROUND_S + QUIET_S) * self.rounds + 5 * LONGEST_S
        )
        self._check_books()
        outcomes = fleet.witnesses.outcomes
        # A round that was written down just before a crash has closed without anybody hearing it.
        closed = len(fleet.checkpoint().history)
        assert outcomes["closed"] <= closed <= outcomes["closed"] + self.happened["crash"]
        assert closed + outcomes["abandoned"] >= self.rounds
        assert fleet.broker.dropped == 0
        assert fleet.broker.most_queued <= FILL * fleet.settings.queue_chunks
        assert self.most_out <= WINDOW
        for process in fleet.processes:
            assert process.tally.most_inbox <= INBOX + 2, process.name

    @property
    def figures(self) -> dict[str, Any]:
        """What it came to."""
        totals = self.fleet.books().totals()
        lost = totals["expired"] + sum(totals["discarded"].values())
        return {
            "rounds": len(self.fleet.checkpoint().history),
            "abandoned": self.fleet.witnesses.outcomes["abandoned"],
            "faults": sum(self.happened.values()) + sum(self.fleet.faults.counts.values()),
            "produced": totals["produced"],
            "applied": totals["applied"],
            "lost": lost,
        }

    def _calm_down(self) -> None:
        self.calm = True
        self.fleet.on_store = lambda event: None
        self.fleet.poisoned = lambda device, batch: False
        self.fleet.faults.clear()

    def _check_books(self) -> None:
        problems = self.fleet.books().problems
        if not self._barrier and self.fleet.coordinator.tally.lives > 1:
            # Legs of closed versions that were under way when it died: the record has what had
            # been written down.
            problems = [problem for problem in problems if not FORGOTTEN.search(problem)]
        assert not problems, "\n".join(problems)

    # -- what happens -----------------------------------------------------------------------------

    def _next(self) -> None:
        self.fleet.world.after(self._rng.expovariate(1 / EVERY_S), self._strike)

    def _strike(self) -> None:
        if self.calm:
            return
        kinds = [self._agent] * 6 + [self._coordinator] * 2 + [self._broker, self._message] * 2
        self._rng.choice(kinds)()
        self._next()

    def _for_a_while(self, name: str, begin: Callable[[], object], end: Act) -> None:
        self.happened[name] += 1
        begin()
        self.fleet.world.after(self._rng.uniform(0.1, LONGEST_S), lambda: _do(end))

    def _agent(self) -> None:
        name = self._rng.choice(sorted(self.fleet.agents))
        self._process("agent", self.fleet.agents[name])
        disk = self.fleet.programs[name].disk
        if self._happens("agent's disk lost", 0.1):
            disk.lose()
        disk.full = self._happens("agent's disk full", 0.1)

    def _coordinator(self) -> None:
        self._process("coordinator", self.fleet.coordinator)
        if self._happens("disk full", 0.1):
            self._full_until = self.fleet.world.now + self._rng.uniform(1.0, 30.0)

    def _process(self, who: str, process: Process) -> None:
        def back() -> None:
            if not process.alive and not process.over:
                process.start()

        match self._rng.randrange(6):
            case 0:
                power_cut = self._rng.random() < 0.5
                self._for_a_while(f"{who} killed", lambda: process.kill(power_cut=power_cut), back)
            case 1:
                self._for_a_while(f"{who} frozen", process.freeze, process.thaw)
            case 2:
                self._for_a_while(f"{who} cut off", process.partition, process.heal)
            case 3:
                slow = self._rng.uniform(2.0, 50.0)
                self._for_a_while(
                    f"{who} slowed", lambda: process.slow(slow), lambda: process.slow(1.0)
                )
            case 4:
                self.happened[f"{who}'s clock jumps"] += 1
                process.jump_clock(self._rng.uniform(1.0, 1000.0))
            case 5:
                self.happened[f"{who} restarted"] += 1
                if not process.over:
                    process.restart()

    def _broker(self) -> None:
        broker = self.fleet.broker
        if not broker.alive or broker.frozen:
            return
        kept = self._rng.random() < 0.5
        match self._rng.randrange(3):
            case 0:
                self._for_a_while(
                    "broker killed", broker.kill, lambda: broker.restart(keep_sessions=kept)
                )
            case 1:
                self._for_a_while("broker frozen", broker.freeze, broker.thaw)
            case 2:
                self._for_a_while(
                    "broker slowed",
                    lambda: setattr(broker, "service_s", self._rng.uniform(0.001, 0.01)),
                    lambda: setattr(broker, "service_s", 0.0),
                )

    def _message(self) -> None:
        now = self.fleet.world.now
        self.fleet.faults.active = [f for f in self.fleet.faults.active if f.end > now]
        fault = Fault(
            self._rng.choice(ACTIONS),
            start=now,
            end=now + self._rng.uniform(1.0, LONGEST_S),
            share=self._rng.uniform(0.01, 0.2),
            delay_s=self._rng.uniform(0.1, 30.0),
        )
        self.fleet.faults.add(fault)

    def _store(self, event: str) -> None:
        self._diverge()
        if event.endswith(":before") and self.fleet.world.now < self._full_until:
            raise StoreError("cannot write: no space left on device")
        if self._happens("crash", 0.02):
            self.fleet.world.after(self._rng.uniform(0.1, 60.0), self._restart_coordinator)
            raise Killed

    def _restart_coordinator(self) -> None:
        if not self.fleet.coordinator.alive:
            self.fleet.coordinator.start()

    def _diverge(self) -> None:
        diverging = self.fleet.witnesses.diverging
        diverging.clear()
        if self._happens("server's loss NaN", 0.1):
            name = self._rng.choice(sorted(self.fleet.agents))
            number = len(self.watcher.opened) and self.watcher.opened[-1][0]
            diverging.update((name, number * QUOTA + batch) for batch in range(2))

    def _happens(self, name: str, share: float) -> bool:
        happens = self._rng.random() < share
        self.happened[name] += happens
        return happens

    # -- what is watched --------------------------------------------------------------------------

    @property
    def _last_round(self) -> bool:
        opened = self.watcher.opened
        return bool(opened) and opened[-1][0] >= self.rounds

    @property
    def _over(self) -> bool:
        """Coordinator and devices are, but for one that was away and finds only the end."""
        agents = [process for process in self.fleet.agents.values() if not process.over]
        return self.fleet.coordinator.over and all(
            isinstance(agent.machine, AgentCore) and agent.machine._assignment is None
            for agent in agents
        )

    def _watch(self) -> bool:
        for process in self.fleet.agents.values():
            attempt = getattr(process.machine, "attempt", None)
            if attempt is not None:
                self.most_out = max(self.most_out, attempt.out)
        number = self.watcher.opened[-1][0] if self.watcher.opened else 0
        if number not in self.weights and self.fleet.coordinator.alive:
            self.weights[number] = self.weigh()
        return False

    def weigh(self) -> int:
        """Objects that coordinator and devices hold, the record of the rounds left out."""
        fleet = self.fleet
        machines = [process.machine for process in fleet.processes if process.machine is not None]
        history = fleet.core._run.standing().records if fleet.coordinator.machine else []
        outside = [fleet, self, fleet.world, fleet.broker, fleet.witnesses, self.watcher, history]
        outside += [*fleet.programs.values(), *fleet.processes]
        return _reachable(machines, outside)


def _do(action: Act) -> None:
    action()


def _reachable(roots: Sequence[object], outside: Sequence[object]) -> int:
    seen = {id(thing) for thing in outside}
    waiting, count = [root for root in roots if id(root) not in seen], 0
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, type | ModuleType | BuiltinFunctionType):
            continue
        seen.add(id(thing))
        count += 1
        if isinstance(thing, FunctionType):
            waiting += [cell.cell_contents for cell in thing.__closure__ or ()]
        else:
            waiting += gc.get_referents(thing)
    return count
