"""A device whose half of the network is a program on onnxruntime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from broker.messages import Command, Parameters, Program, Request
from edge_agent.errors import NotReady, StateError, TrainingError
from edge_agent.lite import FrozenLearner, LiteFactory
from edge_agent.phases import Phase
from edge_agent.programs import DiskPrograms
from edge_agent.snapshots import Snapshot
from tensors.errors import NetworkError, ProgramError
from tensors.networks import Exits, build_network, read_state
from tensors.parameters import pack_parameters
from tests.fake_device import Harness, MemorySnapshots, every, only
from tests.tiny import CLASSES, RUN, SPEC, State, make_assignment, make_batch, make_round

onnxruntime = pytest.importorskip("onnxruntime", reason="needs splitfleet[export]")
pytest.importorskip("onnxscript", reason="needs splitfleet[export]")

CUT = 2


@pytest.fixture(scope="module")
def program() -> Program:
    from tensors.programs import onnx_program

    made = onnx_program(SPEC, CUT)
    return Program(run=RUN, cut=CUT, graph=made.graph, parameters=made.parameters)


def half_of(seed: int) -> Exits:
    return Exits(build_network(SPEC, seed=seed).device_half(CUT)).eval()


def state_of(seed: int) -> State:
    return read_state(half_of(seed).network)


class TestLearner:
    def test_features_and_outcome_are_those_of_torch(self, program: Program) -> None:
        learner = FrozenLearner(program, threads=1)
        learner.load(state_of(3))
        images, labels = make_batch(8)
        features = learner.forward(0, images, labels)
        with torch.inference_mode():
            wanted, logits = half_of(3)(torch.from_numpy(images))
        np.testing.assert_allclose(features, wanted.numpy(), rtol=1e-4, atol=1e-5)
        outcome = learner.backward(0, None)
        loss = functional.cross_entropy(logits, torch.from_numpy(labels)).item()
        assert outcome.loss == pytest.approx(loss, rel=1e-4)
        assert outcome.correct == int((logits.argmax(1).numpy() == labels).sum())
        assert outcome.images == 8

    def test_it_learns_nothing(self, program: Program) -> None:
        learner = FrozenLearner(program, threads=1)
        learner.load(state_of(3))
        learner.set_learning_rate(0.5)
        images, labels = make_batch(8)
        before = learner.forward(0, images, labels)
        learner.backward(0, np.ones_like(before))
        np.testing.assert_array_equal(learner.forward(1, images, labels), before)
        assert learner.state() == {}
        learner.rewind()
        assert learner.start.state.keys() == state_of(3).keys()
        assert learner.start.momentum == {}

    def test_it_goes_on_with_what_it_is_given(self, program: Program) -> None:
        learner = FrozenLearner(program, threads=1)
        images, _ = make_batch(4)
        for seed, give in (
            (3, learner.load),
            (4, lambda state: learner.restore(Snapshot(state, {}))),
        ):
            give(state_of(seed))
            features, probabilities = learner.predictor().predict(images)
            with torch.inference_mode():
                wanted, logits = half_of(seed)(torch.from_numpy(images))
            np.testing.assert_allclose(features, wanted.numpy(), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(
                probabilities, logits.softmax(1).numpy(), rtol=1e-4, atol=1e-5
            )

    def test_a_loss_that_is_not_finite_is_not_learnt_from(self, program: Program) -> None:
        learner = FrozenLearner(program, threads=1)
        state = dict(state_of(3))
        state["heads.2.0.fc.bias"] = np.full(CLASSES, np.nan, np.float32)
        learner.load(state)
        learner.forward(0, *make_batch(8))
        with pytest.raises(TrainingError, match="batch 0"):
            learner.backward(0, None)

    def test_parameters_of_another_network_are_refused(self, program: Program) -> None:
        learner = FrozenLearner(program, threads=1)
        state = dict(state_of(3))
        with pytest.raises(NetworkError, match=r"blocks\.0\.conv\.weight"):
            learner.load(state | {"blocks.0.conv.weight": np.zeros((1, 1, 3, 3), np.float32)})
        del state["heads.2.0.fc.bias"]
        with pytest.raises(NetworkError, match=r"heads\.2\.0\.fc\.bias"):
            learner.load(state)

    def test_what_is_no_program_is_refused(self, program: Program) -> None:
        for graph in (b"", b"rubbish", bytes(program.graph or b"")[:-100]):
            broken = FrozenLearner(program.model_copy(update={"graph": graph}), threads=1)
            with pytest.raises(ProgramError, match="does not run"):
                broken.load(state_of(3))

    def test_a_program_reads_no_file_of_the_device(self, program: Program, tmp_path: Path) -> None:
        import onnx

        secret = tmp_path / "secret"
        secret.write_bytes(bytes(4096))
        model = onnx.load_from_string(bytes(program.graph or b""))
        for place in (str(secret), "../" * 20 + str(secret).lstrip("/")):
            for tensor in model.graph.initializer:
                if tensor.name == "heads.2.0.fc.bias":
                    tensor.external_data[0].value = place
            left = {n: s for n, s in program.parameters.items() if n != "heads.2.0.fc.bias"}
            update = {"graph": model.SerializeToString(), "parameters": left}
            with pytest.raises(ProgramError, match="does not run"):
                FrozenLearner(program.model_copy(update=update), threads=1).load(state_of(3))


class TestFactory:
    def test_the_program_is_kept_over_a_restart(self, program: Program, tmp_path: Path) -> None:
        factory = LiteFactory(DiskPrograms(tmp_path))
        assignment = make_assignment(cut=CUT)
        assert not factory.has_program(assignment)
        factory.take(program)
        again = LiteFactory(DiskPrograms(tmp_path))
        assert again.has_program(assignment)
        images, _ = make_batch(4)
        features, _ = again.predictor(assignment, state_of(5)).predict(images)
        with torch.inference_mode():
            wanted, _ = half_of(5)(torch.from_numpy(images))
        np.testing.assert_allclose(features, wanted.numpy(), rtol=1e-4, atol=1e-5)
        for other in (make_assignment(cut=CUT + 1), make_assignment(run="another", cut=CUT)):
            assert not again.has_program(other)
            with pytest.raises(NotReady):
                again.predictor(other, state_of(5))

    def test_a_damaged_file_is_fetched_again(self, program: Program, tmp_path: Path) -> None:
        store = DiskPrograms(tmp_path)
        store.save(program)
        (file,) = tmp_path.iterdir()
        file.write_bytes(file.read_bytes()[:-1] + b"\xff")
        with pytest.raises(StateError):
            store.load(RUN, CUT)
        factory = LiteFactory(store)
        assert not factory.has_program(make_assignment(cut=CUT))
        factory.take(program)
        assert factory.has_program(make_assignment(cut=CUT))


def parameters_of(state: State) -> Parameters:
    return Parameters(run=RUN, version=0, cut=CUT, state=pack_parameters(dict(state)))


class TestStateMachine:
    """With a real program; the coordinator is played by hand."""

    def join(self, folder: Path, snapshots: MemorySnapshots | None = None) -> Harness:
        factory = LiteFactory(DiskPrograms(folder))
        device = Harness(build=factory.build, programs=factory, snapshots=snapshots, stay=True)
        device.connect()
        return device

    def test_the_program_is_asked_for_until_it_comes(
        self, program: Program, tmp_path: Path
    ) -> None:
        device = self.join(tmp_path)
        assignment = make_assignment(cut=CUT, feedback="none")
        assert [m.what for m in every(Request, device.hear(assignment))] == ["program"]
        assert device.hear(make_round()) == []
        assert [m.what for m in every(Request, device.wait(10))] == ["program", "program"]
        assert device.hear(assignment) == []
        assert {m.what for m in every(Request, device.wait(20))} == {"program"}
        wanted = only(Request, device.hear(program))
        assert wanted.what == "parameters"
        assert device.hear(program) == []

    def test_one_of_another_run_or_cut_changes_nothing(
        self, program: Program, tmp_path: Path
    ) -> None:
        device = self.join(tmp_path)
        device.hear(make_assignment(cut=CUT))
        for other in ({"run": "another"}, {"cut": CUT + 1}):
            assert device.hear(program.model_copy(update=other)) == []
        assert device.core.phase is Phase.FETCHING
        device.hear(program)
        assert device.core.phase is Phase.JOINING

    def test_a_refusal_ends_the_device_with_the_reason(self, tmp_path: Path) -> None:
        device = self.join(tmp_path)
        device.hear(make_assignment(cut=CUT))
        device.hear(Program(run=RUN, cut=CUT, refused="pip install 'splitfleet[export]'"))
        assert device.core.finished
        assert device.core.problem is not None
        assert "splitfleet[export]" in device.core.problem

    def test_other_orders_leave_the_log_alone(self, tmp_path: Path) -> None:
        device = self.join(tmp_path)
        levels: list[object] = []
        device.core.on_log_level = levels.append
        device.hear(Command(command="proven"), Command(command="log_level", level="debug"))
        assert levels == ["debug"]

    def test_a_restart_needs_neither_program_nor_parameters(
        self, program: Program, tmp_path: Path
    ) -> None:
        snapshots = MemorySnapshots()
        first = self.join(tmp_path, snapshots)
        first.hear(make_assignment(cut=CUT), program, make_round())
        first.hear(parameters_of(state_of(3)))
        second = self.join(tmp_path, snapshots)
        asked = every(Request, second.hear(make_assignment(cut=CUT), make_round()))
        assert [m.what for m in asked] == ["join"]
