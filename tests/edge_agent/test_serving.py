from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from broker.envelopes import Envelope, down, to_all, to_cut
from broker.fields import Message
from broker.messages import Assignment, Coordinator, Manifest, Request
from broker.serving_messages import CutPolicy, Features, Prediction, Serving
from edge_agent.answers import Answer, Answers, Predictor
from edge_agent.enquiries import Enquiry
from edge_agent.errors import AgentError, AssignmentError, NotReady, StateError
from edge_agent.exit_policy import ExitPolicy, Limits
from edge_agent.served import DiskServed, Served
from edge_agent.serving import GRACE_S, SAVE_WITHIN_S, ServingMachine
from tests.fake_device import DEVICE, FakePredictor, make_manifest, make_parameters
from tests.fake_device import probabilities_of as probabilities
from tests.tiny import RUN, SIZE, Array, Clock, make_assignment, make_serving

State = Mapping[str, Array]


class MemoryServed:
    def __init__(self) -> None:
        self.kept: Served | None = None
        self.broken = False
        self.saves = 0

    def save(self, served: Served) -> None:
        if self.broken:
            raise StateError("no space")
        self.saves += 1
        self.kept = served

    def load(self) -> Served | None:
        if self.broken:
            raise StateError("damaged")
        return self.kept


class Device:
    """A serving machine driven by hand."""

    def __init__(self, store: MemoryServed | None = None, clock: Clock | None = None) -> None:
        self.clock = clock or Clock()
        self.store = store or MemoryServed()
        self.built: list[tuple[Assignment, float]] = []
        self.has_program = True
        policy = ExitPolicy(Limits(), seed=0, clock=self.clock)
        self.machine = ServingMachine(
            DEVICE,
            Answers(policy, clock=self.clock),
            policy,
            build=self.build,
            store=self.store,
            clock=self.clock,
        )
        self.done: list[Answer | AgentError] = []

    def build(self, assignment: Assignment, state: State) -> Predictor:
        if assignment.network.name != "resnet18":
            raise AssignmentError("not allowed")
        if not self.has_program:
            raise NotReady("no program yet")
        self.built.append((assignment, float(state["weight"][0])))
        return FakePredictor()

    def hear(self, *messages: Message, cut: int = 2) -> list[Message]:
        out: list[Message] = []
        for message in messages:
            out += said(self.machine.receive(envelope(message, cut)))
        return out

    def hand(self, version: int, weight: float = 1.0, **changes: Any) -> None:
        state = {"weight": np.array([weight], np.float32)}
        assert self.machine.handed(make_assignment(**changes), version, state) == []

    def serve(self, version: int = 1) -> None:
        """Come to answer with this version."""
        self.machine.connected()
        self.hand(version)
        self.hear(make_assignment(), make_serving(version))

    def ask(self, sure: float, answer: int = 1, deadline_s: float | None = None) -> Enquiry:
        pixels = np.zeros((1, 1, SIZE, SIZE), np.float32)
        pixels[0, 0, 0, :2] = answer, sure
        enquiry = Enquiry(pixels, None, deadline_s, self.clock.now, self.done.append)
        self.machine.ask(enquiry)
        return enquiry

    def work(self) -> list[Message]:
        out: list[Message] = []
        for _ in range(20):
            if not self.machine.has_work:
                return out
            out += said(self.machine.work())
        raise AssertionError("the work never ends")

    def wait(self, seconds: float) -> list[Message]:
        out: list[Message] = []
        end = self.clock.now + seconds
        while (due := self.machine.next_tick) is not None and due <= end:
            self.clock.now = max(self.clock.now, due)
            out += said(self.machine.tick())
        self.clock.now = end
        return out

    def answer(self) -> Answer:
        (answer,) = self.done
        assert isinstance(answer, Answer)
        self.done.clear()
        return answer


def said(effects: Any) -> list[Message]:
    for effect in effects:
        assert effect.address.device == DEVICE
    return [effect.message for effect in effects]


def envelope(message: Message, cut: int) -> Envelope:
    match message:
        case Serving() | Coordinator():
            return to_all(message)
        case Manifest():
            return to_cut(cut, message)
        case _:
            return down(DEVICE, message)


def features(messages: list[Message]) -> Features:
    (found,) = messages
    assert isinstance(found, Features)
    return found


