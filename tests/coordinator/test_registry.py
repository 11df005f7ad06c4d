from __future__ import annotations

import json

from broker.messages import Hello, Status
from coordinator.registry import Registry
from tests.fake_device import make_measurement
from tests.tiny import make_hello


def online(connection: str = "c1", phase: str = "training") -> Status:
    return Status(state="online", connection=connection, phase=phase)


def offline(connection: str = "c1") -> Status:
    return Status(state="offline", connection=connection)


def joined(registry: Registry, name: str, hello: Hello | None = None) -> None:
    registry.status(name, online())
    device = registry.get(name)
    assert device is not None
    device.hello, device.cut = hello or make_hello(), 2


def test_ready_is_who_is_online_and_has_a_cut() -> None:
    registry = Registry(10)
    joined(registry, "b")
    joined(registry, "a")
    registry.status("c", online())
    assert [device.name for device in registry.ready] == ["a", "b"]
    registry.status("a", offline())
    assert [device.name for device in registry.ready] == ["b"]


def test_offline_from_an_earlier_connection_is_ignored() -> None:
    registry = Registry(10)
    joined(registry, "a")
    registry.status("a", online("c2"))
    registry.status("a", offline("c1"))
    assert registry.ready
    registry.status("a", offline("c2"))
    assert not registry.ready


def test_offline_of_a_device_that_was_never_online() -> None:
    registry = Registry(10)
    registry.status("a", offline())
    assert not registry.ready


def test_rubbish_cannot_fill_memory() -> None:
    registry = Registry(2)
    for name in "abcd":
        registry.status(name, online())
    assert set(registry.devices) == {"a", "b"}
    assert registry.get("c") is None
    assert registry.get("a") is not None


def test_devices_are_counted_by_what_they_do() -> None:
    registry = Registry(10)
    registry.status("a", online(phase="training"))
    registry.status("b", online(phase="training"))
    registry.status("c", online(phase=""))
    registry.status("d", offline())
    assert registry.by_state() == {"training": 2, "online": 1, "offline": 1}


def test_what_is_dumped_comes_back_and_nobody_is_online() -> None:
    registry, restored = Registry(10), Registry(10)
    joined(registry, "a", make_hello(measurement=make_measurement()))
    device = registry.get("a")
    assert device is not None
    device.rounds, device.samples = 3, 400
    registry.status("b", online())
    restored.restore(json.loads(json.dumps(registry.dump())))
    again = restored.get("a")
    assert again is not None
    assert (again.cut, again.rounds, again.samples) == (2, 3, 400)
    assert again.hello == device.hello
    assert restored.ready == []
    assert list(restored.devices) == ["a", "b"]


def test_who_is_retired_is_known_no_more_until_the_name_is_given_again() -> None:
    registry = Registry(2)
    joined(registry, "a")
    joined(registry, "b")
    registry.retire(frozenset({"a", "never heard of"}))
    assert set(registry.devices) == {"b"}
    assert registry.by_state() == {"training": 1}
    assert registry.get("a") is None
    registry.status("a", online())
    assert registry.online == 1
    assert [entry["name"] for entry in registry.dump()] == ["b"]
    assert registry["a"].name == "a", "a round may still name it"
    registry.status("c", online())
    assert set(registry.devices) == {"b", "c"}, "there is room again"
    registry.retire(frozenset({"c"}))
    registry.status("a", online("c2"))
    assert set(registry.devices) == {"a", "b"}
    assert registry["a"].hello is None, "another device, of the same name"
