"""A small simulated fleet, the instants at which faults begin, and what a run came to."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from broker.drive import INBOX
from coordinator.observer import Observer
from edge_agent.phases import Phase as Doing
from edge_agent.snapshots import Snapshot
from ops.simulator import Device, DeviceCost, LinkProfile, Process, ServerCost, SimulatedFleet
from ops.simulator.programs import RUN
from ops.simulator.stub import Disk
from tests.tiny import make_settings

Phase = Literal["joining", "mid-round", "aggregating", "checkpointing", "offloading"]
PHASES: tuple[Phase, ...] = ("joining", "mid-round", "aggregating", "checkpointing", "offloading")
Act = Callable[[], object]

SEED = 4
CUTS = {"d0": 2, "d1": 4, "d2": 3}
VICTIM = "d1"
"""The device to which things happen; the slowest, so that a round closes with its upload."""
ROUNDS, QUOTA, BATCH, WINDOW = 4, 8, 8, 2
STRUCK = 2
"""The round in which things happen."""
DEADLINE_S, GRADIENT_S = 60.0, 30.0
TEST_IMAGES, OPEN_QUESTIONS = 64, 4
UNSURE = TEST_IMAGES // 2
"""Images of a device about which it asks the server."""
ALL = ROUNDS * QUOTA * len(CUTS)
"""Batches that a run makes."""
UNTROUBLED_S = 24.0
"""Virtual seconds that a run takes at most in which nothing happens."""
NOTICED_S, BACK_OFF_S, WILL_S = 45.0, 30.0, 45.0
"""Silence until a connection is given up, between two tries to connect, until the last will."""


@dataclass(frozen=True)
class Outcome:
    """What a run came to; the defaults are those of a run in which nothing happened."""

    attempts: tuple[int | None, ...] = (0,) * ROUNDS
    """Of each round, the attempt that closed; None if the round was abandoned."""
    extended: int = 0
    missed: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Closed rounds of which a device brought nothing, neither in time nor later."""
    produced: int = ALL
    """Batches that the coordinator knows of, in attempts that closed."""
    discarded: Mapping[str, int] = field(default_factory=dict)
    """Of those, by reason."""
    expired: int = 0
    """Of those."""
    late: Mapping[str, int] = field(default_factory=dict)
    """Batches whose work came after their round, by what became of it."""
    unfolded: int = 0
    """Batches that the server trained on in attempts that closed, and that are in no model."""
    left_out: int = 0
    """Uploads that could not be used."""
    timeouts: int = 0
    """Batches whose answer a device did not wait for any longer; expected are at most so many."""
    fallbacks: int = 0
    """Test images that the server was asked about and the exit answered after all."""
    silent: tuple[str, ...] = ()
    """Devices whose answers to the test images the coordinator does not know."""
    failures: int = 0
    """Times that a process ended with an error."""

    def without_rounds(self) -> Outcome:
        """What of it means something where devices do not wait for each other."""
        return replace(self, missed={}, produced=ALL, late={}, unfolded=0)


NOTHING = Outcome()


class Watcher(Observer):
    """What of a run is not in its books."""

    def __init__(self) -> None:
        self.opened: list[tuple[int, int]] = []
        self.late: Counter[str] = Counter()

    def round_opened(self, number: int, rounds: int, attempt: int, quota: int) -> None:
        self.opened.append((number, attempt))

    def late_work(self, outcome: str, samples: int) -> None:
        self.late[outcome] += samples // BATCH


class WatchedDisk(Disk):
    """A device's disk that says what it is about to keep."""

    def __init__(self) -> None:
        super().__init__()
        self.saving: Callable[[int], object] = lambda version: None

    def save(self, run: str, cut: int, version: int, snapshot: Snapshot) -> None:
        self.saving(version)
        super().save(run, cut, version, snapshot)


