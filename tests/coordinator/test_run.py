"""Late work, rounds without a barrier, samples of the fleet: what the run makes of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from broker.messages import Assignment, Manifest, Request
from broker.training_messages import Gradients, Receipt, Round
from coordinator.contribution import discount
from coordinator.rounds import Work
from coordinator.workload import Workload
from tests.fake_coordinator import Harness, every, only
from tests.fake_device import make_measurement
from tests.server_side import (
    START,
    make_activations,
    make_upload,
    poisoned_features,
    trained_half,
)
from tests.tiny import assert_same, make_hello, make_settings

HEAD = "heads.5.0.fc.weight"
"""Held by devices at cut 5 only."""


def missed(**settings: Any) -> tuple[Harness, Round]:
    """``b`` has sent one batch and missed the end of round 1; that round's announcement."""
    fields: dict[str, Any] = {"min_devices": 2, "round_deadline_s": 100, "rounds": 6}
    server = Harness(**(fields | settings))
    server.join("a", 2)
    server.join("b", 5)
    first = server.round
    server.send("a", 0)
    server.send("b", 0)
    server.upload("a")
    server.wait(101)
    assert server.round.round == 2
    return server, first


def upload_late(server: Harness, announced: Round) -> Receipt:
    late = make_upload(announced.stamp, cut=5, version=announced.version, produced=2)
    return only(Receipt, server.hear("b", late), "b")


def close_round(server: Harness) -> None:
    """The running round closes with the work of ``a`` alone."""
    server.send("a", 0)
    server.upload("a")
    server.wait(101)


# -- late work ------------------------------------------------------------------------------------


def test_late_work_is_folded_into_the_running_round_as_a_difference() -> None:
    server, first = missed()
    assert_same({HEAD: server.checkpoint().model.state[HEAD]}, {HEAD: START.state[HEAD]})
    receipt = upload_late(server, first)
    assert receipt.final
    assert receipt.stamp == first.stamp
    close_round(server)
    checkpoint = server.checkpoint()
    difference = trained_half(5)[HEAD] - START.state[HEAD]
    np.testing.assert_allclose(
        checkpoint.model.state[HEAD],
        START.state[HEAD] + discount(1) * difference,
        rtol=1e-5,
        err_msg="also where nobody else holds it",
    )
    assert checkpoint.trained_cuts == [2, 5]
    assert server.observer.late == [("folded", 8)]
    (late,) = checkpoint.history[1]["late"]
    assert late == {"device": "b", "version": 0, "staleness": 1, "samples": 8}
    entry = checkpoint.history[0]["devices"]["b"]
    assert entry["finished"], "the record of its own round knows that it came after all"
    assert entry["account"] == {"produced": 2, "applied": 1, "discarded": {}, "expired": 1}


def test_late_work_counts_less_than_work_of_the_round() -> None:
    """Its difference is divided by √2; it weighs its 8 samples against 8 of ``a``."""
    server, first = missed()
    before = server.checkpoint().model.state
    upload_late(server, first)
    server.send("a", 0)
    server.upload("a")
    server.wait(101)
    name = "blocks.1.conv1.weight"
    assert discount(1) == pytest.approx(1 / math.sqrt(2))
    late = before[name] + discount(1) * (trained_half(5)[name] - START.state[name])
    expected = (trained_half(2)[name] + late) / 2
    np.testing.assert_allclose(server.checkpoint().model.state[name], expected, rtol=1e-5)


def test_both_halves_come_late_together() -> None:
    """Until the device comes, what its replica learnt is not in the model either."""
    server, _ = missed()
    alone = Harness(min_devices=1, rounds=6)
    alone.join("a", 2)
    alone.send("a", 0)
    alone.upload("a")
    one, other = server.checkpoint().model.state, alone.checkpoint().model.state
    server_only = [name for name in START.state if name.startswith("blocks.8.")]
    assert_same({n: one[n] for n in server_only}, {n: other[n] for n in server_only})


def test_late_work_comes_at_most_once() -> None:
    server, first = missed()
    for _ in range(3):
        assert upload_late(server, first).final
    close_round(server)
    assert server.observer.late == [("folded", 8)]


@pytest.mark.parametrize(("max_staleness", "outcome"), [(1, "folded"), (0, "too_late")])
def test_beyond_the_bound_it_is_dropped_and_counted(max_staleness: int, outcome: str) -> None:
    server, first = missed(max_staleness=max_staleness)
    assert upload_late(server, first).final
    close_round(server)
    expected = [(outcome, 8)] if max_staleness else [("not_kept", 8)]
    assert server.observer.late == expected


def test_what_a_device_never_comes_back_for_is_counted() -> None:
    server, _ = missed(max_staleness=1)
    assert server.observer.late == [], "it may still come"
    close_round(server)
    assert server.observer.late == [("not_brought", 8)]


