from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.envelopes import Envelope
from broker.fields import Message
from broker.training_messages import Activations, DeviceParameters, Gradients, Receipt, from_ranges
from coordinator.aggregation import Aggregation, Model, block_of, half_of
from coordinator.contribution import Contribution
from coordinator.engines import Averaging, Entry, Step
from coordinator.gradients import GradientEncoder
from coordinator.intake import Intake
from coordinator.observer import Observer
from coordinator.rounds import Work
from coordinator.training import RECEIPT_BATCHES, RECEIPT_WAIT_S, RoundInProgress
from tensors.codecs import encode_exact, parse_codec
from tensors.decoding import decode
from tensors.deltas import Delta, encode_delta
from tensors.networks import State
from tensors.parameters import pack_parameters
from tests.server_side import (
    NETWORK,
    SHAPES,
    START,
    STATE,
    features_at,
    make_activations,
    make_upload,
    trained_half,
)
from tests.tiny import CLASSES, CPU, RUN, Clock, assert_same, differs

STAMP = (RUN, 3, 1)
VERSION = 2
QUOTA = 6


class Counting(Observer):
    def __init__(self) -> None:
        self.discarded: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.late: list[tuple[str, int]] = []
        self.applied = 0

    def late_work(self, outcome: str, samples: int) -> None:
        self.late.append((outcome, samples))

    def batch_applied(self, cut: int, images: int, loss: float | None, seconds: float) -> None:
        self.applied += 1

    def batch_discarded(self, reason: str) -> None:
        self.discarded[reason] += 1

    def message_dropped(self, reason: str) -> None:
        self.dropped[reason] += 1


class Desk:
    """A round of device ``a`` at cut 2 and device ``b`` at cut 5."""

    def __init__(
        self,
        *,
        feedback: bool = True,
        engine: Any = None,
        codec: str = "fp32",
        credits_: int = 2,
        barrier: bool = True,
        kept: int = 2,
    ) -> None:
        self.clock = Clock()
        self.observer = Counting()
        self.brought: list[Contribution] = []
        self.merged = False
        self.round = RoundInProgress(
            engine or Averaging(copy.deepcopy(NETWORK), CPU, momentum=0.9, weight_decay=0.0),
            START,
            0.05,
            intake=Intake(SHAPES, classes=CLASSES, batch_size=9, channels_last=False),
            gradients=GradientEncoder(parse_codec(codec), masked=True) if feedback else None,
            device_copies=True,
            barrier=barrier,
            kept=kept,
            grant=lambda cut, devices: credits_,
            observer=self.observer,
            clock=self.clock,
        )
        work = {"a": Work(2, QUOTA), "b": Work(5, QUOTA)}
        self.round.open(STAMP, VERSION, work, first_server_block=2)

    def send(self, message: Activations, device: str = "a") -> list[Message]:
        return answers(self.round.activations(device, message), device)

    def upload(self, device: str = "a", **changes: Any) -> list[Message]:
        brought, out = self.round.parameters(device, upload_of(device, **changes))
        if brought is not None:
            self.brought.append(brought)
            if not self.merged:
                self.round.add(brought)
        return answers(out, device)

    def merge(self) -> Model:
        self.merged = True
        return self.round.merge()

    def applied(self, device: str = "a") -> set[int]:
        """By the coordinator's complete receipt."""
        receipt = self.round.join(device).message
        assert isinstance(receipt, Receipt)
        return from_ranges(receipt.applied, limit=QUOTA)


def answers(envelopes: list[Envelope], device: str) -> list[Message]:
    assert all(envelope.address.device == device for envelope in envelopes)
    return [envelope.message for envelope in envelopes]


def batch_of(number: int, *, cut: int = 2, **changes: Any) -> Activations:
    return make_activations(STAMP, number, cut=cut, **({"version": VERSION} | changes))


def upload_of(device: str, **changes: Any) -> DeviceParameters:
    cut = {"a": 2, "b": 5}[device]
    return make_upload(STAMP, cut=cut, version=VERSION, **({"produced": QUOTA} | changes))


def ranges(receipt: Message) -> tuple[set[int], dict[str, set[int]]]:
    assert isinstance(receipt, Receipt)
    return from_ranges(receipt.applied, limit=QUOTA), {
        reason: from_ranges(r, limit=QUOTA) for reason, r in receipt.discarded.items()
    }


def blocks_of(state: State) -> set[int]:
    return {block for name in state if (block := block_of(name)) is not None}


