"""Processes on a simulated broker: delivery, time, and what may happen to them."""

from __future__ import annotations

import pytest

from broker.drive import INBOX, Subscribe
from broker.envelopes import down, to_all, to_cut
from broker.messages import Coordinator, Manifest, Request, Status
from broker.training_messages import Receipt
from coordinator.errors import StoreError
from ops.simulator import Fault, Killed, LinkProfile
from ops.simulator.connection import SILENCE
from tests.ops.simulator.puppets import TOPICS, Stage, request

RECEIPT = Receipt(run="run", round=1, attempt=0, credits=1)
MANIFEST = Manifest(run="run", version=1, sha256="0" * 64, size=1, trained=False)
ONLINE = Coordinator(state="online", boot="boot")
SILENCE_S = SILENCE * 30.0


def numbers(stage: Stage) -> list[int]:
    return [m.version for m in stage.server.messages if isinstance(m, Request)]


def test_messages_arrive_in_order_after_latency_and_transfer() -> None:
    stage = Stage(device=LinkProfile(up_bytes_per_s=1000.0, latency_s=0.5))
    stage.start()
    stage.run(5.0)
    begin = stage.world.now
    stage.say(request(1, padding=1000), request(2))
    stage.run(20.0)
    assert numbers(stage) == [1, 2]
    first, second = (time - begin for time, _ in stage.server.heard)
    assert 1.5 < first < 1.7
    assert first < second < first + 0.3


def test_large_messages_are_cut_into_frames_and_put_together() -> None:
    stage = Stage()
    stage.start()
    before = stage.broker.routed
    stage.say(request(7, padding=300_000))
    stage.run(1.0)
    assert numbers(stage) == [7]
    assert stage.broker.routed - before == 4


def test_loss_and_jitter_delay_but_keep_the_order() -> None:
    stage = Stage(device=LinkProfile(latency_s=0.01, jitter_s=0.1, loss=0.3), seed=3)
    stage.start()
    stage.run(10.0)
    stage.say(*(request(n) for n in range(200)))
    stage.run(600.0)
    assert numbers(stage) == list(range(200))


def test_a_step_takes_the_time_it_is_charged_and_its_effects_leave_at_its_end() -> None:
    stage = Stage()
    stage.server.cost_s = 2.0
    stage.server.answers[Request] = [down("d1", RECEIPT)]
    stage.start()
    begin = stage.world.now
    stage.say(request(1), request(2))
    stage.run(10.0)
    assert [time - begin for time, _ in stage.device.heard] == pytest.approx([2.0, 4.0])
    assert stage.server_process.tally.busy_s == 4.0


def test_a_slowed_process_takes_longer() -> None:
    stage = Stage()
    stage.server.cost_s = 1.0
    stage.start()
    stage.server_process.slow(5)
    stage.say(request(1))
    stage.run(10.0)
    assert stage.server_process.tally.busy_s == 5.0


def test_what_waits_is_bounded_everywhere() -> None:
    stage = Stage(max_queued=50)
    stage.server.cost_s = 1.0
    stage.start()
    stage.say(*(request(n) for n in range(400)))
    stage.run(1000.0)
    tally, session = stage.server_process.tally, stage.broker.sessions["coordinator"]
    assert tally.most_inbox == INBOX
    assert tally.most_arrived <= 64
    assert session.most_queued <= 50
    assert session.dropped == stage.broker.dropped > 0
    assert len(numbers(stage)) + session.dropped == 400
    assert numbers(stage) == sorted(numbers(stage))


def test_a_device_waits_for_acknowledgements_before_it_does_more() -> None:
    stage = Stage(device=LinkProfile(latency_s=1.0))
    stage.start()
    stage.run(5.0)
    begin = stage.world.now
    stage.say(*(request(n) for n in range(48)))
    stage.run(20.0)
    times = [time - begin for time, _ in stage.server.heard]
    assert [round(time) for time in times] == [1] * 16 + [3] * 16 + [5] * 16


def test_retained_messages_are_said_to_who_subscribes_later() -> None:
    stage = Stage()
    stage.server.greeting = [to_all(ONLINE), down("d1", RECEIPT), to_cut(3, MANIFEST)]
    stage.server_process.start()
    stage.run(1.0)
    stage.device_process.start()
    stage.run(1.0)
    assert stage.device.messages == [ONLINE]
    stage.say(Subscribe(TOPICS.cut_filters(3)))
    stage.run(1.0)
    assert stage.device.messages == [ONLINE, MANIFEST]


