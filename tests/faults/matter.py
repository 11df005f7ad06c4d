"""Full disks, clocks that jump, numbers that are none; and what comes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from torch import Tensor

from broker.messages import Assignment
from coordinator.errors import StoreError
from edge_agent.learning import Learner
from ops.simulator.stub import Array, State, StubLearner, StubPredictor
from ops.simulator.stub_server import StubResponder
from tests.faults.fault import Fault
from tests.faults.trial import (
    ALL,
    CUTS,
    NOTHING,
    PHASES,
    QUOTA,
    STRUCK,
    VICTIM,
    WINDOW,
    Outcome,
    Phase,
    Trial,
)

FULL_S = 30.0
JUMP_S = 1000.0
WEIGHT = "blocks.0.weight"


def device_disk_full(trial: Trial, phase: Phase) -> None:
    def fill() -> None:
        trial.disk.full = True

    if phase == "checkpointing":
        trial.in_device_disk(fill)
    else:
        trial.at_device(phase, fill)


def coordinator_disk_full(trial: Trial, phase: Phase) -> None:
    """Of what it wants to write down nothing is, for a while."""

    def refuse(event: str) -> None:
        if event.endswith(":before"):
            raise StoreError("cannot write: no space left on device")

    def fill() -> None:
        trial.fleet.on_store = refuse
        trial.after(FULL_S, lambda: setattr(trial.fleet, "on_store", lambda event: None))

    if phase == "aggregating":

        def refuse_at_once() -> None:
            fill()
            refuse("save:before")

        trial.in_store("save:before", STRUCK, refuse_at_once)
    elif phase == "checkpointing":
        trial.in_store("save:after", STRUCK, fill)
    else:
        trial.at_device(phase, fill)


def device_clock_jumps(trial: Trial, phase: Phase) -> None:
    trial.at_device(phase, lambda: trial.victim.jump_clock(JUMP_S))


def coordinator_clock_jumps(trial: Trial, phase: Phase) -> None:
    trial.at_server(phase, lambda: trial.fleet.coordinator.jump_clock(JUMP_S))


def laptop_suspended(trial: Trial, phase: Phase) -> None:
    """Frozen, and its monotonic clock stands still meanwhile."""

    def suspend() -> None:
        began = trial.fleet.world.now
        trial.victim.freeze()

        def wake() -> None:
            trial.victim.jump_clock(began - trial.fleet.world.now)
            trial.victim.thaw()

        trial.when_gone_on(wake)

    trial.at_device(phase, suspend)


class _Sick:
    """What the victim's next forward pass or upload is."""

    features = upload = False


class _SickPredictor(StubPredictor):
    def __init__(self, sick: _Sick) -> None:
        self._sick = sick

    def predict(self, images: Array) -> tuple[Array, Array]:
        features, probabilities = super().predict(images)
        if self._sick.features:
            self._sick.features = False
            features = np.full_like(features, np.nan)
        return features, probabilities


class _SickLearner(StubLearner):
    def __init__(self, cut: int, sick: _Sick) -> None:
        self._sick = _Sick()
        super().__init__(cut, self._is_sick)
        self._sick = sick

    def load(self, state: Mapping[str, Array]) -> None:
        sick, self._sick = self._sick, _Sick()
        super().load(state)
        self._sick = sick

    def state(self) -> State:
        state = super().state()
        if self._sick.upload:
            self._sick.upload = False
            state[WEIGHT] = np.full_like(state[WEIGHT], np.nan)
        return state

    def predictor(self) -> StubPredictor:
        return _SickPredictor(self._sick)

    def _is_sick(self, batch: int) -> bool:
        sick, self._sick.features = self._sick.features, False
        return sick


def device_sick(trial: Trial, phase: Phase, *, what: str) -> None:
    state = _Sick()
    program = trial.fleet.programs[VICTIM]

    def learner(assignment: Assignment) -> Learner:
        assert assignment.cut is not None
        program.cut = assignment.cut
        return _SickLearner(assignment.cut, state)

    program.learner = learner  # type: ignore[method-assign]
    trial.at_device(phase, lambda: setattr(state, what, True))


