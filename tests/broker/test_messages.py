from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.envelopes import (
    Envelope,
    channel,
    decode_message,
    down,
    down_later,
    encode_message,
    to_all,
    to_cut,
    up,
)
from broker.errors import MessageError
from broker.fields import MAX_BATCH, MAX_BLOCKS, Message
from broker.link import single_frame
from broker.messages import KINDS, LOSSY, PROTOCOL, Command, Hello, Status, Telemetry
from broker.serving_messages import CutPolicy, Features, Prediction, Serving
from broker.topics import (
    ALL_KINDS,
    CLAIM_DOWN_KINDS,
    CLAIM_UP_KINDS,
    CUT_KINDS,
    DOWN_KINDS,
    UP_KINDS,
    Address,
    Topics,
)
from broker.training_messages import (
    Activations,
    Gradients,
    Receipt,
    Report,
    Round,
    from_ranges,
    to_ranges,
)
from tests.fake_device import make_manifest, make_measurement, make_parameters, receipt_of
from tests.server_side import make_activations, make_upload
from tests.tiny import make_assignment, make_hello, make_round

STAMP = ("run", 1, 0)
SERVING = Serving(
    run="run",
    version=3,
    exit_rule="entropy",
    offload_timeout_s=2.0,
    audit_share=0.05,
    cuts={"2": CutPolicy(threshold=0.5), "12": CutPolicy(threshold=1, agreement=0.9)},
)
EXAMPLES: list[Envelope] = [
    up("d", make_hello(measurement=make_measurement())),
    up("d", Status(state="online", connection="c1", phase="training")),
    up("d", make_activations(STAMP, 3, cut=2, version=0)),
    up("d", make_upload(STAMP, cut=2, version=0, produced=3)),
    up("d", Report(run="run", round=1, attempt=0, discarded={"late": 2}, exit_loss=0.5)),
    down("d", make_assignment()),
    down("d", make_assignment(cut=None)),
    down("d", Gradients(run="r", round=1, attempt=0, batch=1, loss=0.1, correct=2, tensor=b"x")),
    down("d", receipt_of(make_round(), applied=[(0, 3), (5, 5)], discarded={"late": [(4, 4)]})),
    down("d", Prediction(request=1, version=2, refused="version")),
    down("d", make_parameters(3)),
    down("d", Command(command="stop", reason="no images")),
    to_all(make_round()),
    to_all(Command(command="stop")),
    to_cut(2, make_manifest(1)),
    to_cut(2, make_parameters(1)),
    to_cut(2, make_parameters(2, base=1)),
    to_all(SERVING),
]


def pack(fields: object) -> bytes:
    data: bytes = msgpack.packb(fields)
    return data


def packed(message: Message) -> bytes:
    return b"".join(encode_message(message))


def fields_of(message: Message) -> dict[str, Any]:
    unpacked: dict[str, Any] = msgpack.unpackb(packed(message))
    return unpacked


def refused(address: Address, data: bytes) -> str:
    with pytest.raises(MessageError) as caught:
        decode_message(address, data)
    return caught.value.reason


def reason_of(step: Callable[[], object]) -> str | None:
    """Why a message was refused; None if it was not. Any other error is a failure."""
    try:
        step()
    except MessageError as exc:
        return exc.reason
    return None


@pytest.mark.parametrize("envelope", EXAMPLES, ids=lambda e: f"{channel(e.address)}")
def test_a_message_arrives_as_it_was_sent(envelope: Envelope) -> None:
    data = packed(envelope.message)
    for form in (data, bytearray(data), memoryview(data)):
        assert decode_message(envelope.address, form) == envelope.message


@pytest.mark.parametrize("envelope", EXAMPLES, ids=lambda e: f"{channel(e.address)}")
def test_fields_of_a_newer_peer_are_ignored(envelope: Envelope) -> None:
    fields = fields_of(envelope.message) | {"not_yet_known": [1, {"a": None}]}
    assert decode_message(envelope.address, pack(fields)) == envelope.message


