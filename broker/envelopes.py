"""Envelopes: a message and where it goes, and both as bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from pydantic import ValidationError

from broker.errors import MessageError
from broker.fields import Message
from broker.maps import Buffer, Pieces, pack_map, packed_size, unpack_map
from broker.messages import KINDS
from broker.topics import Address


@dataclass(frozen=True, slots=True)
class Envelope:
    """A message and where it goes to or came from."""

    address: Address
    message: Message


class DeferredEnvelope(Envelope):
    """An envelope whose message takes computing to make.

    It is made once, by whoever asks for it first: usually a thread beside the state machine's.
    """

    __slots__ = ("_lock", "_made")

    _lock: threading.Lock
    _made: Message | Callable[[], Message]

    def __init__(self, address: Address, make: Callable[[], Message]) -> None:
        object.__setattr__(self, "address", address)
        object.__setattr__(self, "_made", make)
        object.__setattr__(self, "_lock", threading.Lock())

    @property
    def message(self) -> Message:
        """The message; blocks while it is being made."""
        with self._lock:
            made = self._made
            if not isinstance(made, Message):
                made = made()
                object.__setattr__(self, "_made", made)  # frees what it was made from
            return made


def channel(address: Address) -> tuple[str, str]:
    """The key of ``KINDS`` for an address."""
    return address.direction or address.scope, address.kind


def up(device: str, message: Message) -> Envelope:
    """An envelope from ``device`` to the coordinator."""
    return Envelope(
        Address("device", _kind("up", type(message)), device=device, direction="up"), message
    )


def down(device: str, message: Message) -> Envelope:
    """An envelope from the coordinator to ``device``."""
    return Envelope(
        Address("device", _kind("down", type(message)), device=device, direction="down"), message
    )


def down_later(device: str, kind: type[Message], make: Callable[[], Message]) -> Envelope:
    """Like :func:`down`, for a message of ``kind`` that is made when it is sent."""
    return DeferredEnvelope(
        Address("device", _kind("down", kind), device=device, direction="down"), make
    )


def to_claim(claim: str, message: Message) -> Envelope:
    """An envelope from the coordinator to who came with ``claim``."""
    kind = _kind("down", type(message))
    return Envelope(Address("claim", kind, device=claim, direction="down"), message)


def to_all(message: Message) -> Envelope:
    """An envelope to every device."""
    return Envelope(Address("all", _kind("all", type(message))), message)


def to_cut(layer: int, message: Message) -> Envelope:
    """An envelope to every device with cut ``layer``."""
    return Envelope(Address("cut", _kind("cut", type(message)), layer=layer), message)


def _kind(where: str, kind: type[Message]) -> str:
    for (place, name), model in KINDS.items():
        if place == where and model is kind:
            return name
    raise AssertionError(f"{kind.__name__} is never sent {where}")


def encode_message(message: Message) -> Pieces:
    """The MessagePack map of a message; its blobs are not copied."""
    return pack_map(message.model_dump(exclude_none=True))


def message_size(message: Message) -> int:
    """Bytes of :func:`encode_message`; a blob that is not made is not made for it."""
    return packed_size(message.model_dump(exclude_none=True))


def decode_message(address: Address, data: Buffer) -> Message:
    """The validated message that arrived at ``address``; its blobs are views of ``data``.

    Raises:
        MessageError: with reason ``malformed`` (not MessagePack, not a map) or ``invalid`` (a field
            missing, of the wrong type or out of bounds).
    """
    model = KINDS[channel(address)]
    fields = unpack_map(data)
    try:
        return model.model_validate(fields)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise MessageError("invalid", f"{model.__name__}.{where}: {first['msg']}") from None