# -- batches --------------------------------------------------------------------------------------


def test_a_batch_is_answered_with_its_gradient() -> None:
    desk = Desk()
    (answer,) = desk.send(batch_of(0))
    assert isinstance(answer, Gradients)
    assert (answer.stamp, answer.batch) == (STAMP, 0)
    gradient = decode(answer.tensor)
    assert gradient.shape == (8, *SHAPES[1])
    assert np.abs(gradient).max() > 0
    assert desk.applied() == {0}


def test_a_batch_that_comes_twice_gets_the_same_answer_and_is_applied_once() -> None:
    twice, once = Desk(), Desk()
    (first,) = twice.send(batch_of(0))
    twice.send(batch_of(1))
    (again,) = twice.send(batch_of(0))
    assert again == first
    assert twice.observer.dropped == {"redelivered": 1}
    once.send(batch_of(0))
    once.send(batch_of(1))
    for desk in (twice, once):
        desk.upload()
    assert_same(twice.merge().state, once.merge().state)


def test_a_batch_whose_answer_is_forgotten_gets_a_receipt() -> None:
    desk = Desk(credits_=1)  # three answers are kept
    for batch in range(5):
        desk.send(batch_of(batch))
    (answer,) = desk.send(batch_of(0))
    applied, _ = ranges(answer)
    assert applied == set(range(5))


def test_without_feedback_receipts_say_what_became_of_batches() -> None:
    desk = Desk(feedback=False, credits_=4)
    assert desk.send(batch_of(0)) == []
    (receipt,) = desk.send(batch_of(1))
    assert ranges(receipt) == ({0, 1}, {})
    assert desk.send(batch_of(2)) == []
    desk.clock.advance(RECEIPT_WAIT_S)
    (envelope,) = desk.round.receipts()
    assert ranges(envelope.message) == ({2}, {})
    assert desk.round.receipts_due is None
    assert desk.round.receipts() == []


def test_with_feedback_receipts_come_too() -> None:
    desk = Desk()
    desk.send(batch_of(0))
    assert desk.round.receipts() == []
    assert desk.round.receipts_due == desk.clock.now + RECEIPT_WAIT_S
    desk.clock.advance(RECEIPT_WAIT_S)
    (envelope,) = desk.round.receipts()
    assert ranges(envelope.message) == ({0}, {})
    assert RECEIPT_BATCHES > 1


def bad_tensors() -> dict[str, tuple[bytes, str]]:
    fp32 = parse_codec("fp32")
    good = features_at(2)
    poisoned = good.copy()
    poisoned[1, 1, 1, 1] = np.nan
    endless = good.copy()
    endless[0, 0, 0, 0] = np.inf
    return {
        "empty": (b"", "truncated"),
        "rubbish": (b"not a tensor, but quite long", "bad_magic"),
        "cut short": (fp32.encode(good)[:-3], ""),
        "of another cut": (fp32.encode(features_at(5)), "wrong_shape"),
        "of fewer images": (fp32.encode(good[:7]), "wrong_shape"),
        "of more images": (fp32.encode(features_at(2, size=9)), ""),
        "transposed": (fp32.encode(good.transpose(0, 2, 3, 1).copy()), "wrong_shape"),
        "not a number": (fp32.encode(poisoned), "not_finite"),
        "infinite": (fp32.encode(endless), "not_finite"),
        "whole numbers": (encode_exact(np.ones((8, *SHAPES[1]), np.int64)), ""),
        "double precision": (encode_exact(np.ones((8, *SHAPES[1]), np.float64)), ""),
        "half precision": (encode_exact(np.ones((8, *SHAPES[1]), np.float16)), ""),
    }


BAD_TENSORS = bad_tensors()


@pytest.mark.parametrize("what", BAD_TENSORS)
def test_a_tensor_that_is_no_batch_is_discarded_with_its_reason_and_a_receipt(what: str) -> None:
    tensor, wanted = BAD_TENSORS[what]
    desk = Desk()
    (receipt,) = desk.send(batch_of(0, tensor=tensor))
    applied, discarded = ranges(receipt)
    assert not applied
    ((reason, batches),) = discarded.items()
    assert batches == {0}
    assert not wanted or reason == wanted
    assert desk.observer.discarded == {reason: 1}
    desk.upload()
    untouched = differs(desk.merge().state, STATE)
    assert not untouched, "nothing of it got into the model"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": VERSION - 1}, "wrong_version"),
        ({"version": VERSION + 1}, "wrong_version"),
        ({"labels": [0] * 7 + [CLASSES]}, "bad_labels"),
        ({"labels": [0] * 7 + [2**31]}, "bad_labels"),
    ],
)
def test_other_batches_that_are_discarded(changes: dict[str, Any], reason: str) -> None:
    desk = Desk()
    (receipt,) = desk.send(batch_of(0, **changes))
    assert ranges(receipt) == (set(), {reason: {0}})
    (again,) = desk.send(batch_of(0))
    assert ranges(again) == (set(), {reason: {0}}), "it has its outcome; nothing is applied now"