@pytest.mark.parametrize("envelope", EXAMPLES, ids=lambda e: f"{channel(e.address)}")
def test_a_required_field_must_be_there(envelope: Envelope) -> None:
    model = type(envelope.message)
    for name, field in model.model_fields.items():
        fields = fields_of(envelope.message)
        if not field.is_required() or name not in fields:
            continue
        del fields[name]
        assert refused(envelope.address, pack(fields)) == "invalid"


def test_every_place_of_the_topic_tree_has_a_kind_of_message() -> None:
    places = {
        "up": UP_KINDS | CLAIM_UP_KINDS,
        "down": DOWN_KINDS | CLAIM_DOWN_KINDS,
        "all": ALL_KINDS,
        "cut": CUT_KINDS,
    }
    assert KINDS.keys() == {(place, kind) for place, kinds in places.items() for kind in kinds}
    assert KINDS.keys() >= LOSSY


def test_only_what_changes_no_model_may_be_lost() -> None:
    assert {KINDS[place] for place in LOSSY} == {Report, Telemetry, Features, Prediction}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "malformed"),
        (b"\xc1", "malformed"),
        (b"rubbish", "malformed"),
        (pack([1, 2]), "malformed"),
        (pack(None), "malformed"),
        (pack({1: 2}), "malformed"),
        (pack({"state": "online"}) + b"\x00", "malformed"),
        (pack({"state": "online", "connection": "c"})[:-1], "malformed"),
        (b"\xdf\xff\xff\xff\xff", "malformed"),
        (b"\x81\xa1a" + b"\xdd\xff\xff\xff\xff", "malformed"),
        (b"\x81\xa1a" + b"\xc6\xff\xff\xff\xff", "malformed"),
        (b"\x81\xa1a" * 3000, "malformed"),
        (b"\x81\xa1a" + b"\x91" * 100_000, "malformed"),
        (pack({"a": msgpack.ExtType(5, b"x")}), "malformed"),
        (pack({"a": msgpack.ExtType(5, b"")}), "malformed"),
        (pack({"a": msgpack.Timestamp(0)}), "malformed"),
        (b"\x81\xa1a\xa2\xff\xfe", "malformed"),
        (pack({}), "invalid"),
        (pack({"state": "online"}), "invalid"),
        (pack({"state": "asleep", "connection": "c"}), "invalid"),
        (pack({"state": "online", "connection": "a/b"}), "invalid"),
        (pack({"state": "online", "connection": "c" * 65}), "invalid"),
        (pack({"state": "online", "connection": b"c"}), "invalid"),
        (pack({"state": "online", "connection": "c", "phase": "x" * 257}), "invalid"),
        (pack({b"state": "online", b"connection": "c"}), "malformed"),
    ],
)
def test_rubbish_is_refused_with_a_reason(data: bytes, reason: str) -> None:
    assert refused(up("d", Status(state="online", connection="c")).address, data) == reason


@pytest.mark.parametrize(
    ("changes"),
    [
        {"batch": -1},
        {"batch": 2**53 + 1},
        {"batch": 1.0},
        {"batch": "1"},
        {"batch": True},
        {"labels": [0] * (MAX_BATCH + 1)},
        {"labels": [-1]},
        {"labels": [0.5]},
        {"labels": ["1"]},
        {"labels": [True]},
        {"labels": 3},
        {"tensor": "text"},
        {"run": "../etc"},
        {"run": ""},
        {"attempt": None},
    ],
    ids=str,
)
def test_activations_out_of_bounds(changes: dict[str, Any]) -> None:
    envelope = up("d", make_activations(STAMP, 3, cut=2, version=0))
    assert refused(envelope.address, pack(fields_of(envelope.message) | changes)) == "invalid"