class Trial:
    """A fleet of three, and what is done to it."""

    def __init__(self, folder: Path, *, seed: int, **settings: Any) -> None:
        print(f"seed {seed}")  # noqa: T201 pytest shows it if the test fails
        self.watcher = Watcher()
        self.most_out = 0
        self.struck = False
        fields: dict[str, Any] = {
            "state_dir": folder,
            "rounds": ROUNDS,
            "batches_per_round": QUOTA,
            "batch_size": BATCH,
            "min_devices": len(CUTS),
            "window": WINDOW,
            "codec": "int8",
            "round_deadline_s": DEADLINE_S,
            "deadline_mads": None,
            "gradient_timeout_s": GRADIENT_S,
            "inference": True,
        }
        self.fleet = SimulatedFleet(
            make_settings(**(fields | settings)),
            [
                Device(
                    name,
                    cut=cut,
                    link=LinkProfile(1e6, 1e6, latency_s=0.02),
                    cost=DeviceCost(forward_s=0.05, backward_s=0.1),
                    test_samples=TEST_IMAGES,
                )
                for name, cut in CUTS.items()
            ],
            seed=seed,
            server=ServerCost(step_s=0.002, merge_s=0.1),
            restart_s=10.0,
            observer=self.watcher,
        )
        self.disk = WatchedDisk()
        self.fleet.programs[VICTIM].disk = self.disk
        self.fleet.when(self._watch, lambda: None)

    # -- who and when -----------------------------------------------------------------------------

    @property
    def victim(self) -> Process:
        return self.fleet.agents[VICTIM]

    def after(self, seconds: float, action: Act) -> None:
        self.fleet.world.after(seconds, lambda: _do(action))

    def strike(self, action: Act) -> None:
        """Do what happens to the fleet."""
        self.struck = True
        action()

    def when(self, happens: Callable[[], bool], action: Act) -> None:
        """Strike when something is so."""
        self.fleet.when(happens, lambda: self.strike(action))

    def at_device(self, phase: Phase, action: Act) -> None:
        """When the victim has asked to join round 1; has made half of its batches; has sent its
        upload; has written down the next version; has asked about test images."""
        if phase == "checkpointing":
            self.in_device_disk(lambda: self.after(0.0, action))
        else:
            happens = _INSTANTS[phase]
            self.when(lambda: happens(self), action)

    def in_device_disk(self, action: Act) -> None:
        """When the victim is about to write down what round 2 came to."""

        def saving(version: int) -> None:
            if version == STRUCK:
                self.disk.saving = lambda version: None
                self.strike(action)

        self.disk.saving = saving

    def at_server(self, phase: Phase, action: Act) -> None:
        """As at the device, but: when the coordinator is merging; has written the round down."""
        if phase in ("aggregating", "checkpointing"):
            event = "save:before" if phase == "aggregating" else "save:after"
            self.in_store(event, STRUCK, lambda: self.after(0.0, action))
        else:
            self.at_device(phase, action)

    def in_store(self, event: str, number: int, action: Act) -> None:
        """In the midst of the step in which the coordinator's store says ``event`` for the
        ``number``-th time."""
        seen = 0

        def told(happens: str) -> None:
            nonlocal seen
            seen += happens == event
            if happens == event and seen == number:
                self.strike(action)

        self.fleet.on_store = told

    def when_gone_on(self, action: Act) -> None:
        """A second after the fleet has begun another round; after 100 s if it does not."""
        opened = len(self.watcher.opened)
        waiting = [action]

        def once() -> None:
            if waiting:
                waiting.pop()()

        self.fleet.when(lambda: len(self.watcher.opened) > opened, lambda: self.after(1.0, once))
        self.after(100.0, once)

    # -- running ----------------------------------------------------------------------------------

    def run(self, *, within_s: float) -> Outcome:
        """To the end, which must come in time; then what always holds, and what it came to."""
        self.fleet.run(limit_s=within_s)
        self.check()
        return self.outcome()

    def check(self) -> None:
        """What holds whatever happened."""
        fleet, most_out = self.fleet, self.fleet.settings.window
        fleet.books().check()
        assert fleet.broker.dropped == 0
        assert self.most_out <= most_out
        # Of each device: its credits, two uploads, and hello, status, requests and report, twice.
        assert fleet.broker.most_queued <= len(CUTS) * (most_out + 2 + 10)
        for process in fleet.processes:
            assert process.tally.most_inbox <= INBOX + 2, process.name

    def outcome(self) -> Outcome:
        fleet, books = self.fleet, self.fleet.books()
        history = {record["round"]: record for record in fleet.checkpoint().history}
        missed = {
            name: tuple(n for n in history if not _brought(history[n], name)) for name in CUTS
        }
        answers = self._answers()
        totals = books.totals()
        return Outcome(
            attempts=tuple(
                history[n]["attempt"] if n in history else None for n in range(1, ROUNDS + 1)
            ),
            extended=fleet.witnesses.outcomes["extended"],
            missed={name: rounds for name, rounds in missed.items() if rounds},
            produced=totals["produced"],
            discarded=totals["discarded"],
            expired=totals["expired"],
            late=dict(self.watcher.late),
            unfolded=totals["applied"] - books.in_model,
            left_out=fleet.witnesses.dropped["bad_parameters"],
            timeouts=sum(report.timeouts for report in fleet.reports.values()),
            fallbacks=sum(a["refused"] + a["timeouts"] for a in answers.values()),
            silent=tuple(name for name in CUTS if name not in answers),
            failures=sum(len(process.tally.failures) for process in fleet.processes),
        )

    def _answers(self) -> dict[str, dict[str, int]]:
        path = self.fleet.settings.state_dir / RUN / "result.json"
        devices = json.loads(path.read_text("utf-8"))["devices"]
        return {d["device"]: d["inference"] for d in devices if d["inference"]}

    def _watch(self) -> bool:
        for process in self.fleet.agents.values():
            attempt = getattr(process.machine, "attempt", None)
            if attempt is not None:
                self.most_out = max(self.most_out, attempt.out)
        return False


def _do(action: Act) -> None:
    action()


def _brought(record: dict[str, Any], device: str) -> bool:
    return bool(record["devices"].get(device, {}).get("finished", False))


def _doing(trial: Trial, doing: Doing, number: int = 0) -> bool:
    """Whether the victim does this since round ``number`` was announced, or a later one."""
    if not trial.victim.alive:
        return False
    core = trial.fleet.agent(VICTIM)
    announced = core._round.round if core._round is not None else 0
    return core.phase is doing and announced >= number


def _half_way(trial: Trial) -> bool:
    if not _doing(trial, Doing.TRAINING, STRUCK):
        return False
    attempt = trial.fleet.agent(VICTIM).attempt
    return attempt is not None and attempt.produced == QUOTA // 2


def _asking(trial: Trial) -> bool:
    if not _doing(trial, Doing.ANSWERING):
        return False
    inference = trial.fleet.agent(VICTIM)._inference
    return inference is not None and inference.deadline is not None


_INSTANTS: dict[str, Callable[[Trial], bool]] = {
    "joining": lambda trial: _doing(trial, Doing.ENTERING),
    "mid-round": _half_way,
    "aggregating": lambda trial: _doing(trial, Doing.FINISHING, STRUCK),
    "offloading": _asking,
}
