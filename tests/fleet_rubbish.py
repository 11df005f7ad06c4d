"""What somebody publishes who has a device's key and nothing good in mind."""

from __future__ import annotations

import random
import zlib
from typing import Any

import numpy as np

from broker.envelopes import encode_message
from broker.frames import split
from broker.link import DEFAULT_CHUNK_BYTES, single_frame
from broker.maps import pack_map
from broker.messages import PROTOCOL
from broker.topics import UP_KINDS
from tensors.codecs import encode_exact
from tensors.decoding import decode
from tests.fleet_listener import Listener
from tests.fleet_processes import FLEET, QUOTA

EACH = 20


def throw_rubbish(hears: Listener, device: str, rng: random.Random) -> dict[str, int]:
    """Publish it on the topics of ``device``, which is training; metric → what it has to reach.

    The last three batches of the device's quota are taken by batches that must be refused.
    """
    kinds = sorted(UP_KINDS)
    good = hears.last_batch[device]

    def publish(payload: bytes, kind: str = "activations") -> None:
        hears.publish(f"splitfleet/{FLEET}/device/{device}/up/{kind}", payload)

    def send(**changes: Any) -> None:
        message = encode_message(good.model_copy(update=changes))
        for frame in split(message, rng.randrange(2**32), DEFAULT_CHUNK_BYTES):
            publish(frame)

    for _ in range(EACH):
        publish(b"\xc1" + rng.randbytes(rng.randrange(4096)), rng.choice(kinds))
        whole = single_frame(good)
        publish(whole[: rng.randrange(len(whole))], rng.choice(kinds))
        publish(_with_a_bit_flipped(whole, rng))
        publish(_frame(size=2**32 - 1, n=65_536, d=bytes(65_536)))
        publish(_frame(v=99))
        publish(_frame(d=b"\x80", size=1))
        send(run="another")
        send(attempt=7)
        send(batch=QUOTA + rng.randrange(100))

    for _ in range(3):  # begin what is never finished
        publish(_frame(size=2**28, n=4096, d=rng.randbytes(65_536), id=rng.randrange(2**32)))
    features = decode(good.tensor)
    nan = features.copy()
    nan.flat[rng.randrange(nan.size)] = np.nan
    send(batch=QUOTA - 1, tensor=encode_exact(nan))
    send(batch=QUOTA - 2, labels=[10] * len(good.labels))
    send(batch=QUOTA - 3, tensor=encode_exact(features[1:]))
    dropped, discarded = "splitfleet_messages_dropped_total", "splitfleet_batches_discarded_total"
    return {
        f'{dropped}{{reason="malformed"}}': 2 * EACH,
        f'{dropped}{{reason="corrupt"}}': EACH,
        f'{dropped}{{reason="oversized"}}': EACH,
        f'{dropped}{{reason="foreign_version"}}': EACH,
        f'{dropped}{{reason="invalid"}}': EACH,
        f'{discarded}{{reason="foreign_run"}}': EACH,
        f'{discarded}{{reason="stale_attempt"}}': EACH,
        f'{discarded}{{reason="beyond_quota"}}': EACH,
        f'{discarded}{{reason="not_finite"}}': 1,
        f'{discarded}{{reason="bad_labels"}}': 1,
        f'{discarded}{{reason="wrong_shape"}}': 1,
    }


def _with_a_bit_flipped(frame: bytes, rng: random.Random) -> bytes:
    """Within the chunk, which ends a frame and is longer than all the rest."""
    at = rng.randrange(len(frame) // 2, len(frame))
    return frame[:at] + bytes([frame[at] ^ 1 << rng.randrange(8)]) + frame[at + 1 :]


def _frame(**fields: Any) -> bytes:
    """The first frame of a message, by default an empty one."""
    chunk = fields.get("d", b"")
    usual = {"v": PROTOCOL, "id": 0, "i": 0, "n": 1, "size": len(chunk), "crc": zlib.crc32(chunk)}
    return b"".join(pack_map({**usual, "d": chunk, **fields}))
