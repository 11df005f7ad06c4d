"""One training from its folder: started, or gone on with, round by round.

{folder}/training.json   all that its result depends on
{folder}/history.json    a line for each closed round
{folder}/state/          what training goes on from
{folder}/result.json     after the last round
{folder}/exits.json      after that; then it is finished
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import ValidationError

from coordinator.evaluation import Evaluator
from coordinator.settings import CoordinatorSettings
from ops.errors import DiskTrouble, SettingsWrong
from ops.exit_report import points
from ops.exits import judge_exits
from ops.experiments.fleet_training import FleetTraining
from ops.experiments.images import ImageSets, load_images
from ops.experiments.local_training import LocalTraining
from ops.experiments.spec import Training
from ops.files import write_whole
from tensors.datasets import Dataset
from tensors.networks import NetworkSpec, State, build_network
from tensors.training import choose_compute

Record = dict[str, Any]


class UnderWay(Protocol):
    """A training; ``round`` rounds are closed and on disk."""

    @property
    def round(self) -> int: ...

    def advance(self) -> None: ...

    def models(self) -> dict[str, State]: ...

    def records(self) -> list[Record]: ...


def begin(training: Training, images: ImageSets, folder: Path) -> UnderWay:
    """Build a training on what ``folder`` holds."""
    if training.kind == "fleet":
        return FleetTraining(training, images, folder)
    return LocalTraining(training, images, folder)


def run_training(
    training: Training,
    folder: Path,
    *,
    data_root: Path | None,
    told: Callable[[Record], None],
    stop: Callable[[], bool] = lambda: False,
    must_advance: bool = False,
) -> Record | None:
    """Train to the end and test; the result, or None if ``stop()`` before some round.

    ``told`` hears of every round. With ``must_advance`` there is one more in any case.

    Raises:
        SettingsWrong: the folder holds another training.
        DiskTrouble, StoreError, StateError: it cannot be read or written.
        FleetFailed: training does not come to its end.
    """
    claim(training, folder)
    result = read_json(folder / "result.json")
    if result is not None and is_finished(folder):
        return result
    _compute_the_same_again()
    images = load_images(training.data, data_root)
    under_way = begin(training, images, folder / "state")
    judge = Judge(training, images)
    known = {record["round"]: record for record in read_history(folder)}
    started = time.process_time()
    advanced = not must_advance
    while True:
        history: list[Record] = [
            {"seconds": 0.0} | known.get(record["round"], {}) | record
            for record in under_way.records()
        ]
        new = [record for record in history if record["round"] not in known]
        if new:
            if any(training.scores(record["round"]) for record in new):
                new[-1] |= judge.score(under_way.models(), images.curve)
            new[-1]["seconds"] = time.process_time() - started
            write_whole(folder / "history.json", to_json({"rounds": history}))
            for record in new:
                told(record)
        known = {record["round"]: record for record in history}
        if under_way.round == training.settings.rounds:
            break
        if advanced and stop():
            return None
        advanced = True
        started = time.process_time()
        under_way.advance()
    if result is None:
        result = {
            "training": training.identity(),
            "seed": training.seed,
            "final": judge.score(under_way.models(), images.test),
            "history": history,
        }
        write_whole(folder / "result.json", to_json(result))
    rows = judge.exits(under_way.models(), images.test)
    write_whole(folder / "exits.json", to_json({"exits": rows}))
    return result


class Judge:
    """Scores models as the arm's devices would see them, by cut."""

    def __init__(self, training: Training, images: ImageSets) -> None:
        self._training = training
        settings = training.settings
        self._spec = NetworkSpec(**settings.network.model_dump())
        self._compute = choose_compute(
            lambda: build_network(self._spec),
            (settings.batch_size, self._spec.channels, self._spec.size, self._spec.size),
            device=settings.device,
            precision=settings.precision,
            memory_format=settings.memory_format,
        )
        self._evaluators = {
            id(dataset): Evaluator(build_network(self._spec), self._compute, dataset)
            for dataset in (images.curve, images.test)
        }

    def score(self, models: Mapping[str, State], dataset: Dataset) -> Record:
        """Accuracies (0 to 1): ``full``, ``full_by_cut`` and ``exits``, means over devices.

        Without a codec.
        """
        evaluator = self._evaluators[id(dataset)]
        full: dict[int, list[float]] = {}
        exits: dict[int, list[float]] = {}
        losses = []
        for name, state in models.items():
            cuts = self._cuts_of(name)
            scores = evaluator.scores(state, cuts)
            losses.append(scores.server_loss)
            for cut in cuts:
                full.setdefault(cut, []).append(scores.server_accuracy)
                exits.setdefault(cut, []).append(scores.exit_accuracy[cut])
        return {
            "full": statistics.fmean(value for values in full.values() for value in values),
            "loss": statistics.fmean(losses),
            "full_by_cut": {str(cut): statistics.fmean(full[cut]) for cut in sorted(full)},
            "exits": {str(cut): statistics.fmean(exits[cut]) for cut in sorted(exits)},
        }

    def exits(self, models: Mapping[str, State], dataset: Dataset) -> list[Record]:
        """Calibrated thresholds and curves, through the codec; see ``ops.exits``.

        A row for each device and cut.
        """
        rows = []
        for name, state in models.items():
            judged = judge_exits(
                state,
                self._spec,
                self._cuts_of(name),
                dataset,
                self._training.settings.codec,
                compute=self._compute,
            )
            rows += [
                {"device": name, **found.row, "curve": points(found.curve)} for found in judged
            ]
        return rows

    def _cuts_of(self, device: str) -> list[int]:
        if not device:
            return sorted(set(self._training.cuts))
        return [self._training.cuts[self._training.devices.index(device)]]


