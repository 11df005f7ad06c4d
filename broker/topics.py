"""The topic tree of a fleet: the only place where topics are written or read.

splitfleet/{fleet}/device/{device}/up/{kind}      written by the device
splitfleet/{fleet}/device/{device}/down/{kind}    written by the coordinator
splitfleet/{fleet}/all/{kind}                     to everybody
splitfleet/{fleet}/cut/{layer}/{kind}             to the devices of one cut layer
splitfleet/{fleet}/claim/{claim}/up/{kind}        written by who has no identity yet
splitfleet/{fleet}/claim/{claim}/down/{kind}      written by the coordinator

A claim is claim.ID (a join token) or back.DEVICE (a device whose certificate ended): with a dot, so
never the name of a device. The broker hangs the tree of claims below splitfleet/{fleet}/claim/, so
whoever comes with one sees {claim}/up/{kind} and {claim}/down/{kind}, and nothing else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from broker.errors import TopicError

ROOT = "splitfleet"
SYSTEM = "$SYS/"
"""Topics that begin so are the broker's own."""
COORDINATOR = "coordinator"
RESERVED = frozenset({COORDINATOR, "operator", "monitor"})

UP_KINDS = frozenset(
    {
        "hello",
        "status",
        "activations",
        "gradients",
        "parameters",
        "features",
        "report",
        "telemetry",
        "request",
        "renew",
        "fetch",
        "software",
    }
)
DOWN_KINDS = frozenset(
    {
        "assignment",
        "gradients",
        "receipt",
        "prediction",
        "parameters",
        "features",
        "program",
        "command",
        "certificate",
        "piece",
    }
)
ALL_KINDS = frozenset({"round", "serving", "command", "coordinator"})
CUT_KINDS = frozenset({"manifest", "parameters"})
CLAIM_UP_KINDS = frozenset({"enrol"})
CLAIM_DOWN_KINDS = frozenset({"certificate"})

# A topic keeps one retained message, so only small state is retained, never a tensor.
RETAINED = frozenset(
    {
        ("up", "status"),
        ("down", "assignment"),
        ("all", "round"),
        ("all", "serving"),
        ("all", "coordinator"),
        ("cut", "manifest"),
    }
)

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_CLAIM = re.compile(r"(claim|back)\.[A-Za-z0-9_-]{1,64}")
_LAYER = re.compile(r"0|[1-9][0-9]{0,3}")

Scope = Literal["device", "all", "cut", "claim"]
Direction = Literal["up", "down"]
Access = Literal["read", "write", "readwrite"]


def check_name(name: str, what: str = "name") -> str:
    """Return `name`, or raise TopicError when it cannot be a part of a topic."""
    if not _NAME.fullmatch(name):
        raise TopicError(
            f"{what} {name!r} is not allowed; use 1 to 64 of the characters A-Z a-z 0-9 _ -"
        )
    return name


def check_device(device: str) -> str:
    """Return `device`, or raise TopicError when it is malformed or reserved."""
    check_name(device, "device name")
    if device in RESERVED:
        raise TopicError(
            f"device name {device!r} is reserved; choose one that is not among "
            f"{', '.join(sorted(RESERVED))}"
        )
    return device


def check_claim(claim: str) -> str:
    """Return `claim`, or raise TopicError when it is no claim.ID or back.DEVICE."""
    if not _CLAIM.fullmatch(claim):
        raise TopicError(f"claim {claim!r} is not allowed; it is claim.ID or back.DEVICE")
    return claim


@dataclass(frozen=True, slots=True)
class Address:
    """What a topic says.

    `device` and `direction` belong to the scopes "device" and "claim", where `device` is the claim,
    and `layer` to "cut".
    """

    scope: Scope
    kind: str
    device: str | None = None
    direction: Direction | None = None
    layer: int | None = None

    def __post_init__(self) -> None:
        kinds = self._check_place()
        if self.kind not in kinds:
            raise TopicError(
                f"kind {self.kind!r} does not exist there; known are {', '.join(sorted(kinds))}"
            )

    def _check_place(self) -> frozenset[str]:
        of_device = self.device is not None and self.direction in ("up", "down")
        if self.scope == "claim" and of_device and self.layer is None:
            assert self.device is not None
            check_claim(self.device)
            return CLAIM_UP_KINDS if self.direction == "up" else CLAIM_DOWN_KINDS
        if self.scope == "device" and of_device and self.layer is None:
            assert self.device is not None
            check_device(self.device)
            return UP_KINDS if self.direction == "up" else DOWN_KINDS
        if self.device is None and self.direction is None:
            if self.scope == "all" and self.layer is None:
                return ALL_KINDS
            if self.scope == "cut" and self.layer is not None and 0 <= self.layer <= 9999:
                return CUT_KINDS
        raise TopicError(f"{self!r} is not a place in the topic tree")

    @property
    def retained(self) -> bool:
        """Whether messages of this kind are kept by the broker for late subscribers."""
        place = self.direction or self.scope
        return (place, self.kind) in RETAINED


@dataclass(frozen=True, slots=True)
class Grant:
    """One line of access control: `access` to the topics that `topic_filter` matches."""

    access: Access
    topic_filter: str


