from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.envelopes import Envelope
from broker.fields import Message
from broker.messages import Coordinator, Request, Status
from broker.serving_messages import Features
from broker.training_messages import Report
from tensors.codecs import encode_exact
from tests.fake_coordinator import Harness, inference_report
from tests.fake_device import make_measurement
from tests.server_side import (
    FP32,
    SHAPES,
    features_at,
    make_activations,
    make_upload,
    poisoned_features,
)
from tests.tiny import CLASSES, make_hello

STAMPS = st.tuples(
    st.sampled_from(["current", "current", "other"]), st.integers(0, 2), st.integers(0, 1)
)
TENSORS = st.sampled_from(
    [
        b"",
        b"rubbish",
        FP32.encode(features_at(2)),
        FP32.encode(features_at(5)),
        encode_exact(np.ones((8, *SHAPES[1]), np.float64)),
        encode_exact(np.ones(3, np.int64)),
        poisoned_features(),
    ]
)


def resolve(server: Harness, run: str) -> str:
    return server.round.run if run == "current" else "other"


@settings(max_examples=40)
@given(data=st.data(), steps=st.integers(0, 25))
def test_whatever_devices_say_in_whatever_order_nothing_breaks(
    data: st.DataObject, steps: int
) -> None:
    server = Harness(rounds=2, inference=True, min_devices=2, batches_per_round=2)
    if data.draw(st.booleans()):
        server.join("a", 2)
        server.join("b", 5)
    for _ in range(steps):
        if server.core.finished:
            break
        device = data.draw(st.sampled_from("abc"))
        what = data.draw(st.sampled_from(["good", "message", "message", "wait"]))
        if what == "wait":
            server.wait(data.draw(st.sampled_from([0.1, 1.0, 60.0, 200.0])))
        elif what == "good" and device in server.cuts:
            batch = data.draw(st.integers(0, 2))
            if batch < 2:
                server.send(device, batch)
            else:
                server.upload(device)
        else:
            server.hear(device, data.draw(messages(server)))
    for record in server.checkpoint().history:
        for entry in record["devices"].values():
            account = entry["account"]
            assert account["produced"] == (
                account["applied"] + sum(account["discarded"].values()) + account["expired"]
            )
            assert entry["samples"] == 8 * account["applied"]
    state = server.checkpoint().model.state
    assert all(np.isfinite(values).all() for values in state.values())


def messages(server: Harness) -> st.SearchStrategy[Message]:
    numbers = st.integers(0, 3)
    return st.one_of(
        st.builds(
            make_hello,
            cut=st.sampled_from([None, 1, 2, 5, 9, 10]),
            samples=st.sampled_from([0, 64]),
            classes=st.integers(CLASSES, CLASSES + 1),
            test_samples=numbers,
            measurement=st.sampled_from([None, make_measurement(), make_measurement(exit_ms=[])]),
        ),
        st.builds(
            Status,
            state=st.sampled_from(["online", "online", "offline"]),
            connection=st.sampled_from(["c1", "c2"]),
        ),
        STAMPS.flatmap(
            lambda stamp: st.builds(
                make_activations,
                st.just((resolve(server, stamp[0]), *stamp[1:])),
                numbers,
                cut=st.just(2),
                version=numbers,
                tensor=TENSORS,
                labels=st.lists(st.integers(0, CLASSES), min_size=1, max_size=9),
            )
        ),
        STAMPS.flatmap(
            lambda stamp: st.builds(
                make_upload,
                st.just((resolve(server, stamp[0]), *stamp[1:])),
                cut=st.sampled_from([2, 5]),
                version=numbers,
                produced=numbers,
            )
        ),
        st.builds(
            Features,
            run=st.sampled_from([server.round.run, "other"]),
            request=numbers,
            version=numbers,
            deadline_ms=st.just(1),
            tensor=TENSORS,
        ),
        st.builds(
            Request,
            what=st.sampled_from(["parameters", "join", "probe"]),
            run=st.sampled_from([None, server.round.run, "other"]),
            round=numbers,
            attempt=numbers,
        ),
        st.builds(inference_report, st.just(server), version=numbers),
        st.builds(Report, run=st.just(server.round.run), round=numbers, attempt=numbers),
    )


def test_a_message_a_device_has_no_business_to_send_is_dropped() -> None:
    server = Harness()
    address = server.join("a", 2)[0].address
    stray = Envelope(address, Coordinator(state="offline", boot="x"))
    assert server.core.receive(stray) == []
    assert server.observer.dropped == {"unexpected_topic": 1}


def test_the_folder_holds_the_run(tmp_path: Path) -> None:
    server = Harness(tmp_path)
    assert (tmp_path / "current").read_text() == server.round.run
