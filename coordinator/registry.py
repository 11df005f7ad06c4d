"""The devices of a fleet as the coordinator knows them."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from broker.messages import Hello, Status
from broker.serving_messages import Inference
from broker.training_messages import Report
from coordinator.label_counts import LabelCounts
from coordinator.rounds import Load

log = logging.getLogger("splitfleet.coordinator")


@dataclass(slots=True)
class Device:
    """One device. ``cut`` is None until it is assigned."""

    name: str
    cut: int | None = None
    hello: Hello | None = None
    online: bool = False
    connection: str = ""
    phase: str = ""
    rounds: int = 0
    samples: int = 0
    load: Load = field(default_factory=Load)
    labels: LabelCounts | None = None
    """Of its batches so far; None where nobody asks."""
    inference: Inference | None = None
    report: Report | None = None
    """Its last account of an attempt."""
    heard: float | None = None
    """When it last said something, on the coordinator's clock."""
    device_class: str = ""
    """As it says in its telemetry; unknown until then."""
    predictions: Counter[str] = field(default_factory=Counter)
    """Images answered since the coordinator began, by who answered."""

    @property
    def frozen(self) -> bool:
        """Whether it computes its half of the network, but does not train it."""
        return self.hello is not None and self.hello.frozen

    @property
    def state(self) -> str:
        """``offline``, or what it is doing."""
        return (self.phase or "online") if self.online else "offline"


@dataclass(slots=True)
class Registry:
    """All devices, by name; at most ``limit`` of them, so that rubbish cannot fill memory."""

    limit: int
    devices: dict[str, Device] = field(default_factory=dict)
    quarantined: set[str] = field(default_factory=set)
    """Devices that have no part in rounds for now; see ``coordinator.defences.guard``."""
    _retired: frozenset[str] = frozenset()
    _gone: dict[str, Device] = field(default_factory=dict)
    """Devices that were retired since the coordinator began: a round may still name them."""
    _states: Counter[str] = field(default_factory=Counter)

    def __getitem__(self, name: str) -> Device:
        """The device of a round, which may have been retired since."""
        return self.devices[name] if name in self.devices else self._gone[name]

    def get(self, name: str) -> Device | None:
        """The device, added if it is new; None if it is retired or the fleet is full."""
        if name in self._retired:
            return None
        if name not in self.devices:
            if len(self.devices) >= self.limit:
                return None
            self.devices[name] = Device(name)
            self._states["offline"] += 1
        return self.devices[name]

    def is_retired(self, name: str) -> bool:
        """Whether the device of that name is no more."""
        return name in self._retired

    def find(self, name: str) -> Device | None:
        """The device if it is known; may be called from any thread."""
        return self.devices.get(name)

    @property
    def online(self) -> int:
        """How many devices are there."""
        return len(self.devices) - self._states["offline"]

    def status(self, name: str, status: Status) -> None:
        """Enter a status.

        An *offline* from a connection that is not the current one is the last will of an earlier
        connection and says nothing about this one.
        """
        device = self.get(name)
        if device is None:
            return
        before = device.state
        self._enter(device, status)
        self._states[before] -= 1
        self._states[device.state] += 1
        if (before == "offline") != (device.state == "offline"):
            now = "online" if device.online else "offline"
            log.info("%s is %s", name, now, extra={"device": name})

    def _enter(self, device: Device, status: Status) -> None:
        if status.state == "offline":
            if status.connection == device.connection:
                device.online = False
            return
        device.online = True
        device.connection = status.connection
        device.phase = status.phase

    def retire(self, names: frozenset[str]) -> None:
        """Know these devices no more; those that are not among them may come again."""
        self._retired = names
        for name in names & self.devices.keys():
            device = self._gone[name] = self.devices.pop(name)
            self._states[device.state] -= 1
            device.online = False

    @property
    def ready(self) -> list[Device]:
        """Devices that are online, have a cut layer and are not in quarantine, by name."""
        return sorted(
            (
                d
                for d in self.devices.values()
                if d.online and d.cut is not None and d.hello and d.name not in self.quarantined
            ),
            key=lambda d: d.name,
        )

    @property
    def training_cuts(self) -> set[int]:
        """Cuts of the devices that train their halves."""
        return {d.cut for d in self.devices.values() if d.cut is not None and not d.frozen}

    def by_state(self) -> dict[str, int]:
        """How many devices are in each state."""
        return {state: count for state, count in self._states.items() if count}

    def dump(self) -> list[dict[str, Any]]:
        """For a checkpoint."""
        return [
            {
                "name": d.name,
                "cut": d.cut,
                "rounds": d.rounds,
                "samples": d.samples,
                "load": asdict(d.load),
                **({"labels": d.labels.dump()} if d.labels else {}),
                "hello": d.hello.model_dump() if d.hello else None,
            }
            for d in self.devices.values()
        ]

    def restore(self, dumped: list[dict[str, Any]]) -> None:
        """From a checkpoint; nobody is online until heard of."""
        for entry in dumped:
            hello = Hello.model_validate(entry["hello"]) if entry["hello"] else None
            self._states["offline"] += 1
            self.devices[entry["name"]] = Device(
                entry["name"],
                cut=entry["cut"],
                hello=hello,
                rounds=entry["rounds"],
                samples=entry["samples"],
                load=Load(**entry.get("load", {})),
                labels=LabelCounts(entry["labels"]) if "labels" in entry else None,
            )
