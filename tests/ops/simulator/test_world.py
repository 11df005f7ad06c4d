"""Virtual time, its randomness, and the tree of filters and topics."""

from __future__ import annotations

import random
from functools import partial

import pytest

from broker.topics import matches
from ops.errors import FleetFailed
from ops.simulator import World
from ops.simulator.tree import Tree


def test_events_happen_in_the_order_of_their_times_then_of_their_making() -> None:
    world, seen = World(), list[tuple[float, str]]()

    def note(name: str) -> None:
        seen.append((world.now, name))

    for delay, name in [(2.0, "c"), (1.0, "a"), (1.0, "b"), (0.0, "now")]:
        world.after(delay, partial(note, name))
    assert not world.run()
    assert seen == [(0.0, "now"), (1.0, "a"), (1.0, "b"), (2.0, "c")]


def test_what_is_cancelled_does_not_happen() -> None:
    world, seen = World(), list[str]()
    world.after(1.0, lambda: seen.append("kept"))
    world.after(1.0, lambda: seen.append("cancelled")).cancel()
    world.run()
    assert seen == ["kept"]


def test_a_run_ends_at_its_limit_and_goes_on_from_there() -> None:
    world, seen = World(), list[float]()
    world.at(5.0, lambda: seen.append(world.now))
    assert not world.run(limit_s=4.0)
    assert (world.now, seen) == (4.0, [])
    assert world.run(until=lambda: bool(seen), limit_s=4.0)
    assert seen == [5.0]


def test_what_is_due_in_the_past_happens_now() -> None:
    world, seen = World(), list[float]()
    world.wait(3.0)
    world.at(1.0, lambda: seen.append(world.now))
    world.run()
    assert seen == [3.0]


def test_going_round_in_circles_is_an_error() -> None:
    world = World()

    def again() -> None:
        world.after(0.0, again)

    again()
    with pytest.raises(FleetFailed, match="no end"):
        world.run(max_events=1000)


def test_randomness_is_by_seed_and_name() -> None:
    def draw(seed: int, name: str) -> float:
        return World(seed).rng(name).random()

    assert draw(1, "a") == draw(1, "a")
    assert len({draw(1, "a"), draw(1, "b"), draw(2, "a")}) == 3


LEVELS = ["a", "b", "$SYS", ""]


def test_the_tree_agrees_with_the_rule_of_topics(rng: random.Random) -> None:
    for _ in range(300):
        topics = {"/".join(rng.choices(LEVELS, k=rng.randint(1, 4))) for _ in range(8)}
        filters = set()
        for _ in range(8):
            levels = rng.choices([*LEVELS, "+"], k=rng.randint(1, 4))
            filters.add("/".join([*levels, "#"] if rng.random() < 0.4 else levels))
        of_topics, of_filters = Tree[str](), Tree[str]()
        for topic in topics:
            of_topics.put(topic, topic)
        for topic_filter in filters:
            of_filters.put(topic_filter, topic_filter)
        for topic in topics:
            expected = sorted(f for f in filters if matches(f, topic))
            assert sorted(of_filters.matching(topic)) == expected, (topic, filters)
        for topic_filter in filters:
            expected = sorted(t for t in topics if matches(topic_filter, t))
            assert sorted(of_topics.matched(topic_filter)) == expected, (topic_filter, topics)
            assert of_filters.get(topic_filter) == topic_filter


def test_what_is_taken_out_of_a_tree_is_gone() -> None:
    tree = Tree[str]()
    tree.put("a/+", "x")
    tree.put("a/+", None)
    assert tree.get("a/+") is None
    assert tree.matching("a/b") == []
