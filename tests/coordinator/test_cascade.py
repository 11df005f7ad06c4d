from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coordinator.aggregation import Aggregation, Model
from coordinator.cascade import RATE_RULES, Cascade, RateRule
from coordinator.engines import Engine, Sequential
from coordinator.errors import BatchRefused
from coordinator.server_copy import Entry, Step
from tensors.networks import CutNetwork, read_state
from tensors.training import Compute
from tests.server_side import NETWORK, SHAPES, START
from tests.tiny import CLASSES, CPU, assert_close, assert_same

RATE, MOMENTUM, DECAY = 0.05, 0.9, 0.01
WIDTHS = (6, 7, 8, 9, 10, CLASSES)
"""Features before and after each block of the network without BatchNorm."""
each_seed = pytest.mark.parametrize("seed", range(5))


class Double(Compute):
    """Arithmetic in float64, to compare with more digits than are ever used."""

    def tensor(self, array: np.ndarray | Tensor) -> Tensor:
        return torch.as_tensor(array).double()


class RootOfSize(nn.Module):
    """Has a finite value everywhere and no finite gradient at 0."""

    def forward(self, x: Tensor) -> Tensor:
        return x.abs().sqrt()


def plain_network(*, seed: int = 0, root_at: int | None = None) -> CutNetwork:
    """Five blocks of a linear layer, without BatchNorm."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks: dict[int, nn.Module] = {
            index: nn.Sequential(
                RootOfSize() if index == root_at else nn.Tanh(), nn.Linear(inputs, outputs)
            )
            for index, (inputs, outputs) in enumerate(pairwise(WIDTHS))
        }
    return CutNetwork(blocks, {})


def start_of(network: CutNetwork) -> Model:
    momentum = {n: np.zeros(tuple(p.shape), np.float32) for n, p in network.named_parameters()}
    return Model(read_state(network), momentum)


def make_cascade(
    network: CutNetwork = NETWORK,
    *,
    rule: RateRule = "none",
    compute: Compute = CPU,
    rate: float = RATE,
) -> Cascade:
    engine = Cascade(
        copy.deepcopy(network), compute, momentum=MOMENTUM, weight_decay=DECAY, rate_rule=rule
    )
    engine.begin(START if network is NETWORK else start_of(network), rate)
    return engine


def plain_entry(cut: int, seed: int = 0, size: int = 5) -> Entry:
    generator = torch.Generator().manual_seed(1000 * cut + seed)
    features = torch.randn((size, WIDTHS[cut]), generator=generator)
    return Entry(
        f"{cut}-{seed}", cut, features, torch.randint(0, CLASSES, (size,), generator=generator)
    )


def entry_at(cut: int, seed: int = 0, size: int = 8) -> Entry:
    """A batch for the network with BatchNorm."""
    generator = torch.Generator().manual_seed(1000 * cut + seed)
    features = torch.randn((size, *SHAPES[cut - 1]), generator=generator).relu()
    return Entry(
        f"{cut}-{seed}", cut, features, torch.randint(0, CLASSES, (size,), generator=generator)
    )


def spoilt(entry: Entry, spoil: Callable[[Tensor], Tensor]) -> Entry:
    features = spoil(entry.features.clone())
    return Entry("bad", entry.cut, features, entry.labels[: len(features)])


def random_entries(seed: int) -> list[Entry]:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 7))
    return [
        plain_entry(int(rng.integers(1, 5)), 100 * seed + i, size=int(rng.integers(1, 9)))
        for i in range(count)
    ]


def train(engine: Cascade, *entries: Entry, want_gradients: bool = True) -> list[Step]:
    steps = []
    for outcome in engine.step_together(entries, want_gradients=want_gradients):
        assert isinstance(outcome, Step), outcome
        steps.append(outcome)
    return steps


def close(engine: Engine | Cascade, start: Model = START) -> Model:
    aggregation = Aggregation(start, first_server_block=1, device_copies=True)
    engine.close(aggregation)
    return aggregation.result()


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
            theirs = sequential.step("d", cut, entry.features, entry.labels, want_gradient=True)
            ours = engine.step("d", cut, entry.features, entry.labels, want_gradient=True)
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


# -- what cannot be trained on --------------------------------------------------------------------


def not_finite(features: Tensor) -> Tensor:
    features[0] = float("nan")
    return features


def far_too_large(features: Tensor) -> Tensor:
    return features * 3e38


def of_wrong_shape(features: Tensor) -> Tensor:
    return features[:, :-1]


def results(outcomes: Sequence[Step | BatchRefused]) -> list[Any]:
    return [o.loss if isinstance(o, Step) else o.reason for o in outcomes]


@pytest.mark.parametrize("spoil", [not_finite, far_too_large])
@pytest.mark.parametrize("want_gradients", [True, False])
@pytest.mark.parametrize("place", range(4))
def test_a_refused_batch_leaves_the_others_as_without_it(
    spoil: Callable[[Tensor], Tensor], want_gradients: bool, place: int
) -> None:
    """Bit for bit: parameters, buffers, momentum, answers, weights of the blocks."""
    good = [entry_at(3), entry_at(2), entry_at(5, size=1)]  # one image is enough in company
    engine, untouched = make_cascade(), make_cascade()
    for each in (engine, untouched):
        train(each, entry_at(2, 5), entry_at(4, 5))
    entries = good.copy()
    entries.insert(place, spoilt(entry_at(4), spoil))
    outcomes = engine.step_together(entries, want_gradients=want_gradients)
    refused = outcomes.pop(place)
    assert isinstance(refused, BatchRefused)
    assert refused.reason == "diverged"
    expected = untouched.step_together(good, want_gradients=want_gradients)
    assert results(outcomes) == results(expected)
    for one, other in zip(outcomes, expected, strict=True):
        assert isinstance(one, Step)
        assert isinstance(other, Step)
        if one.gradient is not None and other.gradient is not None:
            assert torch.equal(one.gradient, other.gradient)
    for each in (engine, untouched):
        train(each, entry_at(2, 6), entry_at(3, 6))
    ours, theirs = close(engine), close(untouched)
    assert_same(ours.state, theirs.state)
    assert_same(ours.momentum, theirs.momentum)


def test_a_batch_whose_gradient_alone_is_not_finite_is_refused() -> None:
    network = plain_network(root_at=2)
    at_zero = spoilt(plain_entry(2), torch.zeros_like)
    good = [plain_entry(1), plain_entry(4)]
    engine, untouched = make_cascade(network), make_cascade(network)
    outcomes = engine.step_together([at_zero, *good], want_gradients=True)
    assert results(outcomes[:1]) == ["diverged"]
    assert results(outcomes[1:]) == [step.loss for step in train(untouched, *good)]
    start = start_of(network)
    assert_same(close(engine, start).state, close(untouched, start).state)


def test_one_that_cannot_even_be_joined_is_refused_and_the_others_are_trained_on() -> None:
    good = [entry_at(3), entry_at(2)]
    engine, one_by_one = make_cascade(), make_cascade()
    odd = spoilt(entry_at(2, 1), of_wrong_shape)
    outcomes = engine.step_together([odd, *good], want_gradients=True)
    assert results(outcomes[:1]) == ["not_computable"]
    for outcome, entry in zip(outcomes[1:], good, strict=True):
        assert results([outcome]) == [train(one_by_one, entry)[0].loss]
    assert_same(close(engine).state, close(one_by_one).state)


@pytest.mark.parametrize("spoil", [not_finite, far_too_large])
def test_if_all_are_refused_nothing_changes(spoil: Callable[[Tensor], Tensor]) -> None:
    engine, untouched = make_cascade(), make_cascade()
    bad = [spoilt(entry_at(cut), spoil) for cut in (2, 5)]
    assert results(engine.step_together(bad, want_gradients=True)) == ["diverged"] * 2
    with pytest.raises(BatchRefused, match="diverged"):
        engine.step("bad", 2, bad[0].features, bad[0].labels, want_gradient=True)
    assert_same(close(engine).state, START.state)
    for each in (engine, untouched):
        train(each, entry_at(3))
    assert_same(close(engine).state, close(untouched).state)


def test_one_image_is_too_little_alone() -> None:
    engine = make_cascade()
    (refused,) = engine.step_together([entry_at(3, size=1)], want_gradients=True)
    assert results([refused]) == ["not_computable"]
    assert_same(close(engine).state, START.state)


def test_a_network_that_has_diverged_refuses_everything_and_is_left_out() -> None:
    engine = make_cascade(rate=1e38)
    for seed in range(4):
        outcomes = engine.step_together(
            [entry_at(3, seed), entry_at(5, seed)], want_gradients=False
        )
        if all(isinstance(outcome, BatchRefused) for outcome in outcomes):
            break
    else:
        raise AssertionError("it should have diverged")
    merged = close(engine)
    for values in [*merged.state.values(), *merged.momentum.values()]:
        assert np.isfinite(values).all()
