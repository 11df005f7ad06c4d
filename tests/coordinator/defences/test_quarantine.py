"""What a coordinator does about a device that breaks rules: it goes on without it, for a while."""

from __future__ import annotations

from typing import Any

import pytest

from broker.training_messages import Receipt
from coordinator.defences.settings import DefenceSettings
from coordinator.health import Health
from tests.fake_coordinator import Harness, every, only
from tests.tiny import CLASSES

WRONG = {"labels": [CLASSES] * 8}
LIMIT = 2


def fleet(**settings: Any) -> Harness:
    fields: dict[str, Any] = {
        "min_devices": 3,
        "rounds": 4,
        "breach_limit": LIMIT,
        "round_deadline_s": 500,
    }
    server = Harness(**(fields | settings))
    for name, cut in (("a", 2), ("b", 2), ("liar", 5)):
        server.join(name, cut)
    assert server.round.round == 1
    return server


def misbehave(server: Harness) -> list[Receipt]:
    return every(Receipt, server.send("liar", *range(LIMIT), **WRONG), "liar")


@pytest.mark.parametrize("strategy", ["averaging", "sequential", "cascade"])
def test_the_round_closes_without_it_and_the_next_has_no_place_for_it(strategy: str) -> None:
    server = fleet(strategy=strategy)
    server.send("liar", 2)
    last = misbehave(server)[-1]
    assert (last.participant, last.final) == (False, True), "it is told"
    server.train("a", "b")
    if strategy == "cascade":
        while server.core.has_work:
            server._note(server.core.work())
    assert server.round.round == 2
    record = server.checkpoint().history[0]["devices"]["liar"]
    assert not record["finished"]
    account = record["account"]
    assert account["discarded"]["bad_labels"] == LIMIT
    assert account["produced"] == (
        account["applied"] + sum(account["discarded"].values()) + account["expired"]
    )
    assert server.checkpoint().trained_cuts == [2], "what it had trained is not in the model"
    server.train("a", "b")
    assert server.checkpoint().history[1]["devices"].keys() == {"a", "b"}


def test_its_messages_are_dropped_and_then_heard_again() -> None:
    server = fleet(quarantine_s=60.0)
    misbehave(server)
    assert server.send("liar", 3) == []
    assert server.upload("liar") == []
    assert server.observer.dropped["quarantined"] == 2
    server.train("a", "b")
    server.wait(61)
    refused = only(Receipt, server.send("liar", 0), "liar")
    assert not refused.participant, "this round began without it"
    server.train("a", "b")
    assert server.round.round == 3
    server.train("a", "b", "liar")
    assert "liar" in server.checkpoint().history[2]["devices"]


def test_batches_of_a_joint_step_that_wait_are_refused() -> None:
    server = fleet(strategy="cascade")
    server.send("a", 0)
    server.send("liar", 2)
    misbehave(server)
    assert server.core.has_work, "that of the honest device"
    while server.core.has_work:
        server._note(server.core.work())
    server.train("a", "b")
    while server.core.has_work:
        server._note(server.core.work())
    account = server.checkpoint().history[0]["devices"]["liar"]["account"]
    assert account["applied"] == 0
    assert account["discarded"] == {"bad_labels": LIMIT, "quarantined": 1}


def test_with_nobody_left_the_round_is_given_up_not_closed() -> None:
    server = Harness(min_devices=1, rounds=3, breach_limit=LIMIT)
    server.join("liar", 5)
    misbehave(server)
    assert server.observer.outcomes == [(1, "abandoned")]
    assert server.checkpoint().version == 0
    server.wait(61)
    assert server.round.round == 2, "when its time is over there is a fleet again"


def test_a_run_can_begin_without_those_in_quarantine() -> None:
    server = Harness(min_devices=4, rounds=3, breach_limit=LIMIT, quorum=0.5)
    for name in ("a", "b", "c", "liar"):
        server.online(name)
    for _ in range(LIMIT):
        server.core.guard.breach("liar", "malformed")
    for name in ("a", "b", "c"):
        server.join(name, 2)
    assert server.announced is not None
    assert server.round.round == 1


def test_an_upload_that_is_nonsense_is_a_breach() -> None:
    server = fleet(breach_limit=1)
    server.send("liar", 0)
    server.upload("liar", state=b"rubbish")
    assert server.core.guard.is_held("liar")


def test_what_an_honest_device_may_run_into_is_none() -> None:
    server = fleet(breach_limit=1)
    server.send("liar", 0, version=17)
    server.send("liar", 99)
    server.send("liar", 1, 1)
    assert not server.core.guard.is_held("liar")


def test_status_says_how_long_yet() -> None:
    server = fleet()
    misbehave(server)
    found = server.core.status(Health(ok=True))
    assert found.quarantined == 1
    rows = {row.name: row for row in found.devices}
    assert (rows["liar"].breaches, rows["liar"].quarantine_s) == (LIMIT, 60.0)
    assert (rows["a"].breaches, rows["a"].quarantine_s) == (0, 0.0)


def test_no_message_can_be_larger_than_what_there_is_to_send() -> None:
    server = fleet()
    assert server.core.frame_limits.message_bytes < 4 << 20
    assert DefenceSettings().breach_limit > LIMIT
