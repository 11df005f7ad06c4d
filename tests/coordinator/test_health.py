from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from broker.drive import Effect
from coordinator.health import Vitals

Run = Callable[[], Sequence[Effect]]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Thread:
    """A machine's thread: what it was called with, and whether its queue has room."""

    def __init__(self) -> None:
        self.queue: list[Run] = []
        self.full = False

    def call(self, run: Run) -> bool:
        if not self.full:
            self.queue.append(run)
        return not self.full

    def step(self) -> None:
        while self.queue:
            self.queue.pop(0)()


class Service:
    def __init__(self) -> None:
        self.clock = Clock()
        self.training, self.answering = Thread(), Thread()
        self.vitals = Vitals(("training", "answering"), bound_s=60.0, clock=self.clock)

    def run(self, seconds: float, *, broker: bool = True, busy: Sequence[Thread] = ()) -> None:
        """Look every second; threads that are not ``busy`` answer at once."""
        for _ in range(int(seconds)):
            self.clock.now += 1.0
            calls = {"training": self.training.call, "answering": self.answering.call}
            self.vitals.look(calls, broker_connected=broker)
            for thread in (self.training, self.answering):
                if thread not in busy:
                    thread.step()


@pytest.fixture
def service() -> Service:
    return Service()


def test_a_coordinator_that_idles_is_well(service: Service) -> None:
    service.run(1000)
    health = service.vitals.health()
    assert health.ok
    assert health.broker_connected
    assert health.stalled_s == {"training": 0.0, "answering": 0.0, "service": 0.0}


def test_before_and_after_it_runs_it_is_not(service: Service) -> None:
    assert not service.vitals.health().ok
    service.run(1)
    service.vitals.stopped()
    health = service.vitals.health()
    assert (health.ok, health.broker_connected) == (False, False)
    assert health.problem is not None
    assert "starting or stopping" in health.problem


def test_without_a_broker_it_is_not(service: Service) -> None:
    service.run(1, broker=False)
    assert service.vitals.health().problem == "no connection to the broker"


def test_a_thread_that_is_stuck_is_named_after_the_bound(service: Service) -> None:
    service.run(10)
    service.run(60, busy=[service.answering])
    assert service.vitals.health().ok
    service.run(10, busy=[service.answering])
    health = service.vitals.health()
    assert health.problem == "answering: nothing done for 69 s"
    assert len(service.answering.queue) == 1, "it is not asked again and again"
    service.run(1)
    assert service.vitals.health().ok


def test_a_thread_with_a_long_queue_that_goes_on_is_well(service: Service) -> None:
    service.training.full = True
    for _ in range(20):
        service.run(10, busy=[service.training])
        service.vitals.pulses["training"].stepped()
    health = service.vitals.health()
    assert health.ok
    assert health.stalled_s["training"] == 0.0
    service.training.full = False
    service.run(2)
    service.run(59, busy=[service.training])
    assert service.vitals.health().ok


def test_a_service_that_does_not_look_any_more_is_named(service: Service) -> None:
    service.run(1)
    service.clock.now += 62.0
    health = service.vitals.health()
    assert health.problem == "service: nothing done for 61 s"