def test_a_batch_beyond_the_quota() -> None:
    desk = Desk()
    for number in (QUOTA, 2**53):
        (receipt,) = desk.send(batch_of(number))
        assert ranges(receipt) == (set(), {})
    assert desk.observer.discarded == {"beyond_quota": 2}


def test_a_batch_of_a_stranger() -> None:
    desk = Desk()
    (receipt,) = desk.send(batch_of(0), "stranger")
    assert isinstance(receipt, Receipt)
    assert not receipt.participant
    assert receipt.credits == 0
    assert desk.observer.discarded == {"not_a_participant": 1}


def test_a_batch_after_the_upload_is_late() -> None:
    desk = Desk()
    desk.send(batch_of(0))
    desk.upload()
    (receipt,) = desk.send(batch_of(1))
    assert ranges(receipt)[1] == {"late": {1}}
    assert desk.round.record(0)["devices"]["a"]["account"]["applied"] == 1


class Enormous:
    """An engine whose gradients are finite but too large for half precision."""

    gathers = False

    def begin(self, model: Model, learning_rate: float) -> None: ...

    def step(self, batch: Entry, *, want_gradient: bool) -> Step:
        return Step(1.0, 0, len(batch.labels), batch.features * 0 + 1e30)

    def finish(self, device: str) -> tuple[State, State]:
        return {}, {}

    def close(self, aggregation: Aggregation) -> None: ...


def test_a_gradient_the_codec_cannot_carry_is_sent_as_fp32() -> None:
    desk = Desk(engine=Enormous(), codec="fp16")
    (sent,) = [m for m in desk.send(batch_of(0)) if isinstance(m, Gradients)]
    assert (decode(sent.tensor) == np.float32(1e30)).all()
    assert desk.applied() == {0}


def test_a_batch_above_the_agreed_size_is_refused() -> None:
    desk = Desk()
    desk.send(batch_of(0, labels=[0] * 10))
    assert desk.applied() == set()
    assert desk.observer.discarded["batch_too_large"] == 1


# -- joining --------------------------------------------------------------------------------------


def test_a_device_that_joins_late_is_told_where_it_stands() -> None:
    desk = Desk()
    desk.send(batch_of(0))
    desk.send(batch_of(3, labels=[CLASSES] * 8))
    receipt = desk.round.join("a").message
    assert isinstance(receipt, Receipt)
    assert receipt.complete
    assert receipt.participant
    assert not receipt.final
    assert receipt.next_batch == 4
    assert receipt.credits == 2
    assert ranges(receipt) == ({0}, {"bad_labels": {3}})
    stranger = desk.round.join("stranger").message
    assert isinstance(stranger, Receipt)
    assert not stranger.participant


# -- uploads --------------------------------------------------------------------------------------


def test_an_upload_gets_the_final_receipt_every_time_it_comes() -> None:
    desk = Desk()
    for batch in range(4):
        desk.send(batch_of(batch))
    first, again = desk.upload(), desk.upload()
    assert first == again
    (receipt,) = first
    assert isinstance(receipt, Receipt)
    assert receipt.final
    assert ranges(receipt) == ({0, 1, 2, 3}, {})
    assert desk.round.finished == 1
    account = desk.round.record(0)["devices"]["a"]["account"]
    assert account == {"produced": QUOTA, "applied": 4, "discarded": {}, "expired": 2}


def test_an_upload_counts_with_the_samples_the_coordinator_applied() -> None:
    desk = Desk()
    for batch in range(3):
        desk.send(batch_of(batch))
    desk.send(batch_of(0, cut=5), "b")
    desk.upload("a", produced=2**53)  # a claim
    desk.upload("b")
    merged = desk.merge().state
    a, b = trained_half(2), trained_half(5)
    name = "blocks.1.conv1.weight"
    np.testing.assert_allclose(merged[name], (24 * a[name] + 8 * b[name]) / 32, rtol=1e-5)
    assert desk.round.trained_cuts == {2, 5}
    assert [(f.device, f.samples) for f in desk.round.added] == [("a", 24), ("b", 8)]


