"""What an experiment is: a TOML file, checked as a whole before anything is trained."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from coordinator.rounds import quota_of
from coordinator.settings import CoordinatorSettings
from ops.errors import SettingsWrong
from ops.experiments.images import Images, ImageSets, load_images
from tensors.errors import TensorsError
from tensors.networks import NetworkSpec, build_network
from tensors.partition import partition

FILES = Path(__file__).parent / "files"
Kind = Literal["fleet", "centralized", "distributed"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$")]
Cuts = Annotated[tuple[Annotated[int, Field(ge=1, le=1024)], ...], Field(min_length=1)]
FIXED = {
    "state_dir", "min_devices", "inference", "dataset", "data_root", "seed", "stay", "threads",
    "keep_checkpoints",
}  # fmt: skip
"""Settings of the coordinator that an experiment decides by itself."""
FLEETS_ONLY = ("exit_weight", "feedback_weight", "distill_weight", "label_skew")
"""What the baselines would have to know of, and do not."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def _with_table(training: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(training.get("network", {}), dict):
        raise ValueError("network is a table, e.g. { width = 16 }")  # noqa: TRY004 pydantic's
    return training


class Fleet(_Section):
    """Section ``[fleet]``."""

    cuts: Cuts = (2, 3, 4, 5)
    """One device each."""
    partition: str = "iid"
    """How the training images are split over them; see ``tensors.partition``."""


class Arm(_Section):
    """One entry of ``[[arms]]``: what it does otherwise than ``[fleet]`` and ``[training]``."""

    name: Name
    kind: Kind = "fleet"
    """``centralized``: the whole network on all images, with every exit of the fleet's cuts.
    ``distributed``: every device by itself, the whole network on its own images."""
    cuts: Cuts | None = None
    partition: str | None = None
    training: dict[str, Any] = Field(default_factory=dict)
    against: Name | None = None
    """The arm it is compared with, if not the reference."""

    @field_validator("training")
    @classmethod
    def _check_training(cls, training: dict[str, Any]) -> dict[str, Any]:
        return _with_table(training)


class Experiment(_Section):
    """The file."""

    name: Name
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**31)], ...], Field(min_length=1)]
    reference: Name
    """The arm that the others are compared with."""
    data: Images
    score_every: int = Field(default=1, ge=1)
    """Rounds between two points of a curve; the last round is always one."""
    fleet: Fleet = Fleet()
    training: dict[str, Any] = Field(default_factory=dict)
    """Settings of the coordinator (docs/cli.md) for all arms; ``network`` is a table in it."""
    arms: Annotated[tuple[Arm, ...], Field(min_length=1)]

    @field_validator("seeds")
    @classmethod
    def _check_seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed is there twice")
        return seeds

    @field_validator("training")
    @classmethod
    def _check_training(cls, training: dict[str, Any]) -> dict[str, Any]:
        return _with_table(training)

    @field_validator("arms")
    @classmethod
    def _check_names(cls, arms: tuple[Arm, ...]) -> tuple[Arm, ...]:
        names = [arm.name for arm in arms]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two arms are called {twice[0]!r}")
        return arms


@dataclass(frozen=True, slots=True)
class Training:
    """One arm with one seed: all that its result depends on."""

    arm: str
    kind: Kind
    cuts: tuple[int, ...]
    partition: str
    data: Images
    score_every: int
    settings: CoordinatorSettings

    @property
    def seed(self) -> int:
        """Of first weights, split and batches."""
        return self.settings.seed

    @property
    def devices(self) -> list[str]:
        """Their names; the batches of a device follow from its name."""
        return [f"device-{index}-cut-{cut}" for index, cut in enumerate(self.cuts)]

    def shares(self, images: ImageSets) -> list[Any]:
        """Which training images each device has; raises ``DataError``."""
        return partition(images.train.labels, len(self.cuts), self.partition, self.seed)

    def quotas(self, images: ImageSets) -> list[int]:
        """Batches of each device in a round."""
        settings = self.settings
        return [
            quota_of(len(rows), settings.batch_size, settings.batches_per_round)
            for rows in self.shares(images)
        ]

    def scores(self, number: int) -> bool:
        """Whether this round is a point of the curve."""
        return number % self.score_every == 0 or number == self.settings.rounds

    def identity(self) -> dict[str, Any]:
        """What a training that is gone on with must have in common with its start."""
        return {
            "arm": self.arm,
            "kind": self.kind,
            "cuts": list(self.cuts),
            "partition": self.partition,
            "data": self.data.model_dump(mode="json"),
            "score_every": self.score_every,
            "device": self.settings.device.partition(":")[0],
            "settings": self.settings_as_json(self.settings),
        }

    @staticmethod
    def settings_as_json(settings: CoordinatorSettings) -> dict[str, Any]:
        """Those that results depend on."""
        return settings.model_dump(mode="json", exclude={"state_dir", "device"})


