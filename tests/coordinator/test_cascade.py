from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coordinator.aggregation import Aggregation
from coordinator.cascade import RATE_RULES, RateRule
from coordinator.engines import Sequential
from coordinator.server_copy import Entry
from tensors.networks import CutNetwork, read_state
from tensors.training import Compute
from tests.cascade import (
    DECAY,
    MOMENTUM,
    RATE,
    WIDTHS,
    close,
    entry_at,
    make_cascade,
    plain_entry,
    plain_network,
    start_of,
    train,
)
from tests.server_side import NETWORK, START
from tests.tiny import CPU, assert_close, assert_same

each_seed = pytest.mark.parametrize("seed", range(5))


class Double(Compute):
    """Arithmetic in float64, to compare with more digits than are ever used."""

    def tensor(self, array: np.ndarray | Tensor) -> Tensor:
        return torch.as_tensor(array).double()


def random_entries(seed: int) -> list[Entry]:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 7))
    return [
        plain_entry(int(rng.integers(1, 5)), 100 * seed + i, size=int(rng.integers(1, 9)))
        for i in range(count)
    ]


class Accumulating:
    """The batches one after the other, their gradients accumulated and divided by their number."""

    def __init__(self, network: CutNetwork, rate: float = RATE) -> None:
        self.network = copy.deepcopy(network.server_half(1)).train()
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), lr=rate, momentum=MOMENTUM, weight_decay=DECAY
        )

    def step(self, entries: Sequence[Entry]) -> list[tuple[float, Tensor]]:
        found = self.accumulate(entries)
        self.optimizer.step()
        return found

    def accumulate(self, entries: Sequence[Entry]) -> list[tuple[float, Tensor]]:
        found = []
        dtype = next(self.network.parameters()).dtype
        self.optimizer.zero_grad()
        for entry in entries:
            x = entry.features.detach().clone().to(dtype).requires_grad_()
            loss = F.cross_entropy(self.network(x, start=entry.cut), entry.labels)
            loss.backward()
            assert x.grad is not None
            found.append((loss.item(), x.grad))
        for parameter in self.network.parameters():
            if parameter.grad is not None:
                parameter.grad /= len(entries)
        return found


# -- what a step is -------------------------------------------------------------------------------


@each_seed
@pytest.mark.parametrize("exactly", [False, True])
def test_without_batchnorm_it_is_sequential_with_accumulated_gradients(
    seed: int, exactly: bool
) -> None:
    network = plain_network(seed=seed)
    if exactly:
        network = network.double()
    compute = Double() if exactly else CPU
    engine, reference = make_cascade(network, compute=compute), Accumulating(network)
    rtol, atol = (1e-12, 1e-13) if exactly else (1e-4, 1e-6)
    for turn in range(4):
        entries = random_entries(10 * seed + turn)
        steps = train(engine, *entries)
        for entry, step, (loss, gradient) in zip(
            entries, steps, reference.step(entries), strict=True
        ):
            assert step.loss == pytest.approx(loss, rel=rtol)
            assert step.images == len(entry.labels)
            assert step.gradient is not None
            torch.testing.assert_close(step.gradient, gradient, rtol=rtol, atol=atol)
    merged = close(engine, start_of(network))
    expected = read_state(reference.network)
    assert_close({n: merged.state[n] for n in expected}, expected, rtol=rtol)


@pytest.mark.parametrize(("rule", "factor"), [("linear", 4.0), ("sqrt", 2.0), ("none", 1.0)])
def test_the_rate_of_a_step_of_four_batches(rule: RateRule, factor: float) -> None:
    network = plain_network()
    entries = [plain_entry(cut, seed) for cut, seed in ((3, 0), (1, 0), (4, 0), (1, 1))]
    engine, reference = make_cascade(network, rule=rule), Accumulating(network, factor * RATE)
    train(engine, *entries)
    reference.step(entries)
    merged = close(engine, start_of(network))
    expected = read_state(reference.network)
    assert_close({n: merged.state[n] for n in expected}, expected)