def test_at_the_end_of_the_run_too() -> None:
    server, _ = missed(rounds=2)
    close_round(server)
    assert server.observer.late == [("not_brought", 8)]


def test_a_round_that_nobody_remembers_is_answered_with_a_refusal() -> None:
    server, first = missed(max_staleness=1)
    close_round(server)
    close_round(server)
    receipt = upload_late(server, first)
    assert (receipt.final, receipt.participant) == (True, False)
    assert server.observer.dropped["stale_attempt"] == 1


def test_work_for_a_round_that_was_abandoned_is_void() -> None:
    server = Harness(min_devices=3, quorum=1.0, round_deadline_s=100)
    for name in "abc":
        server.join(name, 5)
    first = server.round
    server.send("b", 0)
    server.wait(201)
    assert server.observer.outcomes[-1] == (1, "abandoned")
    assert not upload_late(server, first).participant
    assert server.observer.late == []


def test_a_batch_for_the_round_before_changes_nothing() -> None:
    server, first = missed()
    assert server.hear("b", make_activations(first.stamp, 1, cut=5, version=0)) == []
    assert server.observer.discarded["stale_attempt"] == 1


# -- who takes part, for how long -----------------------------------------------------------------


def test_a_share_of_the_fleet_takes_part_and_the_others_are_told() -> None:
    server = Harness(min_devices=4, participation=0.5)
    for name in "abcd":
        server.join(name, 2)
    run, number, attempt = server.round.stamp
    ask = Request(what="join", run=run, round=number, attempt=attempt)
    told = {name: only(Receipt, server.hear(name, ask)).participant for name in "abcd"}
    assert sum(told.values()) == 2
    for name in "abcd":
        if told[name]:
            server.send(name, 0)
            server.upload(name)
    assert server.observer.outcomes == [(1, "closed")]