def read_experiment(file: str) -> Experiment:
    """The experiment in a TOML file, or a bundled one by its name. Raises ``SettingsWrong``."""
    path = Path(file)
    if not path.suffix and not path.exists():
        path = FILES / f"{file}.toml"
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except OSError as exc:
        known = ", ".join(sorted(bundled.stem for bundled in FILES.glob("*.toml")))
        raise SettingsWrong(
            f"cannot read the experiment {file}: {exc.strerror}; give a TOML file or one of {known}"
        ) from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise SettingsWrong(f"{path} is not valid TOML: {exc}") from exc
    try:
        experiment = Experiment(**content)
    except ValidationError as exc:
        raise SettingsWrong(f"{path}: {_first(exc)}") from None
    names = [arm.name for arm in experiment.arms]
    others = [("reference", experiment.reference)]
    others += [(f"arm {arm.name}: against", arm.against) for arm in experiment.arms if arm.against]
    for place, other in others:
        if other not in names:
            raise SettingsWrong(
                f"{path}: {place} = {other!r} is none of the arms {', '.join(names)}"
            )
    return experiment


def rehearsal(experiment: Experiment) -> Experiment:
    """The same arms as small as they can be: two rounds of two batches, 500 images, width 16.

    To see that everything goes through, on any machine.
    """
    tiny: dict[str, Any] = {"rounds": 2, "batches_per_round": 2, "batch_size": 16}

    def smaller(training: dict[str, Any]) -> dict[str, Any]:
        network = training.get("network", {}) | {"width": 16}
        return training | tiny | {"network": network}

    return experiment.model_copy(
        update={
            "name": f"{experiment.name}-rehearsal",
            "seeds": experiment.seeds[:1],
            "score_every": 1,
            "data": experiment.data.model_copy(
                update={"train_images": 500, "test_images": 200, "curve_images": 200}
            ),
            "training": smaller(experiment.training),
            "arms": tuple(
                arm.model_copy(update={"training": smaller(arm.training)})
                for arm in experiment.arms
            ),
        }
    )


def trainings(
    experiment: Experiment, *, data_root: Path | None, device: str | None = None
) -> list[Training]:
    """Every arm with every seed, seeds outermost, so that one seed is compared early.

    ``device`` overrides the settings'. Raises ``SettingsWrong``, naming the arm, and ``DataError``.
    """
    images = load_images(experiment.data, data_root)
    made = []
    for seed in experiment.seeds:
        for arm in experiment.arms:
            try:
                made.append(_training(experiment, arm, seed, images, device))
            except ValidationError as exc:
                raise SettingsWrong(f"arm {arm.name}: {_first(exc)}") from None
            except TensorsError as exc:
                raise SettingsWrong(f"arm {arm.name}: {exc}") from exc
    return made


def _training(
    experiment: Experiment, arm: Arm, seed: int, images: ImageSets, device: str | None
) -> Training:
    values = {**experiment.training, **arm.training}
    if fixed := sorted(FIXED & values.keys()):
        raise SettingsWrong(
            f"arm {arm.name}: training.{fixed[0]} cannot be set: an experiment decides it"
        )
    network = {**experiment.training.get("network", {}), **arm.training.get("network", {})}
    for key in sorted({"channels", "size", "classes"} & network.keys()):
        raise SettingsWrong(f"arm {arm.name}: network.{key} cannot be set: it is the data's")
    _, size, _, channels = images.train.images.shape
    classes = len(images.train.classes)
    cuts = arm.cuts or experiment.fleet.cuts
    values |= {
        "network": {**network, "channels": channels, "size": size, "classes": classes},
        "seed": seed,
        "min_devices": len(cuts),
        "inference": False,
        "threads": 1,
        "keep_checkpoints": 2,
    }
    if device is not None:
        values["device"] = device
    settings = CoordinatorSettings(**values)
    for key in ("precision", "memory_format", "device"):
        if getattr(settings, key) == "auto":  # chosen by timing, and so now and then differently
            raise SettingsWrong(f"arm {arm.name}: training.{key} must be set, and not to auto")
    if arm.kind != "fleet":
        for key in FLEETS_ONLY:
            if getattr(settings, key) != CoordinatorSettings.model_fields[key].default:
                raise SettingsWrong(
                    f"arm {arm.name}: a {arm.kind} arm does not know training.{key}: set it in "
                    "the arms that are fleets"
                )
    whole = build_network(NetworkSpec(**settings.network.model_dump()))
    for cut in cuts:
        whole.require_cut(cut)
    training = Training(
        arm.name,
        arm.kind,
        cuts,
        arm.partition or experiment.fleet.partition,
        experiment.data,
        experiment.score_every,
        settings,
    )
    training.shares(images)
    return training


def _first(exc: ValidationError) -> str:
    error = exc.errors(include_url=False)[0]
    place = ".".join(map(str, error["loc"]))
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        return f"{place} is not a setting"
    if error["type"] == "missing":
        return f"{place} is missing"
    return f"{place} = {error['input']!r} is not allowed: {message}" if place else message