@pytest.mark.parametrize(
    "changes",
    [
        {"applied": [[1]]},
        {"applied": [[1, 2, 3]]},
        {"applied": [["1", "2"]]},
        {"applied": [[-1, 2]]},
        {"applied": [[0, 0]] * 70_000},
        {"discarded": {"a reason with spaces": []}},
        {"credits": 5000},
    ],
    ids=lambda c: str(c)[:40],
)
def test_receipts_out_of_bounds(changes: dict[str, Any]) -> None:
    envelope = down("d", receipt_of(make_round()))
    assert refused(envelope.address, pack(fields_of(envelope.message) | changes)) == "invalid"


@pytest.mark.parametrize(
    "changes",
    [
        {"image": [1, 28]},
        {"image": [1, 28, -28]},
        {"cut": 0},
        {"samples": -1},
        {"measurement": {}},
        {"software": "x" * 257},
    ],
    ids=str,
)
def test_hellos_out_of_bounds(changes: dict[str, Any]) -> None:
    envelope = up("d", make_hello())
    assert refused(envelope.address, pack(fields_of(envelope.message) | changes)) == "invalid"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_durations_and_rates_are_finite_and_not_negative(value: float) -> None:
    for name in ("learning_rate", "deadline_s"):
        fields = fields_of(make_round()) | {name: value}
        assert refused(to_all(make_round()).address, pack(fields)) == "invalid"


@pytest.mark.parametrize("name", ["feedback_weight", "exit_weight", "gradient_timeout_s"])
def test_an_assignments_numbers_are_finite(name: str) -> None:
    for value in (float("nan"), float("inf")):
        envelope = down("d", make_assignment())
        fields = fields_of(envelope.message) | {name: value}
        assert refused(envelope.address, pack(fields)) == "invalid"


@pytest.mark.parametrize(
    "changes",
    [
        {"cuts": {"0": {"threshold": 0.5}}},
        {"cuts": {"02": {"threshold": 0.5}}},
        {"cuts": {"head": {"threshold": 0.5}}},
        {"cuts": {"2": {}}},
        {"cuts": {"2": {"threshold": float("nan")}}},
        {"cuts": {"2": {"threshold": 1.01}}},
        {"cuts": {"2": {"threshold": 0.5, "agreement": 1.01}}},
        {"cuts": {str(cut): {"threshold": 0.5} for cut in range(1, MAX_BLOCKS + 2)}},
        {"audit_share": -0.1},
        {"audit_share": float("nan")},
        {"offload_timeout_s": 0.0},
        {"exit_rule": "luck"},
    ],
    ids=lambda c: str(c)[:60],
)
def test_a_serving_version_out_of_bounds(changes: dict[str, Any]) -> None:
    assert refused(to_all(SERVING).address, pack(fields_of(SERVING) | changes)) == "invalid"


def test_a_serving_version_of_any_network_can_be_retained() -> None:
    """A topic keeps one message, and a message that is retained has to be one frame."""
    policy = CutPolicy(threshold=0.1, agreement=0.1, accuracy=0.1, offload_rate=0.1)
    cuts = {str(cut): policy for cut in range(1, MAX_BLOCKS + 1)}
    longest = SERVING.model_copy(update={"run": "r" * 64, "cuts": cuts})
    assert len(single_frame(longest)) <= 131_072 - 1024


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(), st.binary()
)
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v, max_size=3)
)


@given(data=st.data(), envelope=st.sampled_from(EXAMPLES))
def test_any_values_make_a_valid_message_or_a_message_error(
    data: st.DataObject, envelope: Envelope
) -> None:
    fields = fields_of(envelope.message)
    for name in data.draw(st.sets(st.sampled_from(sorted(fields)), min_size=1)):
        fields[name] = data.draw(VALUES)
    assert reason_of(lambda: decode_message(envelope.address, pack(fields))) in (None, "invalid")