def uploads() -> dict[str, bytes]:
    good = trained_half(2)
    name, variance = "blocks.1.conv1.weight", "blocks.1.bn1.running_var"
    poisoned = {n: v.copy() for n, v in good.items()}
    poisoned[name][0, 0, 0, 0] = np.nan
    negative = {n: v.copy() for n, v in good.items()}
    negative[variance][0] = -1
    return {
        "rubbish": b"rubbish",
        "empty": b"",
        "cut short": pack_parameters(good)[:-5],
        "not a number": pack_parameters(poisoned),
        "negative variance": pack_parameters(negative),
        "names of another cut": pack_parameters(trained_half(5)),
        "a name less": pack_parameters({n: v for n, v in good.items() if n != name}),
        "a name more": pack_parameters(good | {"blocks.99.x": good[name]}),
        "another shape": pack_parameters(good | {name: good[name][:1]}),
        "no parameters": pack_parameters({}),
    }


UPLOADS = uploads()


@pytest.mark.parametrize("what", UPLOADS)
def test_an_upload_that_cannot_be_used_is_left_out(what: str) -> None:
    desk = Desk()
    desk.send(batch_of(0))
    (receipt,) = desk.upload(state=UPLOADS[what])
    assert isinstance(receipt, Receipt)
    assert receipt.final, "the device goes on to the next round all the same"
    assert desk.observer.dropped == {"bad_parameters": 1}
    merged = desk.merge().state
    changed = differs(merged, STATE)
    assert changed, "its server-side copy did learn"
    assert all((block_of(name) or 0) >= 2 for name in changed)


def difference(cut: int = 2, base: dict[str, Any] = STATE) -> Delta:
    """A device's half as what it learnt."""
    return encode_delta(trained_half(cut), half_of(base, cut), parse_codec("int8+zstd"), {})


def test_an_upload_may_be_the_difference_to_the_rounds_version() -> None:
    desk, whole = Desk(), Desk()
    for each in (desk, whole):
        each.send(batch_of(0))
    desk.upload(base=VERSION, state=difference().pack())
    whole.upload(state=pack_parameters(difference().state))
    assert desk.observer.dropped == whole.observer.dropped == {}
    merged = desk.merge().state
    assert_same(merged, whole.merge().state)
    assert "blocks.1.conv1.weight" in differs(merged, STATE)


@pytest.mark.parametrize(
    "changes",
    [
        {"base": VERSION - 1},
        {"base": VERSION + 1},
        {"base": None},
        {"state": pack_parameters(STATE)},
        {"state": difference(5).pack()},
        {"state": b""},
    ],
    ids=["of an older version", "of a newer", "of none", "of all", "of another cut", "empty"],
)
def test_a_difference_that_cannot_be_used_is_left_out(changes: dict[str, Any]) -> None:
    desk = Desk()
    desk.send(batch_of(0))
    fields: dict[str, Any] = {"base": VERSION, "state": difference().pack()}
    (receipt,) = desk.upload(**(fields | changes))
    assert isinstance(receipt, Receipt)
    assert receipt.final
    assert desk.observer.dropped == {"bad_parameters": 1}
    changed = differs(desk.merge().state, STATE)
    assert all((block_of(name) or 0) >= 2 for name in changed)


def test_an_upload_after_the_round_brings_both_halves_for_a_later_one_once() -> None:
    desk = Desk()
    desk.send(batch_of(0))
    merged = desk.merge().state
    kept = {n: v.copy() for n, v in merged.items()}
    for _ in range(2):
        (receipt,) = desk.upload()
        assert isinstance(receipt, Receipt)
        assert receipt.final
    (brought,) = desk.brought
    assert (brought.device, brought.cut, brought.version, brought.samples) == ("a", 2, VERSION, 8)
    assert brought.half.keys() == trained_half(2).keys()
    assert blocks_of(brought.server) == set(range(2, 10))
    assert_same(merged, kept)


def test_of_devices_that_miss_the_end_only_so_many_halves_are_kept() -> None:
    desk = Desk(kept=1)
    for device, cut in (("a", 2), ("b", 5)):
        desk.send(batch_of(0, cut=cut), device)
    desk.merge()
    for device in "ab":
        assert isinstance(desk.upload(device)[0], Receipt)
    assert [brought.device for brought in desk.brought] == ["a"]
    assert desk.observer.late == [("not_kept", 8)]


