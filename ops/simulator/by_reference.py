"""Messages that cross the simulated network as they are: neither encoded, nor cut, nor checked.

Sizes stay what they are on a wire: a message is as many packets of as many bytes. The last of them
carries the message itself, the others nothing. That is the same as long as of a message all frames
arrive or none, so it is for fleets without faults.
"""

from __future__ import annotations

from broker.envelopes import Envelope, channel, message_size
from broker.frames import frame_sizes
from broker.link import Framing
from broker.messages import LOSSY
from broker.topics import Address
from ops.simulator.link import Parcel


class ReferenceFraming(Framing):
    """A :class:`Framing` that makes parcels of messages."""

    def wrap(self, envelope: Envelope) -> tuple[str, int, list[Parcel]]:
        """Topic, QoS and parcels of a message; see :meth:`Framing.close`."""
        address, message = envelope.address, envelope.message
        self._next_id += 1
        *sizes, last = frame_sizes(message_size(message), self._next_id, self._chunk)
        parcels = [*map(Parcel, sizes), Parcel(last, message)]
        return self._topics.format(address), 0 if channel(address) in LOSSY else 1, parcels

    def unwrap(self, address: Address, parcel: Parcel) -> Envelope | None:
        """The message that this parcel completes; see :meth:`Framing.open`."""
        self._observer.received(address, len(parcel))
        return None if parcel.message is None else Envelope(address, parcel.message)