@pytest.mark.parametrize(
    ("envelope", "name", "value"),
    [
        (
            up("d", Report(run="r", round=1, attempt=0)),
            "discarded",
            dict.fromkeys(map(str, range(65)), 1),
        ),
        (EXAMPLES[8], "discarded", {f"not a name {i}": [] for i in range(50_000)}),
        (EXAMPLES[-1], "cuts", {f"not a cut {i}": {} for i in range(50_000)}),
        (EXAMPLES[8], "applied", [[-1, -1]] * 50_000),
        (EXAMPLES[2], "labels", [-1] * 100_000),
        (EXAMPLES[2], "labels", [[]] * MAX_BATCH),
    ],
    ids=["reasons", "not names", "not cuts", "ranges", "labels", "lists"],
)
def test_a_message_full_of_errors_costs_little(envelope: Envelope, name: str, value: Any) -> None:
    """The validator would describe every single one, at a kilobyte or more each."""
    data = pack(fields_of(envelope.message) | {name: value})
    assert refused(envelope.address, data) == "invalid"
    tracemalloc.start()
    try:
        assert refused(envelope.address, data) == "invalid"
        assert tracemalloc.get_traced_memory()[1] < 60 * len(data) + 100_000
    finally:
        tracemalloc.stop()


def test_what_is_missing_is_named() -> None:
    with pytest.raises(MessageError, match=r"Hello\.boot"):
        decode_message(up("d", make_hello()).address, pack({}))


def test_a_message_never_says_who_sent_it() -> None:
    """Identity comes from the topic, which the broker enforces."""
    for (place, _), model in KINDS.items():
        if place == "up":
            assert not {"device", "sender", "name"} & model.model_fields.keys()


def test_a_message_that_is_never_sent_somewhere_has_no_address_there() -> None:
    with pytest.raises(AssertionError):
        up("d", make_round())


def test_addresses_are_those_of_the_topic_tree() -> None:
    topics = Topics("f")
    assert topics.format(up("d", make_hello()).address) == "splitfleet/f/device/d/up/hello"
    assert topics.format(to_cut(3, make_manifest(1)).address) == "splitfleet/f/cut/3/manifest"
    assert topics.format(to_all(make_round()).address) == "splitfleet/f/all/round"


def test_a_hello_and_a_coordinator_tell_their_protocol() -> None:
    assert fields_of(make_hello())["protocol"] == PROTOCOL


# -- ranges ---------------------------------------------------------------------------------------


@given(st.sets(st.integers(0, 300)))
def test_ranges_are_the_numbers_they_were_made_of(numbers: set[int]) -> None:
    ranges = to_ranges(numbers)
    assert from_ranges(ranges, limit=301) == numbers
    for (_, last), (first, _) in pairwise(ranges):
        assert first > last + 1, "as few as possible"


@given(st.lists(st.tuples(st.integers(0, 2**53), st.integers(0, 2**53)), max_size=5))
def test_ranges_of_a_stranger_never_take_more_memory_than_the_limit(
    ranges: list[tuple[int, int]],
) -> None:
    numbers: list[int] = []
    reason = reason_of(lambda: numbers.extend(from_ranges(ranges, limit=100)))
    assert reason in (None, "invalid")
    assert len(numbers) <= 100


def test_messages_are_values() -> None:
    assert make_round() == make_round()
    with pytest.raises(Exception, match="frozen"):
        make_round().version = 3  # type: ignore[misc]
    assert isinstance(make_round(), Round)
    assert {Activations, Hello, Receipt} <= set(KINDS.values())


def test_a_deferred_message_is_made_once_and_looks_like_any_other() -> None:
    made: list[int] = []

    def make() -> Message:
        made.append(1)
        return Prediction(request=1, version=2)

    envelope = down_later("device", Prediction, make)
    assert made == [], "not before somebody asks"
    assert envelope.address == down("device", Prediction(request=1, version=2)).address
    assert envelope.message is envelope.message
    assert made == [1]