def test_subscriptions_replace_each_other_and_are_made_again() -> None:
    stage = Stage()
    stage.start()
    stage.say(Subscribe(TOPICS.cut_filters(2)))
    stage.run(1.0)
    stage.say(Subscribe(TOPICS.cut_filters(3)))
    stage.run(1.0)
    stage.device_process.drop_connection()
    stage.run(60.0)
    stage.server.on_tick = [to_cut(2, MANIFEST), to_cut(3, MANIFEST)]
    stage.server.machines[-1].next_tick = stage.world.now
    stage.server_process._look()
    stage.run(1.0)
    assert [m for m in stage.device.messages if isinstance(m, Manifest)] == [MANIFEST]


class TestDeath:
    def statuses(self, stage: Stage) -> list[str]:
        return [m.connection for m in stage.server.messages if isinstance(m, Status)]

    @pytest.mark.parametrize("power_cut", [False, True])
    def test_the_will_comes_after_its_delay(self, *, power_cut: bool) -> None:
        stage = Stage()
        stage.device.will_delay_s = 20
        stage.start()
        died = stage.world.now
        stage.device_process.kill(power_cut=power_cut)
        stage.run(200.0)
        ((time, status),) = stage.server.heard
        assert (status.state, status.connection) == ("offline", "life-0")
        assert time - died == pytest.approx(20 + (SILENCE_S if power_cut else 0))

    def test_no_will_for_who_is_back_before_its_delay(self) -> None:
        stage = Stage()
        stage.device.will_delay_s = 20
        stage.start()
        stage.device_process.drop_connection()
        stage.run(100.0)
        assert stage.device_process.connected
        assert not stage.server.heard

    def test_a_new_life_ends_the_session_of_the_old_one_with_its_will(self) -> None:
        stage = Stage()
        stage.device.will_delay_s = 20
        stage.start()
        stage.device_process.restart()
        stage.run(5.0)
        assert self.statuses(stage) == ["life-0"]

    def test_a_machine_that_has_finished_leaves_without_its_will(self) -> None:
        stage = Stage()
        stage.start()
        stage.device.machines[-1].finished = True
        stage.device_process._look()
        stage.run(200.0)
        assert stage.device_process.over
        assert not stage.server.heard
        assert "d1" not in stage.broker.sessions

    def test_killed_in_a_step(self) -> None:
        stage = Stage()
        stage.start()
        stage.device.crash = Killed()
        stage.say()
        stage.run(1.0)
        assert not stage.device_process.alive
        assert stage.device_process.failure is None

    def test_an_error_is_a_failure(self) -> None:
        stage = Stage()
        stage.start()
        error = StoreError("full")
        stage.device.crash = error
        stage.say()
        stage.run(1.0)
        assert stage.device_process.failure is error


class TestSilence:
    def test_a_short_partition_only_delays(self) -> None:
        stage = Stage()
        stage.start()
        stage.device_process.partition()
        stage.say(request(1))
        stage.run(20.0)
        assert not stage.server.heard
        stage.device_process.heal()
        stage.run(1.0)
        assert numbers(stage) == [1]
        assert len(stage.device.events) == 1, "it never lost its connection"

    def test_a_long_partition_is_noticed_by_both_ends(self) -> None:
        stage = Stage()
        stage.start()
        began = stage.world.now
        stage.device_process.partition()
        stage.run(200.0)
        assert stage.device.events[1] == (began + SILENCE_S, "disconnected")
        (status,) = stage.server.messages
        assert status.state == "offline"
        stage.device_process.heal()
        stage.run(60.0)
        assert stage.device.events[-1][1] == "connected"

    def test_a_frozen_process_goes_on_where_it_stood(self) -> None:
        stage = Stage()
        stage.start()
        stage.server_process.freeze()
        stage.say(request(1), request(2))
        stage.run(20.0)
        assert not stage.server.heard
        stage.server_process.thaw()
        stage.run(1.0)
        assert numbers(stage) == [1, 2]

    def test_who_was_frozen_for_long_finds_its_connection_gone_and_loses_nothing(self) -> None:
        stage = Stage()
        stage.start()
        stage.server_process.freeze()
        stage.say(*(request(n) for n in range(100)))
        stage.run(300.0)
        stage.server_process.thaw()
        stage.run(60.0)
        assert [event for _, event in stage.server.events] == [
            "connected",
            "disconnected",
            "connected",
        ]
        assert sorted(set(numbers(stage))) == list(range(100))

    def test_what_was_not_acknowledged_comes_again(self) -> None:
        stage = Stage(coordinator=LinkProfile(latency_s=0.5))
        stage.start()
        stage.run(5.0)
        stage.say(request(1))
        stage.run(0.6)
        assert numbers(stage) == [1]
        stage.server_process.drop_connection()  # its acknowledgement is still under way
        stage.run(60.0)
        assert numbers(stage) == [1, 1]


