"""What a fleet is made of: distributions from a TOML file, drawn from a seed.

    [[group]]
    share = 0.7                       # of the devices; shares are made to add up to 1
    cut = { choice = [2, 3], weights = [2, 1] }
    forward_s = { lognormal = 0.004, sigma = 0.5 }
    backward_ratio = 2.0
    latency_s = { uniform = [0.01, 0.04] }
    on_s = 3600                       # a plain number is always that number

    [server]
    step_s = 0.001

Every key of :class:`Group` and :class:`Server` may be given; what is missing has its default.
Only a plain number may be ``inf``, and only where :data:`LIMITS` allow it: without a limit.
"""

from __future__ import annotations

import math
import random
import reprlib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ops.errors import SettingsWrong
from ops.simulator.charging import DeviceCost, ServerCost
from ops.simulator.link import LinkProfile
from ops.simulator.programs import Device
from ops.simulator.world import World

FOLDER = Path(__file__).parent / "profiles"


MOST_SHARE = 1e9
Finite = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=MOST_SHARE)]


class _Spread(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Constant(_Spread):
    """Always the same."""

    constant: float | Literal["auto"]

    @property
    def values(self) -> list[float | str]:
        """What has to be allowed."""
        return [self.constant]

    def draw(self, rng: random.Random) -> float | str:
        """The one value."""
        del rng
        return self.constant


class Uniform(_Spread):
    """Evenly between two values."""

    uniform: tuple[Finite, Finite]

    @property
    def values(self) -> list[float]:
        """What has to be allowed."""
        return [*self.uniform]

    @model_validator(mode="after")
    def _check(self) -> Uniform:
        if self.uniform[0] > self.uniform[1]:
            raise ValueError("the first must not be above the second")
        return self

    def draw(self, rng: random.Random) -> float:
        """One of them."""
        return rng.uniform(*self.uniform)


class LogNormal(_Spread):
    """Around a median, with the standard deviation ``sigma`` of the logarithm."""

    lognormal: float = Field(gt=0, allow_inf_nan=False)
    sigma: float = Field(ge=0, le=10)
    at_most: float = Field(default=math.inf, gt=0)

    @property
    def values(self) -> list[float]:
        """What has to be allowed; what is drawn beyond that is cut off."""
        return [self.lognormal]

    def draw(self, rng: random.Random) -> float:
        """Above 0 and at most ``at_most``."""
        return min(self.at_most, self.lognormal * math.exp(rng.gauss(0, self.sigma)))


class Choice(_Spread):
    """One of several, with weights or all alike."""

    choice: list[Finite | Literal["auto"]] = Field(min_length=1)
    weights: list[Share] | None = None

    @property
    def values(self) -> list[float | Literal["auto"]]:
        """What has to be allowed."""
        return self.choice

    @model_validator(mode="after")
    def _check(self) -> Choice:
        if self.weights is None:
            return self
        if len(self.weights) != len(self.choice):
            raise ValueError(f"{len(self.choice)} choices but {len(self.weights)} weights")
        if not sum(self.weights):
            raise ValueError("the weights must not all be 0")
        return self

    def draw(self, rng: random.Random) -> float | str:
        """One of them."""
        return rng.choices(self.choice, self.weights)[0]


def _plain(value: Any) -> Any:
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        return {"constant": value}
    return value


def _kind(value: Any) -> Any:
    # Chosen by its first key, so that an error names what is wrong with that kind alone.
    kinds: dict[str, type[_Spread]] = {
        "constant": Constant,
        "uniform": Uniform,
        "lognormal": LogNormal,
        "choice": Choice,
    }
    value = _plain(value)
    if isinstance(value, _Spread):
        return value
    if isinstance(value, dict):
        for name, kind in kinds.items():
            if name in value:
                return kind.model_validate(value)
    raise ValueError(f"give a number, or a table with one of {', '.join(kinds)}")


Spread = Annotated[Constant | Uniform | LogNormal | Choice, BeforeValidator(_kind)]


LIMITS: dict[str, tuple[float, float]] = {
    "cut": (1, 1024),
    "forward_s": (0, 3600),
    "backward_ratio": (0, 1000),
    "memory_mb": (0, 1e9),
    "samples": (1, 1e9),
    "test_samples": (0, 1e6),
    "up_bytes_per_s": (1, math.inf),
    "down_bytes_per_s": (1, math.inf),
    "latency_s": (0, 60),
    "jitter_s": (0, 60),
    "loss": (0, 0.9),
    "start_s": (0, 1e8),
    "on_s": (1, 1e8),
    "off_s": (0, 1e8),
    "failure_s": (0, 1e8),
    "repair_s": (1, 1e8),
}
"""The least and the most that a value may be."""


class Group(BaseModel):
    """Devices of one kind. Times in seconds; of a step, for each block of the device's half."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str | None = Field(default=None, min_length=1, max_length=40)
    """What people call them; without it "group 1" and so on."""
    share: float = Field(default=1.0, gt=0, le=MOST_SHARE)
    """Of all devices, beside the other groups'."""
    cut: Spread = Constant(constant=2)
    """Cut layers, or "auto": as measured."""
    forward_s: Spread = Constant(constant=0.005)
    backward_ratio: Spread = Constant(constant=2.0)
    """How many times as long as forward the backward pass takes."""
    memory_mb: Spread = Constant(constant=1024)
    samples: Spread = Constant(constant=256)
    test_samples: Spread = Constant(constant=0)
    up_bytes_per_s: Spread = Constant(constant=math.inf)
    down_bytes_per_s: Spread = Constant(constant=math.inf)
    latency_s: Spread = Constant(constant=0.0)
    """One way, to the broker."""
    jitter_s: Spread = Constant(constant=0.0)
    loss: Spread = Constant(constant=0.0)
    """Share of packets that have to be sent again."""
    start_s: Spread = Constant(constant=0.0)
    """When the device is switched on."""
    on_s: Spread = Constant(constant=3600)
    """Duty cycle: so long on, then ``off_s`` off (0: always on)."""
    off_s: Spread = Constant(constant=0.0)
    failure_s: Spread = Constant(constant=0.0)
    """Mean time between failures (0: it never fails), and until it is repaired."""
    repair_s: Spread = Constant(constant=60.0)

    @model_validator(mode="after")
    def _check(self) -> Group:
        for key, (least, most) in LIMITS.items():
            for value in getattr(self, key).values:
                if key == "cut" and (value == "auto" or float(value).is_integer()):
                    value = 1 if value == "auto" else value  # noqa: PLW2901
                elif key == "cut" or isinstance(value, str):
                    kind = 'a whole number or "auto"' if key == "cut" else "a number"
                    raise ValueError(f"{key} = {value}: it must be {kind}")
                if not least <= value <= most:
                    raise ValueError(f"{key} = {value}: allowed is {least:g} to {most:g}")
        return self

    def device(self, name: str, rng: random.Random) -> Device:
        """A device of this kind."""

        def draw(key: str) -> float:
            least, most = LIMITS[key]
            return min(most, max(least, float(getattr(self, key).draw(rng))))

        cut = self.cut.draw(rng)
        forward_s = draw("forward_s")
        return Device(
            name=name,
            cut="auto" if isinstance(cut, str) else int(cut),
            cost=DeviceCost(forward_s, forward_s * draw("backward_ratio")),
            memory_mb=draw("memory_mb"),
            samples=round(draw("samples")),
            test_samples=round(draw("test_samples")),
            link=LinkProfile(
                up_bytes_per_s=draw("up_bytes_per_s"),
                down_bytes_per_s=draw("down_bytes_per_s"),
                latency_s=draw("latency_s"),
                jitter_s=draw("jitter_s"),
                loss=draw("loss"),
            ),
            start_s=draw("start_s"),
            on_s=draw("on_s"),
            off_s=draw("off_s"),
            failure_s=draw("failure_s"),
            repair_s=draw("repair_s"),
        )


Seconds = Annotated[float, Field(ge=0, le=3600)]


class Server(BaseModel):
    """The coordinator's machine. A batch takes ``step_s``, and ``block_s`` for each block there."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    step_s: Seconds = 0.001
    block_s: Seconds = 0.0005
    merge_s: Seconds = 0.5
    """Closing a round."""
    memory_mb: float = Field(default=math.inf, gt=0)
    up_bytes_per_s: float = Field(default=1.25e8, ge=1)
    down_bytes_per_s: float = Field(default=1.25e8, ge=1)
    latency_s: float = Field(default=0.0005, ge=0, le=60)
    """A gigabit to the broker beside it."""

    @property
    def cost(self) -> ServerCost:
        """What it computes."""
        return ServerCost(self.step_s, self.merge_s, self.block_s)

    @property
    def link(self) -> LinkProfile:
        """Its way to the broker."""
        return LinkProfile(self.up_bytes_per_s, self.down_bytes_per_s, latency_s=self.latency_s)


class Profile(BaseModel):
    """A fleet's make-up."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    group: list[Group] = Field(min_length=1)
    server: Server = Server()

    @property
    def names(self) -> list[str]:
        """Of the groups."""
        return [group.name or f"group {i}" for i, group in enumerate(self.group, 1)]

    def devices(self, count: int, world: World) -> list[Device]:
        """So many devices, of each group in proportion; every device has a generator of its own."""
        width = len(str(max(0, count - 1)))
        devices = []
        for number, index in enumerate(self.groups_of(count)):
            name = f"d{number:0{width}}"
            devices.append(self.group[index].device(name, world.rng(f"profile/{name}")))
        return devices

    def groups_of(self, count: int) -> Sequence[int]:
        """Which group each device is of: at every point as near to the shares as can be."""
        total = sum(group.share for group in self.group)
        taken = [0] * len(self.group)
        chosen = []
        for number in range(1, count + 1):
            wanted = [
                number * group.share / total - n for group, n in zip(self.group, taken, strict=True)
            ]
            index = max(range(len(wanted)), key=lambda i: (wanted[i], -i))
            taken[index] += 1
            chosen.append(index)
        return chosen


def bundled() -> list[str]:
    """Names of the profiles that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_profile(name: str) -> Profile:
    """A bundled profile by its name, or one from a file.

    Raises :class:`SettingsWrong`, naming the key, its value and what is allowed.
    """
    path = FOLDER / f"{name}.toml" if name in bundled() else Path(name)
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise SettingsWrong(
            f"there is no profile {name!r}: give a file, or one of {', '.join(bundled())}"
        ) from None
    except RecursionError:
        raise SettingsWrong(f"the profile {path} cannot be read: nested too deeply") from None
    except (OSError, ValueError) as exc:  # also what is no UTF-8, no TOML, or too long a number
        raise SettingsWrong(f"the profile {path} cannot be read: {exc}") from exc
    try:
        return Profile.model_validate(data)
    except ValidationError as exc:
        first = exc.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"] if part != "float")
        raise SettingsWrong(
            f"{path}: {where or 'profile'} = {reprlib.repr(first['input'])}: {first['msg']}"
        ) from None
