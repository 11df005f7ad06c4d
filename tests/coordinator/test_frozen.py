"""Devices that compute their half of the network and never train it."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

from broker.messages import Assignment, Program, Request
from broker.training_messages import Gradients, Receipt
from coordinator import service
from coordinator.aggregation import block_of
from coordinator.errors import ProgramUnavailable
from coordinator.programs import make_in_child
from tensors.networks import NetworkSpec
from tensors.parameters import pack_parameters
from tests.fake_coordinator import Harness, every, only
from tests.server_side import trained_half
from tests.tiny import RUN, SPEC, differs, make_hello

CUT = 3
GRAPH = {"graph": b"onnx", "parameters": {"blocks.0.conv.weight": [4, 1, 3, 3]}}


@pytest.fixture
def makings(monkeypatch: pytest.MonkeyPatch) -> dict[int, Future[dict[str, Any]]]:
    """Of programs, by cut; they are made when a test says so."""
    begun: dict[int, Future[dict[str, Any]]] = {}

    def begin(cut: int) -> Future[dict[str, Any]]:
        assert cut not in begun
        begun[cut] = Future()
        return begun[cut]

    monkeypatch.setattr(service, "make_in_child", lambda spec: begin)
    return begun


# -- what they are told ---------------------------------------------------------------------------


def test_nothing_is_to_come_back() -> None:
    server = Harness(min_devices=2, feedback="gradient")
    assert only(Assignment, server.join("full", CUT), "full").feedback == "gradient"
    assert only(Assignment, server.join("small", CUT, frozen=True), "small").feedback == "none"


def test_it_has_no_measurement_but_the_shallowest_cut_that_is_trained() -> None:
    server = Harness(min_devices=5)
    for name, cut in (("a", 4), ("b", 2), ("c", 3)):
        server.join(name, cut)
    server.join("first", 1, frozen=True)
    server.online("small")
    said = server.hear("small", make_hello(frozen=True, cut=None))
    assert only(Assignment, said, "small").cut == 2


def test_alone_it_is_cut_at_the_first_layer() -> None:
    server = Harness(min_devices=2)
    server.online("small")
    said = server.hear("small", make_hello(frozen=True, cut=None))
    assert only(Assignment, said, "small").cut == 1


def test_a_program_is_made_once_and_sent_to_who_asks_again(
    makings: dict[int, Future[dict[str, Any]]],
) -> None:
    server = Harness(min_devices=3)
    server.join("a", CUT, frozen=True)
    server.join("b", CUT, frozen=True)
    assert server.hear("a", Request(what="program")) == []
    assert server.hear("b", Request(what="program")) == []
    makings[CUT].set_result(GRAPH)
    for name in ("a", "b"):
        program = only(Program, server.hear(name, Request(what="program")), name)
        assert (program.run, program.cut, program.graph) == (RUN, CUT, b"onnx")
        assert program.parameters == GRAPH["parameters"]


def test_who_has_no_cut_gets_no_program() -> None:
    server = Harness(min_devices=2)
    server.online("a")
    assert server.hear("a", Request(what="program")) == []


def test_why_there_is_none_is_said(makings: dict[int, Future[dict[str, Any]]]) -> None:
    server = Harness(min_devices=2)
    server.join("a", CUT, frozen=True)
    server.hear("a", Request(what="program"))
    makings[CUT].set_exception(ProgramUnavailable("no ONNX here " + 300 * "!"))
    program = only(Program, server.hear("a", Request(what="program")), "a")
    assert program.graph is None
    assert program.refused is not None
    assert program.refused.startswith("no ONNX here")


# -- a round --------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["averaging", "sequential", "cascade"])
def test_the_server_learns_from_its_batches_and_nobody_from_its_half(strategy: str) -> None:
    server = Harness(min_devices=1, strategy=strategy, feedback="gradient")
    server.join("small", CUT, frozen=True)
    before = server.core.versions.serving.state
    said = server.send("small", 0, 1, 2)
    while server.core.has_work:
        said += server.core.work()
    assert not every(Gradients, said)
    said = server.upload("small", state=pack_parameters(trained_half(CUT)))
    assert only(Receipt, said, "small").final
    checkpoint = server.checkpoint()
    assert checkpoint.round == 1
    changed = {block_of(name) for name in differs(before, checkpoint.model.state)}
    assert changed == set(range(CUT, 10))
    assert checkpoint.trained_cuts == []
    assert server.observer.dropped == {}


def test_beside_one_that_trains_only_that_ones_half_counts() -> None:
    server = Harness(min_devices=2, strategy="sequential", feedback="gradient")
    server.join("full", CUT)
    server.join("small", CUT, frozen=True)
    said = server.train("full", "small")
    assert {gradients.batch for gradients in every(Gradients, said, "full")} == {0, 1, 2}
    assert not every(Gradients, said, "small")
    checkpoint = server.checkpoint()
    assert checkpoint.trained_cuts == [CUT]
    half = trained_half(CUT)
    for name in ("blocks.0.conv.weight", f"heads.{CUT}.0.fc.weight"):
        np.testing.assert_allclose(checkpoint.model.state[name], half[name], rtol=1e-6)


@pytest.mark.parametrize("rule", ["trimmed-mean", "median"])
@pytest.mark.parametrize("strategy", ["averaging", "sequential", "cascade"])
def test_a_robust_average_leaves_its_half_out_too(strategy: str, rule: str) -> None:
    server = Harness(min_devices=4, strategy=strategy, aggregation_rule=rule, feedback="gradient")
    full = ["a", "b", "c"]
    for name in full:
        server.join(name, CUT)
    server.join("small", CUT, frozen=True)
    server.train(*full, "small")
    while server.core.has_work:
        server._note(server.core.work())
    checkpoint = server.checkpoint()
    assert checkpoint.round == 1
    assert checkpoint.trained_cuts == [CUT]
    record = checkpoint.history[0]["devices"]
    assert all(record[name]["finished"] for name in (*full, "small"))
    # The three agree, so whatever is cut off, what is left is theirs; an untrained half would show.
    half = trained_half(CUT)
    for name in ("blocks.0.conv.weight", f"heads.{CUT}.0.fc.weight"):
        np.testing.assert_allclose(checkpoint.model.state[name], half[name], rtol=1e-5)
    assert server.observer.dropped == {}


def test_an_empty_upload_is_what_it_sends() -> None:
    server = Harness(min_devices=1)
    server.join("small", CUT, frozen=True)
    server.send("small", 0, 1, 2)
    assert only(Receipt, server.upload("small", state=b""), "small").final
    assert server.checkpoint().round == 1
    assert server.observer.dropped == {}


def test_it_is_frozen_after_a_restart_too() -> None:
    server = Harness(min_devices=1)
    server.join("small", CUT, frozen=True)
    server.send("small", 0, 1, 2)
    server.upload("small", state=b"")
    again = Harness(server.folder, min_devices=1)
    assert only(Assignment, again.join("small", CUT, frozen=True), "small").feedback == "none"


# -- making ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_program_is_made_in_a_process_of_its_own() -> None:
    pytest.importorskip("onnxscript", reason="needs splitfleet[export]")
    made = make_in_child(SPEC)(2).result(timeout=100)
    assert set(made["parameters"]) >= {"blocks.0.conv.weight", "heads.2.0.fc.bias"}
    assert Program(run=RUN, cut=2, **made).graph


def test_a_network_that_cannot_be_built_there_is_said() -> None:
    making = make_in_child(NetworkSpec(name="no.such:network"))(2)
    with pytest.raises(ProgramUnavailable, match=r"no\.such:network"):
        making.result(timeout=100)