class Topics:
    """Writes and reads the topics of one fleet."""

    def __init__(self, fleet: str) -> None:
        self.fleet = check_name(fleet, "fleet name")
        self._base = f"{ROOT}/{fleet}"

    def format(self, address: Address) -> str:
        """The topic of `address`."""
        if address.scope in ("device", "claim"):
            whose = f"{address.scope}/{address.device}"
            return f"{self._base}/{whose}/{address.direction}/{address.kind}"
        if address.scope == "cut":
            return f"{self._base}/cut/{address.layer}/{address.kind}"
        return f"{self._base}/all/{address.kind}"

    def parse(self, topic: str) -> Address:
        """The address of `topic`; TopicError when it is not a topic of this fleet."""
        match topic.split("/"):
            case [root, fleet, *rest] if root == ROOT and fleet == self.fleet:
                pass
            case _:
                raise TopicError(f"{topic!r} is not a topic of fleet {self.fleet!r}")
        match rest:
            case ["device", device, "up", kind]:
                return Address("device", kind, device=device, direction="up")
            case ["device", device, "down", kind]:
                return Address("device", kind, device=device, direction="down")
            case ["claim", claim, "up", kind]:
                return Address("claim", kind, device=claim, direction="up")
            case ["claim", claim, "down", kind]:
                return Address("claim", kind, device=claim, direction="down")
            case ["all", kind]:
                return Address("all", kind)
            case ["cut", layer, kind] if _LAYER.fullmatch(layer):
                return Address("cut", kind, layer=int(layer))
        raise TopicError(f"{topic!r} is not in the topic tree")

    def up(self, device: str, kind: str) -> str:
        """The topic on which `device` sends `kind`."""
        return self.format(Address("device", kind, device=device, direction="up"))

    def down(self, device: str, kind: str) -> str:
        """The topic on which `device` is sent `kind`."""
        return self.format(Address("device", kind, device=device, direction="down"))

    def all(self, kind: str) -> str:
        """The topic on which everybody is sent `kind`."""
        return self.format(Address("all", kind))

    def cut(self, layer: int, kind: str) -> str:
        """The topic on which the devices of cut `layer` are sent `kind`."""
        return self.format(Address("cut", kind, layer=layer))

    def device_filters(self, device: str) -> tuple[str, ...]:
        """What a device subscribes to before it knows its cut layer."""
        return (f"{self._base}/device/{check_device(device)}/down/#", f"{self._base}/all/#")

    def cut_filters(self, layer: int) -> tuple[str, ...]:
        """What a device of cut `layer` subscribes to in addition."""
        return (f"{self._base}/cut/{layer}/#",)

    def coordinator_filters(self) -> tuple[str, ...]:
        """What the coordinator subscribes to."""
        return (f"{self._base}/device/+/up/#",)

    @property
    def claims(self) -> str:
        """Below which the broker hangs what is said by those who come with a claim."""
        return f"{self._base}/claim/"

    def claims_filters(self) -> tuple[str, ...]:
        """What the coordinator subscribes to where it enrols devices."""
        return (f"{self.claims}+/up/#",)

    def device_grants(self, device: str) -> tuple[Grant, ...]:
        """All a device may do; `device` may be a broker's placeholder such as "%u".

        It writes to known topics only: of each the broker may have to retain a message for it.
        """
        own = f"{self._base}/device/{device}"
        return (
            *(Grant("write", f"{own}/up/{kind}") for kind in sorted(UP_KINDS)),
            Grant("read", f"{own}/down/#"),
            Grant("read", f"{self._base}/all/#"),
            Grant("read", f"{self._base}/cut/#"),
        )

    def claim_grants(self, claim: str) -> tuple[Grant, ...]:
        """All a claim may do; `claim` may be a broker's placeholder such as "%u"."""
        own = f"{self.claims}{claim}"
        return (
            *(Grant("write", f"{own}/up/{kind}") for kind in sorted(CLAIM_UP_KINDS)),
            Grant("read", f"{own}/down/#"),
        )

    def coordinator_grants(self) -> tuple[Grant, ...]:
        """All the coordinator may do: the whole fleet, and the broker's own figures."""
        return (Grant("readwrite", f"{self._base}/#"), Grant("read", f"{SYSTEM}#"))


class ClaimTopics(Topics):
    """The topics of a fleet as who comes with a claim writes them: below :attr:`Topics.claims`."""

    def format(self, address: Address) -> str:
        """The topic of `address`, which is a claim's."""
        assert address.scope == "claim"
        return super().format(address).removeprefix(self.claims)

    def parse(self, topic: str) -> Address:
        """The address of `topic`; TopicError when it is not a topic of claims."""
        # Mosquitto 2.0 before 2.0.12 leaves what it has put before it (its issue 2244).
        return super().parse(self.claims + topic.removeprefix(self.claims))

    def claim_filters(self, claim: str) -> tuple[str, ...]:
        """What who comes with `claim` subscribes to."""
        return (f"{check_claim(claim)}/down/#",)


def matches(topic_filter: str, topic: str) -> bool:
    """Whether an MQTT subscription filter (with + and #) matches `topic`."""
    wanted, levels = topic_filter.split("/"), topic.split("/")
    if topic.startswith("$") and not wanted[0].startswith("$"):
        return False
    for i, level in enumerate(wanted):
        if level == "#":
            return True
        if i >= len(levels) or level not in ("+", levels[i]):
            return False
    return len(wanted) == len(levels)