def test_rule_momentum_goes_on_as_in_one_step_for_each_batch() -> None:
    """The weights make one step with the momentum after so many with the batches' gradient."""
    network = plain_network()
    engine, reference = make_cascade(network, rule="momentum"), Accumulating(network)
    momentum = {p: torch.zeros_like(p) for p in reference.network.parameters()}
    for entries in ([plain_entry(1)], [plain_entry(c, 1) for c in (2, 1, 1)], [plain_entry(1, 3)]):
        train(engine, *entries)
        reference.accumulate(entries)
        with torch.no_grad():
            for parameter, moving in momentum.items():
                assert parameter.grad is not None
                for _ in entries:
                    moving.mul_(MOMENTUM).add_(parameter.grad + DECAY * parameter)
                parameter.sub_(RATE * moving)
    merged = close(engine, start_of(network))
    expected = read_state(reference.network)
    assert_close({n: merged.state[n] for n in expected}, expected)
    names = dict(reference.network.named_parameters())
    assert_close(
        {n: merged.momentum[n] for n in names},
        {n: momentum[parameter].numpy() for n, parameter in names.items()},
    )


@pytest.mark.parametrize("rule", RATE_RULES)
def test_a_step_of_one_batch_is_sequentials(rule: RateRule) -> None:
    """Bit for bit, with BatchNorm too, over a round's end, whatever came in between."""
    engine = make_cascade(rule=rule)
    sequential = Sequential(copy.deepcopy(NETWORK), CPU, momentum=MOMENTUM, weight_decay=DECAY)
    train(engine, entry_at(2, 9), entry_at(3, 9))
    start = START
    for _ in range(2):
        for each in (engine, sequential):
            each.begin(start, RATE)
        for cut, seed in ((2, 0), (5, 0), (9, 0), (3, 0), (2, 1)):
            entry = entry_at(cut, seed)
            theirs = sequential.step(entry, want_gradient=True)
            ours = engine.step(entry, want_gradient=True)
            assert (ours.loss, ours.correct, ours.images) == (
                theirs.loss,
                theirs.correct,
                theirs.images,
            )
            assert ours.gradient is not None
            assert theirs.gradient is not None
            assert torch.equal(ours.gradient, theirs.gradient)
        one, other = close(engine, start), close(sequential, start)
        assert_same(one.state, other.state)
        assert_same(one.momentum, other.momentum)
        start = one


def test_results_come_in_the_order_of_the_batches() -> None:
    entries = [entry_at(cut, size=size) for cut, size in ((5, 3), (2, 4), (9, 2), (2, 5))]
    steps = train(make_cascade(), *entries)
    assert [step.images for step in steps] == [3, 4, 2, 5]
    for entry, step in zip(entries, steps, strict=True):
        assert step.gradient is not None
        assert step.gradient.shape == entry.features.shape
    turned = train(make_cascade(), *reversed(entries))
    assert [s.loss for s in turned] == pytest.approx([s.loss for s in reversed(steps)], rel=1e-4)


def test_without_feedback_the_learning_is_the_same_and_the_features_are_left_alone() -> None:
    states = []
    for want_gradients in (True, False):
        engine = make_cascade()
        entries = [entry_at(3), entry_at(5)]
        before = [entry.features.clone() for entry in entries]
        steps = train(engine, *entries, want_gradients=want_gradients)
        assert [step.gradient is not None for step in steps] == [want_gradients] * 2
        for entry, features in zip(entries, before, strict=True):
            assert torch.equal(entry.features, features)
            assert not entry.features.requires_grad
        states.append(close(engine).state)
    assert_close(states[0], states[1])


def test_blocks_that_no_batch_entered_below_stay_as_they_are() -> None:
    engine = make_cascade()
    train(engine, entry_at(4), entry_at(6))
    merged = close(engine).state
    moved = {name for name in merged if not np.array_equal(merged[name], START.state[name])}
    assert {int(name.split(".")[1]) for name in moved} == set(range(4, 10))