def test_without_a_barrier_training_goes_on_after_the_merge() -> None:
    desk = Desk(barrier=False)
    desk.send(batch_of(0))
    desk.merge()
    assert isinstance(desk.send(batch_of(1))[0], Gradients)
    desk.upload()
    (brought,) = desk.brought
    assert brought.samples == 16


def test_another_leg_goes_on_with_the_next_number_and_counts_only_what_is_new() -> None:
    desk = Desk(barrier=False)
    desk.send(batch_of(0))
    desk.upload(produced=3)
    desk.round.admit("a", Work(2, QUOTA), devices=2)
    receipt = desk.round.join("a").message
    assert isinstance(receipt, Receipt)
    assert (receipt.next_batch, receipt.quota) == (3, 3 + QUOTA)
    desk.round.admit("a", Work(2, QUOTA), devices=2)
    assert desk.round.join("a").message == receipt, "asking twice is not two legs"
    desk.send(batch_of(3))
    desk.send(batch_of(4))
    desk.upload(produced=5)
    assert [brought.samples for brought in desk.brought] == [8, 16]


def test_an_upload_of_a_stranger() -> None:
    desk = Desk()
    brought, (told,) = desk.round.parameters("stranger", upload_of("a"))
    assert brought is None
    assert isinstance(told.message, Receipt)
    assert (told.message.participant, told.message.final) == (False, True)
    assert desk.observer.dropped == {"not_a_participant": 1}


# -- anything, in any order -----------------------------------------------------------------------

NUMBERS = st.integers(0, QUOTA)
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("batch"), st.sampled_from("ab"), NUMBERS, st.sampled_from(["", "bad"])),
        st.tuples(st.just("batch"), st.sampled_from("ab"), NUMBERS, st.just("")),
        st.tuples(st.just("join"), st.sampled_from("abx")),
        st.tuples(st.just("upload"), st.sampled_from("ab"), st.sampled_from([0, QUOTA, 2**53])),
        st.tuples(st.just("wait"), st.floats(0, 1)),
    ),
    max_size=25,
)


@settings(max_examples=25)
@given(events=EVENTS, feedback=st.booleans())
def test_receipts_add_up_to_what_became_of_the_batches(
    events: list[tuple[Any, ...]], feedback: bool
) -> None:
    desk = Desk(feedback=feedback)
    told: dict[str, dict[int, str]] = {"a": {}, "b": {}, "x": {}}
    for event in events:
        for envelope in react(desk, event):
            if isinstance(envelope.message, Receipt):
                note(told[str(envelope.address.device)], envelope.message)
        assert_balanced(desk)
    for device in "ab":
        note(told[device], desk.round.join(device).message)
        account = desk.round.record(0)["devices"][device]["account"]
        assert list(told[device].values()).count("applied") == account["applied"]
        assert len(told[device]) == account["applied"] + sum(account["discarded"].values())


def react(desk: Desk, event: tuple[Any, ...]) -> list[Envelope]:
    match event:
        case ("batch", device, number, spoil):
            changes = {"labels": [CLASSES] * 8} if spoil else {}
            cut = 2 if device == "a" else 5
            return desk.round.activations(device, batch_of(number, cut=cut, **changes))
        case ("join", device):
            return [desk.round.join(device)]
        case ("upload", device, produced):
            return desk.round.parameters(device, upload_of(device, produced=produced))[1]
        case (_, seconds):
            desk.clock.advance(seconds)
    return desk.round.receipts()


def note(told: dict[int, str], receipt: Message) -> None:
    """Enter a receipt; an outcome that was told before must not change."""
    applied, discarded = ranges(receipt)
    for reason, batches in (("applied", applied), *discarded.items()):
        for batch in batches:
            assert told.setdefault(batch, reason) == reason


def assert_balanced(desk: Desk) -> None:
    entries = desk.round.record(0)["devices"]
    for name, entry in entries.items():
        account = entry["account"]
        assert account["expired"] >= 0
        assert account["produced"] == (
            account["applied"] + sum(account["discarded"].values()) + account["expired"]
        )
        assert entry["samples"] == 8 * account["applied"], name
    assert sum(e["account"]["applied"] for e in entries.values()) == desk.observer.applied
