from __future__ import annotations

import threading

import pytest

from coordinator.versions import Version, Versions


def version(number: int) -> Version:
    return Version(number, {}, frozenset({2}))


class Shelf:
    """What is on disk."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = set(numbers)
        self.loaded: list[int] = []

    def load(self, number: int) -> Version | None:
        self.loaded.append(number)
        return version(number) if number in self.numbers else None


def opened(shelf: Shelf, latest: int = 5, keep: int = 3) -> Versions:
    return Versions(version(latest), keep=keep, load=shelf.load)


def test_the_last_few_are_answered_and_loaded_once() -> None:
    shelf = Shelf(1, 2, 3, 4, 5)
    versions = opened(shelf)
    assert [number for number in range(8) if versions.answers(number)] == [3, 4, 5]
    for number in (2, 3, 4, 5, 6, 3, 4):
        found = versions.find(number)
        assert (found is not None) == (3 <= number <= 5)
        assert found is None or found.number == number
    assert shelf.loaded == [3, 4]


def test_what_is_not_on_disk_is_looked_for_once() -> None:
    shelf = Shelf(5)
    versions = opened(shelf)
    assert versions.answers(4)
    assert versions.find(4) is None
    assert versions.find(4) is None
    assert not versions.answers(4)
    assert shelf.loaded == [4]


def test_the_last_closed_round_serves() -> None:
    versions = opened(Shelf())
    versions.publish(version(6))
    assert (versions.serving.number, versions.latest.number, versions.pinned) == (6, 6, None)
    assert [number for number in range(9) if versions.answers(number)] == [4, 5, 6]
    assert versions.find(5) is not None, "it is still in memory"


def test_what_was_chosen_serves_until_something_else_is() -> None:
    shelf = Shelf(1)
    versions = opened(shelf)
    assert versions.pin(1)
    for number in range(6, 12):
        versions.publish(version(number))
    assert (versions.serving.number, versions.latest.number, versions.pinned) == (1, 11, 1)
    found = versions.find(1)
    assert found is not None
    assert found.number == 1
    assert shelf.loaded == [1], "it stays in memory"
    assert versions.pin(None)
    assert versions.serving.number == 11
    assert versions.answers(1), "somebody may not have heard of it yet"
    assert versions.pin(10)
    assert versions.find(1) is None


def test_a_version_that_is_not_there_is_not_served() -> None:
    versions = opened(Shelf())
    assert not versions.pin(2)
    assert (versions.serving.number, versions.pinned) == (5, None)


@pytest.mark.parametrize("choice", [1, 5, None])
def test_a_change_is_told(choice: int | None) -> None:
    versions = opened(Shelf(1))
    told: list[int] = []
    versions.changed = lambda: told.append(versions.serving.number)
    versions.pin(choice)
    versions.pin(choice)
    versions.publish(version(6))
    assert told == ([6] if choice is None else [choice, choice])


def test_while_one_is_loaded_nobody_waits() -> None:
    entered, proceed = threading.Event(), threading.Event()

    def slowly(number: int) -> Version:
        entered.set()
        assert proceed.wait(100)
        return version(number)

    versions = Versions(version(5), keep=3, load=slowly)
    loader = threading.Thread(target=versions.find, args=(4,))
    loader.start()
    assert entered.wait(100)
    versions.publish(version(6))
    assert versions.serving.number == 6
    proceed.set()
    loader.join(30)
    assert not loader.is_alive()