def test_it_answers_with_the_version_that_is_served_once_the_training_half_holds_it() -> None:
    device = Device()
    device.machine.connected()
    device.hear(make_assignment(), make_serving(1))
    assert device.machine.health().version is None
    device.hand(1, 5.0)
    health = device.machine.health()
    assert (health.run, health.version, health.cut, health.online) == (RUN, 1, 2, True)
    assert [weight for _, weight in device.built] == [5.0]
    device.ask(0.9)
    assert device.work() == []
    assert device.answer().by == ("exit",)
    device.ask(0.1)
    asked = features(device.work())
    device.hear(Prediction(request=asked.request, version=1, tensor=probabilities(3)))
    assert device.answer().labels.tolist() == [3]


def test_parameters_may_be_handed_over_before_they_serve() -> None:
    device = Device()
    for version in range(1, 5):
        device.hand(version, float(version))
    device.hear(make_assignment(), make_serving(3))
    assert device.machine.health().version == 3
    assert [weight for _, weight in device.built] == [3.0]
    assert device.machine.next_tick is None, "nothing is missing"


def test_a_version_nobody_hands_over_is_asked_for_until_it_comes() -> None:
    device = Device()
    device.serve(5)
    assert device.hear(make_serving(2)) == []
    assert device.wait(GRACE_S - 0.1) == []
    assert device.wait(0.2) == [Request(what="parameters", version=2)]
    assert device.wait(60), "again"
    assert device.machine.health().version == 5, "meanwhile"
    assert device.hear(make_parameters(3), make_parameters(2, run="another")) == []
    assert device.machine.health().version == 5
    device.hear(make_parameters(2, 7.0))
    assert device.machine.health().version == 2
    assert device.built[-1][1] == 7.0
    assert device.wait(100) == []


def test_after_a_reconnection_the_open_question_is_said_again() -> None:
    device = Device()
    device.machine.connected()
    device.hear(make_assignment(), make_serving(2))
    device.wait(GRACE_S)
    device.machine.disconnected()
    assert said(device.machine.connected()) == [Request(what="parameters", version=2)]


def test_nothing_is_asked_for_what_the_training_half_brings_in_time() -> None:
    device = Device()
    device.hear(make_assignment(), make_serving(2))
    device.wait(GRACE_S / 2)
    device.hand(2)
    assert device.wait(100) == []


def test_parameters_that_are_not_what_they_should_be_do_not_serve() -> None:
    device = Device()
    device.serve(1)
    device.hear(make_serving(2), make_manifest(2, 10.0))
    device.wait(GRACE_S)
    device.hear(make_parameters(2, 11.0))
    assert device.machine.health().version == 1
    device.hear(make_parameters(2, state=b"rubbish"), make_parameters(2, base=1))
    assert device.machine.health().version == 1
    device.hear(make_parameters(2, 10.0))
    assert device.machine.health().version == 2


def test_a_manifest_of_another_cut_says_nothing_of_these() -> None:
    device = Device()
    device.machine.connected()
    device.hear(make_assignment(), make_serving(2))
    device.hear(make_manifest(2, 99.0), cut=3)
    device.wait(GRACE_S)
    device.hear(make_parameters(2, 10.0))
    assert device.machine.health().version == 2


@pytest.mark.parametrize("weight", [np.nan, np.inf])
def test_what_is_not_finite_never_serves(weight: float) -> None:
    device = Device()
    device.serve(1)
    device.hand(2, weight)
    device.hear(make_serving(2))
    assert device.machine.health().version == 1
    assert device.wait(100) == [], "the coordinator has no other"
    device.hand(3)
    device.hear(make_serving(3))
    assert device.machine.health().version == 3


def test_an_untrained_exit_never_answers() -> None:
    device = Device()
    device.machine.connected()
    device.hand(1)
    device.hear(make_assignment(), make_serving(1, cuts={"3": CutPolicy(threshold=0.5)}))
    device.ask(0.9)
    (error,) = device.done
    assert isinstance(error, NotReady)
    assert device.wait(100) == []


def test_a_network_this_device_does_not_allow_is_not_built() -> None:
    device = Device()
    device.serve(1)
    network = make_assignment().network.model_copy(update={"name": "their.own:network"})
    other = make_assignment(run="another", network=network)
    device.hear(other, make_serving(1, run="another"))
    device.machine.handed(other, 1, {"weight": np.ones(1, np.float32)})
    assert device.machine.health().run == RUN


def test_what_has_no_program_yet_is_asked_for_again() -> None:
    device = Device()
    device.has_program = False
    device.serve()
    assert device.machine.health().version is None
    (request,) = device.wait(GRACE_S)
    assert isinstance(request, Request)
    device.has_program = True
    device.hear(make_parameters(1))
    assert device.machine.health().version == 1


def test_a_new_policy_for_the_same_version_is_followed_without_building_anew() -> None:
    device = Device()
    device.serve(1)
    device.hear(make_serving(1, cuts={"2": CutPolicy(threshold=0.95)}))
    assert device.machine.health().threshold == 0.95
    device.ask(0.9)
    features(device.work())
    assert len(device.built) == 1