def server_diverges(trial: Trial, phase: Phase) -> None:
    """The loss of the next batch that the victim makes; or the answer to its next question."""

    def strike() -> None:
        if phase == "offloading":
            trial.fleet.core.answering._network = _DivergingOnce()
            return
        attempt = trial.fleet.agent(VICTIM).attempt
        if attempt is None:
            position = QUOTA * (0 if phase == "joining" else STRUCK)
        else:
            position = QUOTA * (attempt.stamp[1] - 1) + attempt.produced
        trial.fleet.witnesses.diverging.add((VICTIM, position))

    trial.at_device(phase, strike)


class _DivergingOnce(StubResponder):
    def __init__(self) -> None:
        self._diverges = True

    def answer(self, version: int, questions: Sequence[tuple[int, Tensor]]) -> list[Array]:
        answers, diverges = super().answer(version, questions), self._diverges
        self._diverges = False
        return [np.full_like(answer, np.nan) for answer in answers] if diverges else answers


UNTOUCHED: Mapping[Phase, Outcome] = dict.fromkeys(PHASES, NOTHING)
QUESTION = 4
"""Images in one question."""

FAULTS = [
    Fault("disk full: device", device_disk_full, lasts_s=0, outcomes=UNTOUCHED),
    # It ends, and is started again every 10 s until there is room, three times: the round is made
    # again if it was not written down.
    Fault(
        "disk full: coordinator",
        coordinator_disk_full,
        lasts_s=60,
        outcomes={
            "joining": Outcome(attempts=(1, 0, 0, 0), failures=3),
            "mid-round": Outcome(attempts=(0, 1, 0, 0), failures=3),
            "aggregating": Outcome(attempts=(0, 1, 0, 0), failures=3),
            "checkpointing": Outcome(failures=3),
            "offloading": Outcome(failures=3),
        },
    ),
    # What is out is overdue at once; the answers come all the same and are counted as late.
    Fault(
        "clock jump: device",
        device_clock_jumps,
        lasts_s=0,
        outcomes={
            **UNTOUCHED,
            "mid-round": Outcome(timeouts=WINDOW),
            "offloading": Outcome(fallbacks=QUESTION),
        },
    ),
    # The deadline is over at once, below quorum; that of the answers has no second chance.
    Fault(
        "clock jump: coordinator",
        coordinator_clock_jumps,
        lasts_s=60,
        outcomes={
            **dict.fromkeys(PHASES, Outcome(extended=1)),
            "offloading": Outcome(silent=tuple(CUTS)),
        },
    ),
    # As frozen, but to itself no time has passed: nothing is overdue, so it sends one more.
    Fault(
        "clock stops: suspended device",
        laptop_suspended,
        lasts_s=100,
        outcomes={
            "joining": Outcome(missed={"d1": (1,)}, produced=ALL - QUOTA),
            "mid-round": Outcome(produced=ALL - 3, expired=2, late={"folded": 3}),
            "aggregating": NOTHING,
            "checkpointing": Outcome(missed={"d1": (3,)}, produced=ALL - QUOTA),
            "offloading": Outcome(silent=("d1",)),
        },
    ),
    # The device does not send the batch: `not_finite` in its books, expired in the coordinator's.
    Fault(
        "NaN: features",
        partial(device_sick, what="features"),
        lasts_s=0,
        outcomes={
            **dict.fromkeys(PHASES, Outcome(expired=1)),
            "offloading": Outcome(fallbacks=QUESTION),
        },
    ),
    Fault(
        "NaN: server's loss",
        server_diverges,
        lasts_s=0,
        outcomes={
            **dict.fromkeys(PHASES, Outcome(discarded={"diverged": 1})),
            "offloading": Outcome(fallbacks=QUESTION),
        },
    ),
    # The half is left out of the average, the server's copy is not.
    Fault(
        "NaN: upload",
        partial(device_sick, what="upload"),
        lasts_s=0,
        outcomes={**dict.fromkeys(PHASES, Outcome(left_out=1)), "offloading": NOTHING},
    ),
]