def test_a_block_weighs_all_samples_that_went_through_it() -> None:
    engine = make_cascade()
    train(engine, entry_at(2), entry_at(2, 1), entry_at(5))
    server = close(engine).state
    engine_again = make_cascade()
    train(engine_again, entry_at(8))  # of a round that was abandoned
    engine_again.begin(START, RATE)
    train(engine_again, entry_at(2), entry_at(2, 1), entry_at(5))
    aggregation = Aggregation(START, first_server_block=1, device_copies=True)
    aggregation.add_device(read_state(NETWORK.device_half(9)), 8)  # as it was at the start
    engine_again.close(aggregation)
    merged = aggregation.result().state
    for block, entered in ((2, 16), (4, 16), (5, 24), (8, 24)):
        name = f"blocks.{block}.conv1.weight"
        expected = (entered * server[name] + 8 * START.state[name]) / (entered + 8)
        np.testing.assert_allclose(merged[name], expected, rtol=1e-4, atol=1e-6)


# -- BatchNorm ------------------------------------------------------------------------------------


class Norms(nn.Module):
    def __init__(self, inputs: int, outputs: int, momentum: float | None) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(inputs, momentum=momentum)
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(self.norm(x))
        return y


def network_of_norms(momentum: float | None) -> CutNetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CutNetwork(
            {i: Norms(*sizes, momentum) for i, sizes in enumerate(pairwise(WIDTHS))}, {}
        )


@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
def test_running_averages_move_as_far_as_in_one_step_for_each_batch(
    momentum: float | None,
) -> None:
    """A block's averages are those after as many passes of all that is in it as it has batches."""
    network = network_of_norms(momentum)
    engine = make_cascade(network, rate=0.0)
    reference = copy.deepcopy(network).train()
    for seed in range(2):
        entries = [plain_entry(cut, 10 * seed + i) for i, cut in enumerate((4, 1, 2, 2, 4))]
        train(engine, *entries)
        flow = torch.zeros(0, WIDTHS[1])
        with torch.no_grad():
            for index in range(1, 5):
                entering = [entry.features for entry in entries if entry.cut == index]
                x = torch.cat([flow, *entering])
                for _ in range(sum(entry.cut <= index for entry in entries)):
                    flow = reference.blocks[str(index)](x)
    merged = close(engine, start_of(network)).state
    expected = read_state(reference)
    assert_close({n: merged[n] for n in expected}, expected)
    assert merged["blocks.1.norm.num_batches_tracked"] == 2
    assert merged["blocks.2.norm.num_batches_tracked"] == 6
    assert merged["blocks.4.norm.num_batches_tracked"] == 10


def test_a_joint_step_normalises_by_all_that_is_in_the_block() -> None:
    network = network_of_norms(0.1)
    entries = [plain_entry(3), plain_entry(1), plain_entry(1, 1, size=9)]
    engine, reference = make_cascade(network), copy.deepcopy(network).train()
    optimizer = torch.optim.SGD(
        reference.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=DECAY
    )
    low = torch.cat([entries[1].features, entries[2].features])
    logits = reference(torch.cat([reference(low, start=1, stop=3), entries[0].features]), start=3)
    losses = [
        F.cross_entropy(part, entry.labels)
        for part, entry in zip(
            logits.split([5, 9, 5]), (entries[1], entries[2], entries[0]), strict=True
        )
    ]
    (sum(losses) / torch.tensor(3.0)).backward()
    optimizer.step()
    steps = train(engine, *entries)
    assert [step.loss for step in steps] == pytest.approx(
        [losses[2].item(), losses[0].item(), losses[1].item()], rel=1e-5
    )
    merged = close(engine, start_of(network)).state
    expected = read_state(reference)
    for name, _ in reference.named_parameters():
        np.testing.assert_allclose(merged[name], expected[name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("bf16", [False, True])
def test_every_way_of_computing_learns_about_the_same(bf16: bool) -> None:
    moves = []
    for compute in (CPU, Compute("cpu", bf16=bf16, channels_last=True)):
        engine = make_cascade(compute=compute)
        train(engine, entry_at(3, size=32), entry_at(5, size=32), entry_at(3, 1, size=32))
        merged = close(engine).state
        names = [n for n in merged if n.endswith(".weight")]
        moves.append(np.concatenate([(merged[n] - START.state[n]).ravel() for n in names]))
    one, other = moves
    assert one @ other / np.sqrt((one @ one) * (other @ other)) > (0.9 if bf16 else 0.9999)