def test_the_coordinator_is_asked_only_while_it_is_there() -> None:
    device = Device()
    device.serve(1)
    device.ask(0.1)
    device.work()
    device.hear(Coordinator(state="offline", boot="b"))
    assert device.answer().reasons == ("offline",)
    device.ask(0.1)
    assert device.work() == []
    assert device.answer().reasons == ("offline",)
    device.hear(Coordinator(state="online", boot="c"))
    device.ask(0.1)
    features(device.work())
    device.machine.disconnected()
    assert device.answer().reasons == ("offline",)
    assert not device.machine.health().online
    device.machine.connected()
    assert device.machine.health().online


def test_what_another_network_would_be_asked_is_not_asked() -> None:
    device = Device()
    device.serve(1)
    device.ask(0.1)
    device.work()
    device.hear(make_assignment(cut=3))
    assert device.answer().reasons == ("offline",), "features at cut 2 mean nothing at cut 3"
    device.ask(0.9)
    device.work()
    assert device.answer().by == ("exit",), "the exit answers all the same"
    device.machine.handed(make_assignment(cut=3), 1, {"weight": np.ones(1, np.float32)})
    assert device.machine.health().cut == 3
    assert device.machine.health().online
    device.hear(make_serving(1, run="another"))
    assert not device.machine.health().online


def test_a_restarted_device_answers_before_it_has_a_connection(tmp_path: Path) -> None:
    device = Device()
    device.serve(4)
    device.work()
    kept = device.store
    assert kept.saves == 1
    again = Device(kept)
    again.ask(0.9)
    again.work()
    answer = again.answer()
    assert (answer.by, answer.version) == (("exit",), 4)
    again.ask(0.1)
    again.work()
    assert again.answer().reasons == ("offline",)
    again.machine.connected()
    assert not again.machine.health().online, "not before it knows what is served"
    again.hear(make_assignment(), make_serving(4))
    assert again.machine.health().online
    assert again.wait(100) == []
    assert kept.saves == 1


def test_what_serves_is_saved_even_if_there_is_always_something_to_answer() -> None:
    device = Device()
    device.serve(1)
    device.ask(0.9)
    device.machine.work()
    assert device.store.saves == 0
    device.clock.advance(SAVE_WITHIN_S)
    device.ask(0.9)
    device.machine.work()
    assert device.store.saves == 1


def test_without_a_disk_it_answers_all_the_same() -> None:
    store = MemoryServed()
    store.broken = True
    device = Device(store)
    device.serve(1)
    device.ask(0.9)
    device.work()
    assert device.answer().by == ("exit",)


def test_cancelled_enquiries_are_forgotten() -> None:
    device = Device()
    device.serve(1)
    enquiry = device.ask(0.1)
    asked = features(device.work())
    device.machine.cancel(enquiry)
    device.machine.cancel(enquiry)
    device.hear(Prediction(request=asked.request, version=1, tensor=probabilities(3)))
    early = Enquiry(
        np.zeros((1, 1, SIZE, SIZE), np.float32), None, None, 0.0, device.done.append, True
    )
    device.machine.ask(early)
    device.machine.cancel(early)
    assert device.done == []
    assert device.machine.health().counts.images == 1


def test_health_is_a_copy() -> None:
    device = Device()
    device.serve(1)
    before = device.machine.health()
    device.ask(0.9)
    device.work()
    assert before.counts.exits == 0
    assert device.machine.health().counts.exits == 1


# -- on the disk ----------------------------------------------------------------------------------


def make_served(weight: float = 1.5) -> Served:
    state = {"weight": np.array([weight], np.float32), "count": np.array(3)}
    return Served(make_assignment(), make_serving(2), state)


def test_what_is_kept_comes_back_whole(tmp_path: Path) -> None:
    store = DiskServed(tmp_path / "state")
    assert store.load() is None
    for weight in (1.5, 2.5):
        store.save(make_served(weight))
        found = DiskServed(tmp_path / "state").load()
        assert found is not None
        assert found.assignment == make_assignment()
        assert found.serving == make_serving(2)
        assert found.key == (RUN, 2, 2)
        assert float(found.state["weight"][0]) == weight
        assert found.state["count"].dtype == np.int64


def test_a_damaged_file_is_said_to_be_so(tmp_path: Path) -> None:
    store = DiskServed(tmp_path)
    store.save(make_served())
    (path,) = tmp_path.glob("serving.*")
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:], b"", b"x" * 99):
        path.write_bytes(damaged)
        with pytest.raises(StateError, match=r"serving\.safetensors"):
            store.load()


