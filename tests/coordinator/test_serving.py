"""The answering machine, and what the training one says about versions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from broker.envelopes import Envelope, up
from broker.messages import Parameters, Request, Status
from broker.serving_messages import CutPolicy, Features, Prediction, Serving
from coordinator import exit_policies, service
from coordinator.serving import ANSWERING, STARVED_S, TRAINING, route
from coordinator.serving_choice import ServingChoice, write_choice
from coordinator.store import Store
from coordinator.updates.rollouts import UPDATES
from tensors.decoding import decode
from tensors.networks import build_network, write_state
from tensors.parameters import unpack_parameters
from tests.fake_coordinator import Harness, every, only
from tests.server_side import FP32, features_at, poisoned_features
from tests.tiny import RUN, SPEC, Array, make_dataset, make_hello

REQUEST = up("d", Request(what="parameters"))


def features(
    version: int = 1, *, cut: int = 2, seed: int = 0, size: int = 2, **changes: Any
) -> Features:
    fields: dict[str, Any] = {
        "run": RUN,
        "request": seed,
        "version": version,
        "deadline_ms": 1000,
        "tensor": FP32.encode(features_at(cut, seed, size)),
    }
    return Features(**(fields | changes))


def server(rounds: int = 1, **settings: Any) -> Harness:
    """Two devices, at cuts 2 and 5, and so many rounds behind them."""
    made = Harness(rounds=rounds + 1, min_devices=2, **settings)
    made.join("a", 2)
    made.join("b", 5)
    for _ in range(rounds):
        made.train("a", "b")
    return made


def ask(made: Harness, *asked: tuple[str, Features]) -> list[Envelope]:
    """All of them before any is answered."""
    answering = made.core.answering
    out: list[Envelope] = []
    for device, message in asked:
        out += answering.receive(up(device, message))
    while answering.next_tick is not None:
        made.clock.now = max(made.clock.now, answering.next_tick)
        out += answering.tick()
    return out


def expected(made: Harness, version: int, cut: int, array: Array) -> Array:
    store = Store(made.folder)
    assert store.current() is not None
    checkpoint = store.at(version)
    assert checkpoint is not None
    network = build_network(SPEC)
    write_state(network, checkpoint.model.state)
    with torch.inference_mode():
        return np.asarray(network.eval()(torch.from_numpy(array), start=cut).softmax(1).numpy())


class Counted:
    """The real network, and how it was called."""

    def __init__(self, made: Harness) -> None:
        self.inner: Any = made.core.answering._network
        self.calls: list[int] = []
        made.core.answering._network = self

    def holds(self, version: int) -> bool:
        return bool(self.inner.holds(version))

    def load(self, version: int, state: Any) -> None:
        self.inner.load(version, state)

    def answer(self, version: int, questions: Sequence[tuple[int, Tensor]]) -> list[np.ndarray]:
        self.calls.append(len(questions))
        answers: list[np.ndarray] = self.inner.answer(version, questions)
        return answers


# -- answers --------------------------------------------------------------------------------------


def test_devices_with_different_cuts_are_answered_by_one_forward_pass() -> None:
    made = server()
    network = Counted(made)
    said = ask(
        made,
        ("a", features(seed=1)),
        ("b", features(seed=2, cut=5, size=3)),
        ("a", features(seed=3, size=1)),
    )
    assert network.calls == [3]
    for device, cut, seed, size in (("a", 2, 1, 2), ("b", 5, 2, 3), ("a", 2, 3, 1)):
        (answer,) = [p for p in every(Prediction, said, device) if p.request == seed]
        assert answer.tensor is not None
        wanted = expected(made, 1, cut, features_at(cut, seed, size))
        np.testing.assert_allclose(decode(answer.tensor), wanted, rtol=2e-4, atol=1e-6)
        assert (answer.version, answer.refused) == (1, None)
        assert answer.queue_ms is not None
        assert answer.queue_ms >= 0
        assert answer.forward_ms is not None


def test_what_one_device_sends_wrong_does_not_touch_the_others() -> None:
    made = server()
    broken = bytearray(FP32.encode(features_at(2)))
    broken[-1] ^= 1
    huge = np.full((1, *features_at(2).shape[1:]), 3e38, np.float32)
    said = ask(
        made,
        ("a", features(seed=1, tensor=poisoned_features())),
        ("a", features(seed=2, tensor=bytes(broken))),
        ("b", features(seed=3, cut=5)),
        ("a", features(seed=4, tensor=FP32.encode(huge))),
    )
    reasons = {p.request: p.refused for p in every(Prediction, said)}
    assert reasons == {1: "not_finite", 2: "bad_tensor", 3: None, 4: "not_finite"}
    (answer,) = every(Prediction, said, "b")
    assert answer.tensor is not None
    wanted = expected(made, 1, 5, features_at(5, 3, 2))
    np.testing.assert_allclose(decode(answer.tensor), wanted, rtol=2e-4, atol=1e-6)
    assert Counter(reason for *_, reason in made.observer.answers) == Counter(reasons.values())


class _Full(Counted):
    """Too little memory for more than one question, and for none of three images."""

    def answer(self, version: int, questions: Sequence[tuple[int, Tensor]]) -> list[np.ndarray]:
        if len(questions) > 1 or len(questions[0][1]) == 3:
            raise RuntimeError("out of memory")
        return super().answer(version, questions)


def test_what_cannot_be_computed_together_is_computed_one_by_one() -> None:
    made = server()
    _Full(made)
    said = ask(made, ("a", features(seed=1)), ("b", features(seed=2, cut=5, size=3)))
    reasons = {p.request: p.refused for p in every(Prediction, said)}
    assert reasons == {1: None, 2: "overloaded"}


def test_what_has_waited_for_too_long_is_not_computed() -> None:
    made = server()
    network = Counted(made)
    answering = made.core.answering
    assert not answering.receive(up("a", features(deadline_ms=100)))
    made.clock.advance(0.1)
    assert only(Prediction, answering.tick()).refused == "expired"
    assert network.calls == []
    assert answering.next_tick is None


def test_a_full_queue_refuses_at_once() -> None:
    made = server(batch_size=8, answer_queue=8)
    answering = made.core.answering
    out: list[Envelope] = []
    for seed in range(10):
        out += answering.receive(up("a", features(seed=seed)))
        assert answering.waiting.images <= 8
    assert [p.refused for p in every(Prediction, out)] == ["overloaded"] * 6
    answered = every(Prediction, ask(made))
    assert {p.request for p in answered} == {6, 7, 8, 9}, "the newest"


def test_messages_that_keep_coming_do_not_keep_answers_from_being_computed() -> None:
    made = server(answer_queue=10_000)
    answering = made.core.answering
    said: list[Envelope] = []
    for seed in range(200):
        said += answering.receive(up("a", features(seed=seed)))
        made.clock.advance(STARVED_S / 20)
    assert len(every(Prediction, said)) > 50


def test_nothing_but_questions_is_for_this_machine() -> None:
    made = server()
    assert made.core.answering.receive(up("a", Status(state="online", connection="c"))) == []
    assert made.observer.dropped["unexpected_topic"] == 1
    assert route(up("a", features()).address) == (ANSWERING,)
    for message in (make_hello(), REQUEST.message):
        assert route(up("a", message).address) == (TRAINING,)
    online = up("a", Status(state="online", connection="c"))
    assert route(online.address) == (TRAINING, UPDATES)


def test_connections_come_and_go() -> None:
    made = server()
    answering = made.core.answering
    answering.receive(up("a", features()))
    assert answering.disconnected() == answering.connected() == []
    assert len(every(Prediction, ask(made))) == 1
    assert not answering.finished


# -- versions -------------------------------------------------------------------------------------


def test_each_version_answers_what_was_computed_with_it() -> None:
    made = server(3, serving_versions=2, keep_checkpoints=5)
    said = ask(made, *(("a", features(version, seed=version)) for version in (1, 2, 3, 4)))
    answers = {p.request: p for p in every(Prediction, said)}
    assert {seed: p.refused for seed, p in answers.items()} == {
        1: "version",
        2: None,
        3: None,
        4: "version",
    }
    for version in (2, 3):
        answer = answers[version]
        assert answer.version == version
        assert answer.tensor is not None
        wanted = expected(made, version, 2, features_at(2, version, 2))
        np.testing.assert_allclose(decode(answer.tensor), wanted, rtol=2e-4, atol=1e-6)


def test_after_a_restart_earlier_versions_come_from_the_disk() -> None:
    before = server(3, keep_checkpoints=5)
    after = Harness(before.folder, rounds=4, min_devices=2, keep_checkpoints=5)
    said = ask(after, ("a", features(2, seed=7)))
    answer = only(Prediction, said)
    assert answer.tensor is not None, "the device is known without a hello"
    wanted = expected(after, 2, 2, features_at(2, 7, 2))
    np.testing.assert_allclose(decode(answer.tensor), wanted, rtol=2e-4, atol=1e-6)


def test_a_version_whose_files_are_damaged_is_refused(tmp_path: Path) -> None:
    before = server(2, keep_checkpoints=5)
    (damaged,) = before.folder.glob("*/checkpoints/000001/model.safetensors")
    damaged.write_bytes(b"rubbish")
    after = Harness(before.folder, rounds=3, min_devices=2, keep_checkpoints=5)
    for _ in range(2):
        assert only(Prediction, ask(after, ("a", features(1)))).refused == "version"


def test_the_parameters_are_ready_before_somebody_asks() -> None:
    made = server()
    answering = made.core.answering
    assert answering.has_work
    assert answering.work() == []
    assert not answering.has_work
    made.train("a", "b")
    assert answering.has_work
    answering.prepare()
    assert not answering.has_work


# -- what is announced ----------------------------------------------------------------------------


def test_the_serving_version_is_announced_before_the_round_that_it_opens() -> None:
    made = Harness(rounds=2, threshold=0.25, audit_share=0.125)
    first = only(Serving, made.said)
    assert (first.version, first.cuts, first.audit_share) == (0, {}, 0.125)
    made.join("a", 2)
    said = made.train("a")
    kinds = [type(envelope.message).__name__ for envelope in said]
    assert kinds.index("Parameters") < kinds.index("Serving") < kinds.index("Round")
    serving = only(Serving, said)
    assert (serving.version, serving.exit_rule) == (1, "entropy")
    assert serving.cuts == {"2": CutPolicy(threshold=0.25)}
    assert only(Serving, made.reconnect()) == serving


def test_what_is_pinned_serves_and_its_parameters_can_be_had() -> None:
    made = server(2, keep_checkpoints=5)
    said = made.core.pin(1)
    assert only(Serving, said).version == 1
    assert made.core.pin(1) == []
    made._note(said)
    asked = made.hear("a", Request(what="parameters", version=1))
    parameters = only(Parameters, asked, "a")
    assert (parameters.version, parameters.base, parameters.cut) == (1, None, 2)
    store = Store(made.folder)
    assert store.current() is not None
    checkpoint = store.at(1)
    assert checkpoint is not None
    for name, values in unpack_parameters(parameters.state).items():
        np.testing.assert_array_equal(values, checkpoint.model.state[name])
    for version in (0, 2, 9):
        current = only(Parameters, made.hear("a", Request(what="parameters", version=version)))
        assert current.version == 2
    assert not every(Serving, made.train("a", "b")), "what serves has not changed"
    assert made.core.versions.latest.number == 3
    assert only(Prediction, ask(made, ("a", features(1)))).refused is None
    assert only(Serving, made.core.pin(None)).version == 3


def test_a_version_that_is_not_there_cannot_be_pinned() -> None:
    made = server()
    assert made.core.pin(7) == []
    assert made.core.versions.serving.number == 1
    assert made.observer.dropped["unknown_version"] == 1


def test_a_choice_outlives_the_coordinator() -> None:
    before = server(2, keep_checkpoints=5)
    store = Store(before.folder)
    assert store.current() is not None
    write_choice(store.folder, ServingChoice(1))
    after = Harness(before.folder, rounds=3, min_devices=2, keep_checkpoints=5)
    assert only(Serving, after.said).version == 1


@pytest.mark.parametrize("content", [b"rubbish", b'{"version": 7}', b'{"version": -1}'])
def test_a_choice_that_makes_no_sense_leaves_the_last_closed_round(content: bytes) -> None:
    before = server(2)
    store = Store(before.folder)
    assert store.current() is not None
    (store.folder / "serving.json").write_bytes(content)
    after = Harness(before.folder, rounds=3, min_devices=2)
    assert only(Serving, after.said).version == 2


def test_thresholds_are_chosen_after_each_round_and_survive_a_restart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(service, "held_out_images", lambda _: make_dataset(40))
    settings: dict[str, Any] = {
        "dataset": "fashion-mnist-small",
        "exit_policy": "offload:0.5",
        "calibration_images": 30,
    }
    before = server(2, **settings)
    served = every(Serving, before.said)
    assert [list(serving.cuts) for serving in served] == [[], ["2", "5"], ["2", "5"]]
    for policy in served[-1].cuts.values():
        assert policy.offload_rate is not None
        assert policy.offload_rate <= 0.5
        assert policy.accuracy is not None
    assert served[1].cuts != served[2].cuts, "other parameters, other thresholds"

    measured: list[Any] = []
    measure = exit_policies.policies_of

    def watched(*args: Any) -> dict[int, CutPolicy]:
        measured.append(args)
        return measure(*args)

    monkeypatch.setattr(exit_policies, "policies_of", watched)
    again = Harness(before.folder, rounds=3, min_devices=2, **settings)
    assert only(Serving, again.said) == served[-1]
    assert not measured
    other = Harness(
        before.folder, rounds=3, min_devices=2, **settings | {"exit_policy": "offload:0"}
    )
    assert {p.offload_rate for p in only(Serving, other.said).cuts.values()} == {0.0}
    assert len(measured) == 1


def test_a_version_of_another_run_is_refused() -> None:
    made = server()
    refused = only(Prediction, ask(made, ("a", features(run="before"))))
    assert refused.refused == "version"