def test_a_fleet_too_large_for_the_brokers_queue_takes_turns(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = Harness(min_devices=4, queue_chunks=3, rounds=9)
    for name in "abcd":
        server.join(name, 2)
    took_part = set()
    for _ in range(8):
        run, number, attempt = server.round.stamp
        ask = Request(what="join", run=run, round=number, attempt=attempt)
        told = [name for name in "abcd" if only(Receipt, server.hear(name, ask)).participant]
        assert len(told) == 2
        took_part |= set(told)
        for name in told:
            server.send(name, 0)
            server.upload(name)
    assert took_part == set("abcd")
    assert "only 2 of 4 devices take part at a time" in caplog.text


def test_the_deadline_follows_what_rounds_took_before() -> None:
    server = Harness(min_devices=3, rounds=9, round_deadline_s=500, deadline_mads=8.0)
    for name in "abc":
        server.join(name, 2)
    assert server.round.deadline_s == 500
    server.clock.advance(30)
    server.train("a", "b", "c")
    assert server.round.deadline_s == pytest.approx(30 * 1.8)
    again = Harness(server.folder, min_devices=3, rounds=9, round_deadline_s=500)
    for name in "abc":
        again.join(name, 2)
    assert again.round.deadline_s == pytest.approx(30 * 1.8), "a restart knows it too"
    again.wait(3 * 60)
    assert again.observer.outcomes == [(2, "extended"), (2, "abandoned")]
    assert again.round.deadline_s == 500, "nothing is known any more"


def test_rounds_by_time_let_devices_train_for_so_long() -> None:
    server = Harness(round_seconds=20.0, batches_per_round=None)
    server.join("a", 2)
    assert server.round.train_s == 20
    run, number, attempt = server.round.stamp
    receipt = only(
        Receipt,
        server.hear("a", Request(what="join", run=run, round=number, attempt=attempt)),
    )
    assert receipt.quota == 65_536


def test_a_device_that_is_always_late_gets_less_work_and_then_a_shallower_cut() -> None:
    server = Harness(min_devices=2, rounds=40, round_deadline_s=100, batches_per_round=8)
    server.join("a", 2)
    server.online("b")
    server.hear("b", make_hello(cut=None, measurement=make_measurement()))
    server.cuts["b"] = 9
    quotas, cuts = [], []
    for _ in range(8):
        run, number, attempt = server.round.stamp
        ask = Request(what="join", run=run, round=number, attempt=attempt)
        quotas.append(only(Receipt, server.hear("b", ask)).quota)
        server.send("b", 0)
        close_round(server)
        assigned = every(Assignment, server.said, "b")
        cuts.append(assigned[-1].cut)
    assert quotas == [8, 8, 4, 4, 2, 2, 1, 1]
    assert cuts == [9] * 7 + [8]
    assert ("b", 8, 0.5) in server.observer.changed


def test_by_time_nobody_has_too_much_to_do() -> None:
    server = Harness(min_devices=2, rounds=9, round_deadline_s=100, round_seconds=20.0)
    server.join("a", 2)
    server.online("b")
    server.hear("b", make_hello(cut=None, measurement=make_measurement()))
    server.cuts["b"] = 9
    for _ in range(8):
        server.send("b", 0)
        close_round(server)
    assert server.observer.changed == []


# -- without a barrier ----------------------------------------------------------------------------


def buffered(**settings: Any) -> Harness:
    fields: dict[str, Any] = {
        "aggregation": "buffered",
        "buffer_size": 2,
        "max_staleness": 3,
        "rounds": 5,
        "round_deadline_s": 100,
    }
    server = Harness(**(fields | settings))
    for name, cut in (("a", 2), ("b", 2), ("c", 5)):
        server.join(name, cut)
    return server


def enter(server: Harness, device: str) -> Receipt:
    run, number, attempt = server.round.stamp
    ask = Request(what="join", run=run, round=number, attempt=attempt)
    return only(Receipt, server.hear(device, ask), device)


def test_a_version_comes_after_so_many_contributions_and_nobody_waits() -> None:
    server = buffered()
    assert not server.round.barrier
    for name in "abc":
        enter(server, name)
    server.send("c", 0)
    first = server.round
    for name in "ab":
        server.send(name, 0)
        server.upload(name)
    assert (server.round.round, server.round.version) == (2, 1)
    said = server.hear("c", make_activations(first.stamp, 1, cut=5, version=0))
    assert every(Gradients, said, "c"), "it goes on where it was"
    upload_c = make_upload(first.stamp, cut=5, version=0, produced=2)
    assert only(Receipt, server.hear("c", upload_c), "c").final
    assert server.observer.late == [("folded", 16)]


def test_a_fast_device_may_contribute_again_to_the_same_version() -> None:
    server = buffered(buffer_size=3)
    for leg in range(3):
        receipt = enter(server, "a")
        assert (receipt.next_batch, receipt.quota) == (leg, leg + 3)
        server.send("a", leg)
        server.upload("a", produced=leg + 1)
    assert server.round.version == 1
    (record,) = server.checkpoint().history
    assert record["devices"]["a"]["samples"] == 24


def test_a_buffer_that_does_not_fill_closes_at_the_deadline_and_an_empty_one_waits() -> None:
    server = buffered()
    server.wait(150)
    assert server.observer.outcomes == [(1, "extended")]
    enter(server, "a")
    server.send("a", 0)
    server.upload("a")
    server.wait(100)
    assert server.observer.outcomes == [(1, "extended"), (1, "closed")]


def test_work_of_an_attempt_that_nobody_remembers_is_ended_at_once() -> None:
    server = buffered(max_staleness=1, buffer_size=1)
    enter(server, "c")
    first = server.round
    for _ in range(3):
        enter(server, "a")
        server.send("a", 0)
        server.upload("a")
    told = only(Receipt, server.hear("c", make_activations(first.stamp, 0, cut=5, version=0)))
    assert (told.final, told.participant) == (True, False)


def test_a_buffer_needs_a_copy_for_each_device() -> None:
    with pytest.raises(ValidationError, match="needs strategy = averaging"):
        Harness(aggregation="buffered", strategy="sequential")


# -- batches that wait for each other -------------------------------------------------------------


def cascade(**settings: Any) -> Harness:
    server = Harness(strategy="cascade", min_devices=3, rounds=3, **settings)
    for name, cut in (("a", 2), ("b", 2), ("c", 5)):
        server.join(name, cut)
    return server


def test_a_cascade_trains_on_what_has_come_when_there_is_nothing_else_to_do() -> None:
    server = cascade()
    for name in "abc":
        assert server.send(name, 0) == [], "they wait for each other"
    assert server.core.has_work
    answered = server.core.work()
    assert [e.address.device for e in answered if isinstance(e.message, Gradients)] == [
        "a",
        "b",
        "c",
    ]
    assert not server.core.has_work


def test_a_cascade_takes_one_batch_of_a_device_at_a_time() -> None:
    server = cascade()
    server.send("a", 0, 1)
    server.send("c", 0)
    batches = []
    while server.core.has_work:
        sent = every(Gradients, server.core.work())
        batches.append([gradient.batch for gradient in sent])
    assert batches == [[0, 0], [1]]


def test_a_batch_that_waits_is_taken_once_however_often_it_comes() -> None:
    server = cascade()
    server.send("a", 0)
    assert only(Receipt, server.send("a", 0)).complete
    assert len(every(Gradients, server.core.work())) == 1
    assert not server.core.has_work
    assert every(Gradients, server.send("a", 0)), "the same answer again"


def test_what_waits_is_trained_on_before_its_device_finishes_and_before_the_merge() -> None:
    server = cascade(feedback="none", quorum=0.3)
    server.send("a", 0)
    server.upload("a")
    server.send("b", 0)
    server.wait(101)
    accounts = {
        name: entry["account"] for name, entry in server.checkpoint().history[0]["devices"].items()
    }
    assert accounts["a"]["applied"] == accounts["b"]["applied"] == 1


def test_answers_to_what_waited_reach_everybody_when_another_device_finishes() -> None:
    server = cascade(quorum=0.3)
    server.send("a", 0)
    server.send("b", 0)
    assert every(Gradients, server.upload("b"), "a")
    server.send("a", 1)
    server.send("c", 0)
    said = server.wait(101)
    assert every(Gradients, said, "a"), "and when the round closes"


def test_one_bad_batch_in_a_cascade_is_discarded_alone() -> None:
    server = cascade()
    server.send("a", 0)
    assert only(Receipt, server.send("b", 0, tensor=poisoned_features())).discarded
    server.send("c", 0)
    assert len(every(Gradients, server.core.work())) == 2


def test_a_cascade_and_its_rounds_come_to_an_end() -> None:
    server = cascade()
    for _ in range(3):
        for batch in range(3):
            for name in "abc":
                server.send(name, batch)
        while server.core.has_work:
            server.core.work()
        for name in "abc":
            server.upload(name)
    assert server.checkpoint().round == 3


# -- the coordinator's own connection -------------------------------------------------------------


def test_while_the_coordinator_hears_nobody_no_deadline_passes() -> None:
    server = Harness(min_devices=2, round_deadline_s=100, quorum=1.0)
    server.join("a", 2)
    server.join("b", 2)
    server.wait(60)
    server.core.disconnected()
    server.wait(500)
    assert server.observer.outcomes == []
    server.reconnect()
    server.wait(39)
    assert server.observer.outcomes == []
    server.wait(2)
    assert server.observer.outcomes == [(1, "extended")]


def test_a_manifest_is_said_once_and_again_on_a_new_connection() -> None:
    server = Harness(min_devices=9)
    for name in "abc":
        server.join(name, 2)
    assert len(every(Manifest, server.said)) == 1
    assert len(every(Manifest, server.reconnect())) == 1


def test_a_stranger_to_a_round_that_has_closed_changes_nothing() -> None:
    server, first = missed()
    server.join("c", 2)
    upload = make_upload(first.stamp, cut=2, version=0, produced=3)
    assert not only(Receipt, server.hear("c", upload)).participant
    assert "c" not in server.checkpoint().history[0]["devices"]


# -- what the hostile tried -----------------------------------------------------------------------


def test_late_work_outlives_a_round_that_is_given_up() -> None:
    server, first = missed(max_staleness=5)
    assert upload_late(server, first).final
    server.wait(201)
    assert server.observer.outcomes[-1] == (2, "abandoned")
    assert server.observer.late == []
    server.send("a", 0)
    server.send("b", 0)
    server.upload("a")
    server.upload("b")
    assert server.observer.late == [("folded", 8)]
    assert [late["device"] for late in server.checkpoint().history[-1]["late"]] == ["b"]


def test_the_deadline_is_of_all_devices_not_of_the_last_by_name() -> None:
    paces = {f"a{i:03}": (2, 10.0) for i in range(70)} | {f"z{i:03}": (2, 1.0) for i in range(64)}
    renamed = {f"x{index}": pace for index, pace in enumerate(reversed(paces.values()))}
    deadlines = [
        Workload(make_settings(), {"paces": dict(each)}).deadline([Work(2, 1)])
        for each in (paces, renamed)
    ]
    assert deadlines[0] == deadlines[1] > 10


def test_without_a_barrier_the_dead_take_nobodys_place() -> None:
    server = buffered(queue_chunks=3, buffer_size=1)
    assert enter(server, "a").participant
    assert enter(server, "b").participant
    assert not enter(server, "c").participant, "no room in the broker's queue"
    said = server.offline("a")
    assert only(Receipt, said, "c").participant, "it is called in"
    server.send("c", 0)
    server.upload("c")
    assert server.observer.outcomes == [(1, "closed")]


def test_a_device_that_never_comes_back_is_counted_without_a_barrier_too() -> None:
    server = buffered(buffer_size=1, max_staleness=1)
    enter(server, "c")
    server.send("c", 0)
    for _ in range(3):
        enter(server, "a")
        server.send("a", 0)
        server.upload("a")
    assert ("not_brought", 8) in server.observer.late


def test_stale_joins_are_answered_together() -> None:
    server, first = missed()
    run, number, attempt = first.stamp
    ask = Request(what="join", run=run, round=number, attempt=attempt)
    answers = [every(Round, server.hear(name, ask)) for name in "abab"]
    assert [len(answer) for answer in answers] == [1, 0, 0, 0]