def test_a_full_disk_leaves_what_was_kept(tmp_path: Path) -> None:
    store = DiskServed(tmp_path)
    store.save(make_served())
    (tmp_path / "serving.writing").mkdir()
    with pytest.raises(StateError, match="free some space"):
        store.save(make_served(9.0))
    found = store.load()
    assert found is not None
    assert float(found.state["weight"][0]) == 1.5


RUNS = st.sampled_from([RUN, "another"])
CUTS = st.sampled_from([2, 3])
VERSIONS = st.integers(1, 2)


class Following(RuleBasedStateMachine):
    """Whatever is announced and lost: one outcome for each enquiry, no question to a stranger."""

    def __init__(self) -> None:
        super().__init__()
        self.device = Device()
        self.connected = False
        self.there = True
        self.announced: tuple[str, int] | None = None
        self.assigned: tuple[str, int] | None = None
        self.asked: list[tuple[Enquiry, list[Answer | AgentError]]] = []
        self.out: list[Features] = []

    @initialize()
    def begin(self) -> None:
        self.connection(there=True)
        self.assign(RUN, 2)
        self.hand(RUN, 2, 1, 1.0)
        self.serve(RUN, 1, trained=True)

    def heard(self, messages: list[Message]) -> None:
        health = self.device.machine.health()
        for message in messages:
            if isinstance(message, Features):
                assert self.connected
                assert self.there
                assert self.announced is not None
                assert self.announced[0] == health.run
                assert self.assigned == (health.run, health.cut)
                assert message.version == health.version
                self.out.append(message)
            else:
                assert isinstance(message, Request)
                assert self.announced is not None
                assert message.version == self.announced[1]

    @rule(there=st.booleans())
    def connection(self, *, there: bool) -> None:
        self.connected = there
        machine = self.device.machine
        self.heard(said(machine.connected() if there else machine.disconnected()))

    @rule(there=st.booleans())
    def coordinator(self, *, there: bool) -> None:
        self.there = there
        said = Coordinator(state="online" if there else "offline", boot="b")
        self.heard(self.device.hear(said))

    @rule(run=RUNS, cut=CUTS)
    def assign(self, run: str, cut: int) -> None:
        self.assigned = run, cut
        self.heard(self.device.hear(make_assignment(run=run, cut=cut)))

    @rule(run=RUNS, version=VERSIONS, trained=st.booleans())
    def serve(self, run: str, version: int, *, trained: bool) -> None:
        self.announced = run, version
        changes: dict[str, Any] = {} if trained else {"cuts": {}}
        self.heard(self.device.hear(make_serving(version, run=run, **changes)))

    @rule(run=RUNS, cut=CUTS, version=VERSIONS, weight=st.sampled_from([1.0, 2.0, np.nan]))
    def hand(self, run: str, cut: int, version: int, weight: float) -> None:
        self.device.hand(version, weight, run=run, cut=cut)

    @rule(run=RUNS, cut=CUTS, version=VERSIONS)
    def parameters(self, run: str, cut: int, version: int) -> None:
        self.heard(self.device.hear(make_parameters(version, run=run, cut=cut)))

    @rule(sure=st.sampled_from([0.1, 0.1, 0.9]), at_once=st.booleans())
    def ask(self, sure: float, *, at_once: bool) -> None:
        done: list[Answer | AgentError] = []
        self.device.done = done
        self.asked.append((self.device.ask(sure, deadline_s=20.0), done))
        if at_once:
            self.work()

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        enquiry, _ = data.draw(st.sampled_from(self.asked))
        self.device.machine.cancel(enquiry)
        enquiry.cancelled = True

    @rule()
    def work(self) -> None:
        self.heard(self.device.work())

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def predict(self, data: st.DataObject) -> None:
        features = data.draw(st.sampled_from(self.out))
        reply = Prediction(
            request=features.request, version=features.version, tensor=probabilities(3)
        )
        self.heard(self.device.hear(reply))

    @rule(seconds=st.floats(0, 10))
    def wait(self, seconds: float) -> None:
        self.heard(self.device.wait(seconds))

    @invariant()
    def once(self) -> None:
        assert all(len(done) <= 1 for _, done in self.asked)

    def teardown(self) -> None:
        self.heard(self.device.work())
        self.device.wait(100)
        for enquiry, done in self.asked:
            assert enquiry.cancelled or len(done) == 1
        health = self.device.machine.health()
        assert health.waiting == health.open == 0


TestFollowing = Following.TestCase
TestFollowing.settings = settings(max_examples=40, stateful_step_count=30)