class TestBroker:
    def test_killed_and_back_with_its_sessions_it_has_lost_nothing_and_may_say_it_again(
        self,
    ) -> None:
        stage = Stage()
        stage.start()
        stage.server_process.freeze()
        stage.say(request(1))
        stage.run(1.0)
        stage.broker.kill()
        stage.server_process.thaw()
        stage.run(20.0)
        stage.broker.restart()
        stage.run(60.0)
        assert numbers(stage) == [1, 1]
        assert stage.device_process.connected

    def test_without_its_sessions_what_waited_is_lost_and_everybody_comes_back(self) -> None:
        stage = Stage()
        stage.start()
        stage.server_process.freeze()
        stage.say(request(1))
        stage.run(1.0)
        stage.broker.kill()
        stage.broker.restart(keep_sessions=False)
        stage.run(1.0)
        stage.server_process.thaw()
        stage.run(60.0)
        stage.say(request(2))
        stage.run(1.0)
        assert 2 in numbers(stage)

    @pytest.mark.parametrize("seconds", [20.0, 200.0])
    def test_frozen(self, seconds: float) -> None:
        stage = Stage()
        stage.start()
        stage.broker.freeze()
        stage.say(request(1))
        stage.run(seconds)
        stage.broker.thaw()
        stage.run(60.0)
        assert numbers(stage) == [1]
        disconnections = [e for _, e in stage.device.events if e == "disconnected"]
        assert bool(disconnections) == (seconds > SILENCE_S)
        assert stage.device_process.connected

    def test_a_slow_broker_takes_its_time_for_every_packet(self) -> None:
        stage = Stage()
        stage.start()
        stage.broker.service_s = 1.0
        begin = stage.world.now
        stage.say(request(1), request(2))
        stage.run(10.0)
        assert [time - begin for time, _ in stage.server.heard] == pytest.approx([1.0, 2.0])

    def test_a_session_expires(self) -> None:
        stage = Stage()
        stage.start()
        stage.device_process.kill()
        stage.run(3599.0)
        assert "d1" in stage.broker.sessions
        stage.run(2.0)
        assert "d1" not in stage.broker.sessions


class TestClock:
    def test_a_jump_makes_what_was_due_overdue(self) -> None:
        stage = Stage()
        stage.start()
        stage.device.machines[-1].next_tick = stage.world.now + 1000
        stage.device_process._look()
        stage.device_process.jump_clock(2000.0)
        stage.run(1.0)
        (time,) = stage.device.ticks
        assert time == pytest.approx(2001.0)

    def test_ticks_come_in_time(self) -> None:
        stage = Stage()
        stage.start()
        due = stage.world.now + 0.1 + 0.2
        stage.device.machines[-1].next_tick = due
        stage.device_process._look()
        stage.run(10.0)
        assert stage.device.ticks == [pytest.approx(due)]


class TestFaults:
    def stage(self, fault: Fault) -> Stage:
        stage = Stage()
        stage.broker.faults.add(fault)
        stage.start()
        stage.say(*(request(n) for n in range(10)))
        stage.run(100.0)
        return stage

    def test_lost(self) -> None:
        fault = Fault("lose", kind="request", times=3)
        assert numbers(self.stage(fault)) == list(range(3, 10))
        assert fault.hits == 3

    def test_duplicated(self) -> None:
        said = numbers(self.stage(Fault("duplicate", kind="request", way="up", device="d1")))
        assert said == [*range(10), *range(10)]

    def test_reordered(self) -> None:
        said = numbers(self.stage(Fault("reorder", kind="request", share=0.5)))
        assert said != list(range(10))
        assert sorted(said) == list(range(10))

    def test_late(self) -> None:
        stage = self.stage(Fault("late", kind="request", times=1, delay_s=50.0))
        assert numbers(stage) == [*range(1, 10), 0]

    @pytest.mark.parametrize("action", ["truncate", "flip"])
    def test_damaged_messages_are_dropped(self, action: str) -> None:
        stage = self.stage(Fault(action, kind="request", times=4))  # type: ignore[arg-type]
        # A flipped bit of the frame's number changes nothing.
        assert set(range(4, 10)) <= set(numbers(stage)) <= set(range(10))

    def test_only_what_is_meant_is_hit(self) -> None:
        for fault in (
            Fault("lose", kind="activations"),
            Fault("lose", way="down"),
            Fault("lose", device="d2"),
            Fault("lose", end=0.5),
            Fault("lose", share=0.0),
        ):
            assert numbers(self.stage(fault)) == list(range(10)), fault