def _compute_the_same_again() -> None:
    """One thread; on a GPU no choice among algorithms by timing, and fp32 means fp32."""
    torch.set_num_threads(1)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False


def to_json(data: object) -> str:
    """For people and programs."""
    return json.dumps(data, indent=1) + "\n"


def read_json(path: Path) -> Record | None:
    """What is in a file; None if there is none. Raises ``DiskTrouble``."""
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as exc:
        raise _damaged(path, exc) from exc
    if not isinstance(data, dict):
        raise _damaged(path, "not a JSON object")
    return data


def read_history(folder: Path) -> list[Record]:
    """A line for each closed round of the training in ``folder``. Raises ``DiskTrouble``."""
    path = folder / "history.json"
    rounds = (read_json(path) or {"rounds": []}).get("rounds")
    if not isinstance(rounds, list) or not all(
        isinstance(record, dict) and isinstance(record.get("round"), int) for record in rounds
    ):
        raise _damaged(path, "it has no rounds")
    return rounds


def _damaged(path: Path, why: object) -> DiskTrouble:
    return DiskTrouble(
        f"{path} cannot be read ({why}); remove it and start again: what is in it is made anew "
        "where it can be"
    )


def is_finished(folder: Path) -> bool:
    """Whether all is there that a training in ``folder`` comes to."""
    return all((folder / name).exists() for name in ("result.json", "exits.json"))


def claim(training: Training, folder: Path) -> None:
    """Make ``folder`` that of a training. Raises ``SettingsWrong`` if it is another's."""
    identity = json.loads(to_json(training.identity()))
    found = read_json(folder / "training.json")
    if found is None:
        write_whole(folder / "training.json", to_json(identity))
        return
    if not isinstance(found.get("settings"), dict):
        raise _damaged(folder / "training.json", "it has no settings")
    for key in ("device", "score_every"):  # were not there at first
        found.setdefault(key, identity[key])
    with contextlib.suppress(ValidationError):  # a setting that was not there yet had its default
        found["settings"] = Training.settings_as_json(CoordinatorSettings(**found["settings"]))
    if found != identity:
        odd = next(
            key
            for one, other in ((identity, found), (identity["settings"], found["settings"]))
            for key in one
            if key != "settings" and one[key] != other.get(key)
        )
        raise SettingsWrong(
            f"{folder} holds a training with another {odd}: choose another --out, or remove it"
        )
