"""The committed vectors are what the code makes and reads."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from pydantic import BaseModel

from broker.envelopes import channel, decode_message, encode_message
from broker.errors import MessageError, TopicError
from broker.frames import Limits as FrameLimits
from broker.frames import Reassembler
from broker.messages import KINDS
from broker.topics import Topics
from tensors.decoding import decode, decode_torch, nonzero
from tensors.deltas import apply_delta, fingerprint
from tensors.errors import FormatError
from tensors.format import Limits, Lossless, read_body, read_header
from tensors.parameters import unpack_parameters
from tests.vectors.make import FAMILIES, read, render
from tests.vectors.messages import plain
from tests.vectors.tensors import bits_of, described, from_bits, mask_of

TOPICS = Topics("fleet-1")


def named(family: str) -> pytest.MarkDecorator:
    vectors = read(family)
    return pytest.mark.parametrize("vector", vectors, ids=[vector["name"] for vector in vectors])


def without_zstd(vector: dict[str, Any]) -> dict[str, Any]:
    """The vector with its body decompressed: what zstd makes of it depends on its version."""
    if not vector.get("zstd"):
        return vector
    data = bytes.fromhex(vector["encoded"])
    header = read_header(data)
    side = data[header.size : header.size + 8 * header.maps]
    body = read_body(data, header).tobytes()
    opened = replace(header, lossless=Lossless.NONE, body_bytes=len(body)).pack(side, body)
    return vector | {"encoded": opened.hex()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_committed_vectors_are_those_that_are_made(family: str) -> None:
    made = json.loads(render(FAMILIES[family]()))["vectors"]
    for committed, fresh in zip(read(family), made, strict=True):
        if family == "rejected" and "frame" in committed["name"]:
            assert committed | {"encoded": ""} == fresh | {"encoded": ""}
        else:
            assert without_zstd(committed) == without_zstd(fresh), committed["name"]


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_told_apart(family: str) -> None:
    names = [(vector.get("kind"), vector["name"]) for vector in read(family)]
    assert len(set(names)) == len(names)


# -- tensors and packs ----------------------------------------------------------------------------


@named("tensors")
def test_a_tensor_decodes_to_its_values(vector: dict[str, Any]) -> None:
    data, shape = bytes.fromhex(vector["encoded"]), tuple(vector["shape"])
    keep = None if vector["keep"] is None else mask_of(vector["keep"], shape)
    for form in (data, bytearray(data), memoryview(data)):
        array = decode(form, keep=keep)
        assert (array.shape, array.dtype) == (shape, vector["dtype"])
        assert bits_of(array) == vector["decoded"]
    tensor = decode_torch(data, keep=keep).numpy()
    assert (tensor.shape, bits_of(tensor)) == (shape, vector["decoded"])
    if keep is None:
        expected = from_bits(vector["decoded"], vector["dtype"], vector["shape"]) != 0
        assert (nonzero(data) == expected).all()


@named("parameters")
def test_a_pack_decodes_to_its_state(vector: dict[str, Any]) -> None:
    pack = bytes.fromhex(vector["encoded"])
    state = unpack_parameters(pack)
    assert described(state) == vector["records"]
    if vector["base"] is not None:
        state = apply_delta(state_of(vector["base"]), pack)
    assert described(state) == vector["state"]
    assert fingerprint(state) == vector["sha256"]


def state_of(listed: list[dict[str, Any]]) -> dict[str, Any]:
    return {e["name"]: from_bits(e["decoded"], e["dtype"], e["shape"]) for e in listed}


def test_every_part_of_the_format_has_a_vector() -> None:
    headers = [read_header(bytes.fromhex(vector["encoded"])) for vector in read("tensors")]
    affine = [header for header in headers if header.top]
    assert {header.bits for header in affine} == set(range(1, 9))
    for header_set in (headers, [header for header in headers if not header.top]):
        assert {header.lossless for header in header_set} == set(Lossless)
    assert {(h.per_channel, h.masked) for h in affine} == {
        (False, False),
        (True, False),
        (False, True),
    }
    assert {len(header.shape) for header in headers} == set(range(9))
    assert {header.dtype.str[1:] for header in headers} == {v["dtype"] for v in read("tensors")}


# -- messages and frames --------------------------------------------------------------------------


@named("messages")
def test_a_message_is_read_and_written(vector: dict[str, Any]) -> None:
    address, data = TOPICS.parse(vector["topic"]), bytes.fromhex(vector["encoded"])
    message = decode_message(address, data)
    fields = plain(message.model_dump(exclude_none=True))
    assert json.dumps(fields) == json.dumps(vector["fields"])
    assert b"".join(encode_message(message)) == data
    assert vector["retain"] is address.retained


def test_every_field_of_every_message_has_a_vector() -> None:
    said: dict[tuple[str, str], set[str]] = {place: set() for place in KINDS}
    for vector in read("messages"):
        said[channel(TOPICS.parse(vector["topic"]))] |= set(paths(vector["fields"]))
    for place, model in KINDS.items():
        assert set(field_paths(model)) <= said[place], f"{place}: run tests.vectors.make"


def paths(fields: dict[str, Any]) -> list[str]:
    """Fields and those of the maps in them; in a map of maps, which key it was is left out."""
    found = list(fields)
    for name, value in fields.items():
        for key, inner in value.items() if isinstance(value, dict) else ():
            found += paths({name: inner}) if isinstance(inner, dict) else [f"{name}.{key}"]
    return found


def field_paths(model: type[BaseModel]) -> list[str]:
    found = list(model.model_fields)
    for name, inner in submodels(model).items():
        found += [f"{name}.{path}" for path in field_paths(inner)]
    return found


def submodels(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """Fields that are maps of their own, optional or not."""
    found = {}
    for name, field in model.model_fields.items():
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if inner:
            found[name] = inner[0]
    return found


@named("frames")
def test_frames_are_put_together(vector: dict[str, Any]) -> None:
    reassembler = Reassembler(FrameLimits(**vector["limits"]))
    for step in vector["steps"]:
        assert len(reassembler.expire(step["now"])) == step["expired"]
        frame, message, reason = bytes.fromhex(step["frame"]), None, None
        try:
            message = reassembler.add(step["sender"], step["topic"], frame, step["now"])
        except MessageError as exc:
            reason = exc.reason
        whole = None if message is None else bytes(message).hex()
        assert (whole, reason) == (step["message"], step["reason"])
    assert reassembler.held_bytes >= 0


# -- what is refused ------------------------------------------------------------------------------


@named("rejected")
def test_what_is_wrong_is_refused_with_its_reason(vector: dict[str, Any]) -> None:
    assert refusal(vector) == vector["reason"]


def refusal(vector: dict[str, Any]) -> str | None:
    data = bytes.fromhex(vector["encoded"])
    try:
        if vector["kind"] == "message":
            decode_message(TOPICS.parse(vector["topic"]), data)
            return None
        if vector["kind"] == "delta":
            apply_delta(state_of(vector["base"]), data)
            return None
        limits = Limits(**vector["limits"]) if vector["limits"] else Limits()
        if vector["kind"] == "pack":
            unpack_parameters(data, limits=limits)
            return None
        keep = vector["keep"]
        mask = None if keep is None else mask_of(keep, read_header(data).shape)
        decode(data, limits=limits, keep=mask)
    except TopicError:
        return "unexpected_topic"
    except (MessageError, FormatError) as exc:
        return exc.reason
    return None


def test_every_reason_to_refuse_bytes_has_a_vector() -> None:
    """The reasons that ``docs/protocol.md`` lists for tensors, packs, messages and frames."""
    shown = {vector["reason"] for vector in read("rejected")}
    shown |= {step["reason"] for vector in read("frames") for step in vector["steps"]}
    shown |= {"reassembly_timeout"}  # a frame vector says it with ``expired``
    from tests.protocol.test_document import reasons

    assert reasons() <= shown
