"""Every kind of message, once with all its fields and once with as few as it may have."""

from __future__ import annotations

from typing import Any

import numpy as np

from broker.envelopes import Envelope, channel, down, encode_message, to_all, to_claim, to_cut, up
from broker.identity_messages import Certificate, Enrol, Renew
from broker.messages import (
    LOSSY,
    Assignment,
    Buckets,
    Command,
    Coordinator,
    Hello,
    KeptClassifier,
    Manifest,
    Measurement,
    Network,
    Noise,
    Parameters,
    Program,
    Request,
    Status,
    Telemetry,
)
from broker.serving_messages import CutPolicy, Features, Inference, Prediction, Serving
from broker.topics import Address, Topics
from broker.training_messages import (
    Activations,
    DeviceParameters,
    FeatureGradients,
    Gradients,
    LastFeatures,
    Receipt,
    Report,
    Round,
)
from broker.update_messages import Fetch, Piece, Software, Update
from tensors.codecs import parse_codec
from tensors.parameters import pack_parameters

RUN = "20260102-030405-ab12"
STAMP: dict[str, Any] = {"run": RUN, "round": 3, "attempt": 1}
FEATURES = np.maximum(np.arange(-4, 12, dtype=np.float32), 0).reshape(2, 2, 2, 2) / 4
PACK = pack_parameters(
    {
        "blocks.0.conv.weight": np.arange(4, dtype=np.float32).reshape(2, 2),
        "blocks.0.norm.num_batches_tracked": np.array(9, np.int64),
    }
)
MEASUREMENT = Measurement(
    batch_size=32,
    step_ms=[12.5, 30.0, 31.25],
    exit_ms=[1.5, 2, 0.0],
    memory_mb=[10.0, 20.5, 44.0],
    available_mb=900.25,
    cores=4,
    uplink_bytes_per_s=1.25e6,
)
UPDATE: dict[str, Any] = {
    "rollout": "r-7",
    "version": "1.1.0",
    "sha256": "0123456789abcdef" * 4,
    "size": 70_000_000,
    "prove_s": 600.0,
}
BUNDLE_URL = "https://files.example/bundle.tar"
CSR = bytes.fromhex("3082010a")
CERTIFICATES: dict[str, Any] = {
    "certificate": b"-----BEGIN CERTIFICATE-----\n",
    "return_certificate": b"-----BEGIN CERTIFICATE-----\n",
    "ca": b"-----BEGIN CERTIFICATE-----\n",
    "now": 1767323045.5,
}
"""Not whole: what is in them is not looked into at this level."""
INFERENCE = Inference(
    version=5,
    threshold=0.7,
    images=100,
    exits=60,
    offloads=40,
    answered=30,
    refused=4,
    timeouts=6,
    correct=83,
    exit_correct=71,
    bytes_up=123_456,
    bytes_down=2_400,
    exit_ms=3.5,
    offload_ms=41.75,
)


def messages() -> list[dict[str, Any]]:
    """messages.json."""
    topics = Topics("fleet-1")
    return [
        {
            "name": f"{'/'.join(channel(envelope.address))}, {what}",
            "topic": topics.format(envelope.address),
            "qos": 0 if channel(envelope.address) in LOSSY else 1,
            "retain": envelope.address.retained,
            "encoded": b"".join(encode_message(envelope.message)).hex(),
            "fields": plain(envelope.message.model_dump(exclude_none=True)),
        }
        for what, envelope in [*_up(), *_down(), *_claims(), *_to_many()]
    ]


def plain(value: Any) -> Any:
    """What JSON can say of a message's fields: bytes become ``{"hex": …}``."""
    match value:
        case bytes() | bytearray() | memoryview():
            return {"hex": value.hex()}
        case dict():
            return {key: plain(inner) for key, inner in value.items()}
        case list() | tuple():
            return [plain(inner) for inner in value]
    return value


def _up() -> list[tuple[str, Envelope]]:
    tensor = parse_codec("int4").encode(FEATURES)
    hello: dict[str, Any] = {
        "boot": "9f8e7d6c5b4a3921",
        "software": "firmware 1.0",
        "samples": 6000,
        "dataset": "fashion-mnist",
        "classes": 10,
        "image": (1, 28, 28),
    }
    report: dict[str, Any] = {
        "produced": 70_000,
        "applied": 65_535,
        "discarded": {"not_finite": 1, "late": 4_400},
        "expired": 64,
        "late_gradients": 128,
        "activation_bytes": 5_000_000,
        "activation_values": 10_000_000_000,
        "activation_levels": 11.5,
        "timeouts": 256,
        "exit_loss": 0.625,
        "exit_accuracy": 0.8,
    }
    telemetry: dict[str, Any] = {
        "uptime_s": 3600.5,
        "cut": 3,
        "device_class": "raspberry-pi-4",
        "radio": "wifi",
        "counters": {
            "predictions": {"exit": 70_000, "fallback": 12},
            "answering_cpu_seconds": {"": 81.25},
        },
        "gauges": {"exit_threshold": {"": 0.75}},
        "histograms": {
            "prediction_seconds": {"exit": Buckets(counts=[0] * 3 + [300] + [0] * 11, total=1.5)}
        },
    }
    return [
        (what, up("cam-1", message))
        for what, message in [
            ("least", Hello(**hello)),
            (
                "all fields",
                Hello(**hello, test_samples=1000, cut=3, measurement=MEASUREMENT, frozen=True),
            ),
            ("online", Status(state="online", connection="9f8e7d6c5b4a3921", phase="training")),
            ("last will", Status(state="offline", connection="9f8e7d6c5b4a3921")),
            ("a batch without labels", Activations(**STAMP, batch=0, version=5, tensor=tensor)),
            (
                "a batch of two",
                Activations(**STAMP, batch=300, version=5, labels=[7, 2**31], tensor=tensor),
            ),
            ("of last features", FeatureGradients(**STAMP, batch=300, tensor=tensor)),
            ("a pack", DeviceParameters(**STAMP, version=5, produced=300, state=PACK)),
            ("a delta", DeviceParameters(**STAMP, version=5, produced=9, base=5, state=PACK)),
            ("nothing usable", DeviceParameters(**STAMP, version=5, produced=0, state=b"")),
            (
                "two images",
                Features(run=RUN, request=12, version=5, deadline_ms=10_000, tensor=tensor),
            ),
            ("least", Report(**STAMP)),
            ("an attempt", Report(**STAMP, **report)),
            ("inference", Report(**STAMP, inference=INFERENCE)),
            ("least", Telemetry(boot="9f8e7d6c5b4a3921", number=0, uptime_s=0.0)),
            ("counts", Telemetry(boot="9f8e7d6c5b4a3921", number=60, **telemetry)),
            ("parameters", Request(what="parameters", version=5)),
            ("join", Request(what="join", run=RUN, round=3, attempt=1)),
            ("program", Request(what="program")),
            ("probe", Request(what="probe", padding=bytes(40))),
            ("a request", Renew(nonce="5b4a39219f8e7d6c", csr=CSR)),
            ("a piece", Fetch(sha256="0123456789abcdef" * 4, offset=2**18)),
            ("least", Software(version="1.0.0", state="running")),
            (
                "failed",
                Software(version="1.0.0", state="failed", rollout="r-7", detail="it did not start"),
            ),
        ]
    ]


def _down() -> list[tuple[str, Envelope]]:
    assignment: dict[str, Any] = {
        "run": RUN,
        "network": Network(width=16, channels=1, size=28, head="linear"),
        "feedback": "gradient",
        "feedback_weight": 1.0,
        "exit_weight": 0.5,
        "activation_codec": "int4+zstd",
        "parameter_codec": "fp32",
        "batch_size": 32,
        "quota": 187,
        "window": 2,
        "credits": 2,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "gradient_timeout_s": 30.0,
        "augment": "crop-flip",
        "seed": -1,
    }
    gradient = parse_codec("int4").encode(FEATURES / 8 - 0.125, keep=FEATURES != 0)
    answer = np.array([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0]], np.float32)
    tensor = parse_codec("fp32").encode(answer)
    features = parse_codec("int4").encode(FEATURES)
    logits = parse_codec("fp16").encode(8 * answer - 2)
    return [
        (what, down("cam-1", message))
        for what, message in [
            ("to be measured", Assignment(**assignment)),
            (
                "with GroupNorm",
                Assignment(**assignment | {"network": Network(norm="group")}, cut=3),
            ),
            ("with a cut", Assignment(**assignment, cut=3)),
            (
                "with a budget",
                Assignment(**assignment, cut=3, bytes_per_sample=250.5, follow_link=True),
            ),
            (
                "with noise",
                Assignment(**assignment, cut=3, noise=Noise(clip_norm=30.0, noise_std=1.5)),
            ),
            (
                "with the classifier",
                Assignment(
                    **assignment, cut=3, classifier=KeptClassifier(gradient_codec="int6+zstd")
                ),
            ),
            (
                "with exits that are taught",
                Assignment(
                    **assignment,
                    cut=3,
                    distill_weight=0.5,
                    distill_temperature=3.0,
                    label_skew="calibrated",
                ),
            ),
            ("of a batch", LastFeatures(**STAMP, batch=300, tensor=features)),
            (
                "masked",
                Gradients(**STAMP, batch=300, loss=1.5, correct=1, tensor=gradient),
            ),
            ("without a loss", Gradients(**STAMP, batch=302, tensor=gradient)),
            (
                "with the network's answers",
                Gradients(**STAMP, batch=301, loss=1.5, correct=1, logits=logits, tensor=gradient),
            ),
            (
                "news",
                Receipt(
                    **STAMP,
                    applied=[(0, 0), (4, 299)],
                    discarded={"late": [(300, 301)], "bad_labels": [(3, 3)]},
                    credits=2,
                    next_batch=302,
                ),
            ),
            ("join, nothing yet", Receipt(**STAMP, credits=2, quota=187, complete=True)),
            (
                "join, another leg",
                Receipt(**STAMP, credits=2, next_batch=187, quota=374, complete=True),
            ),
            (
                "not a participant",
                Receipt(**STAMP, credits=0, complete=True, participant=False),
            ),
            (
                "final",
                Receipt(**STAMP, applied=[(0, 186)], credits=2, complete=True, final=True),
            ),
            ("answered", Prediction(request=12, version=5, tensor=tensor)),
            (
                "answered, with its times",
                Prediction(request=14, version=5, tensor=tensor, queue_ms=1.5, forward_ms=12.25),
            ),
            ("answered with last features", Prediction(request=15, version=5, tensor=features)),
            ("refused", Prediction(request=13, version=6, refused="version")),
            ("a pack", Parameters(run=RUN, version=5, cut=3, state=PACK)),
            ("a delta", Parameters(run=RUN, version=5, cut=3, base=4, state=PACK)),
            (
                "a program",
                Program(
                    run=RUN,
                    cut=3,
                    graph=b"\x08\x0a:\x00",
                    parameters={"blocks.0.conv.weight": [16, 1, 3, 3], "heads.3.0.fc.bias": [10]},
                ),
            ),
            ("no program", Program(run=RUN, cut=3, refused="ONNX cannot be written here")),
            ("stop", Command(command="stop", reason="its images are too small – größer!")),
            ("another log level", Command(command="log_level", level="debug")),
            ("the log level of its settings", Command(command="log_level")),
            (
                "a version to run",
                Command(command="update", update=Update(**UPDATE)),
            ),
            (
                "a version to run, at a place",
                Command(command="update", update=Update(**UPDATE, url=BUNDLE_URL)),
            ),
            ("the version on trial is kept", Command(command="proven")),
            ("a piece", Piece(sha256="0123456789abcdef" * 4, offset=2**18, data=b"\x00\xff")),
            ("renewed", Certificate(nonce="5b4a39219f8e7d6c", device="cam-1", **CERTIFICATES)),
        ]
    ]


def _claims() -> list[tuple[str, Envelope]]:
    asked: dict[str, Any] = {"nonce": "9f8e7d6c5b4a3921", "wanted": "cam-1", "csr": CSR}
    about: dict[str, Any] = {
        "serial": "10000000a1b2c3d4",
        "device_class": "pi4",
        "software": "firmware 1.0",
    }
    answer: dict[str, Any] = {"nonce": "9f8e7d6c5b4a3921", "device": "cam-1"}
    up = [
        Envelope(Address("claim", "enrol", device=claim, direction="up"), message)
        for claim, message in (
            ("claim.a1b2c3d4", Enrol(**asked)),
            ("back.cam-1", Enrol(**asked, **about)),
        )
    ]
    refused = Certificate(**answer, now=1767323045.5, refused="the token has been used up")
    return [
        ("least", up[0]),
        ("all fields", up[1]),
        ("enrolled", to_claim("claim.a1b2c3d4", Certificate(**answer, **CERTIFICATES))),
        ("refused", to_claim("back.cam-1", refused)),
    ]


def _to_many() -> list[tuple[str, Envelope]]:
    training = Round(
        **STAMP, phase="training", version=5, rounds=20, learning_rate=0.05, deadline_s=600.0
    )
    rising = training.model_copy(update={"feedback_weight": 0.15})
    by_time = training.model_copy(update={"train_s": 60.0, "barrier": False})
    gathering = Round(run=RUN, round=0, attempt=0, phase="gathering", version=0, rounds=20)
    serving: dict[str, Any] = {
        "run": RUN,
        "version": 5,
        "exit_rule": "entropy",
        "offload_timeout_s": 10.0,
    }
    policies = {
        "3": CutPolicy(threshold=0.7, agreement=0.9375, accuracy=0.875, offload_rate=0.25),
        "12": CutPolicy(threshold=-1.0),
    }
    manifest: dict[str, Any] = {"run": RUN, "sha256": "0123456789abcdef" * 4, "trained": True}
    return [
        ("training", to_all(training)),
        ("training with a weight of the feedback", to_all(rising)),
        ("training by time, without a barrier", to_all(by_time)),
        ("gathering", to_all(gathering)),
        ("nothing is trained", to_all(Serving(**serving))),
        ("all fields", to_all(Serving(**serving, audit_share=0.05, cuts=policies))),
        ("stop", to_all(Command(command="stop"))),
        ("another log level", to_all(Command(command="log_level", level="warning"))),
        (
            "a version to run",
            to_all(Command(command="update", update=Update(**UPDATE, url=BUNDLE_URL))),
        ),
        ("online", to_all(Coordinator(state="online", boot="0011223344556677"))),
        ("last will", to_all(Coordinator(state="offline", boot="0011223344556677"))),
        ("least", to_cut(3, Manifest(**manifest, version=5, size=1_000_000))),
        ("all fields", to_cut(3, Manifest(**manifest, version=5, base=4, size=2**32))),
        ("a pack", to_cut(3, Parameters(run=RUN, version=5, cut=3, state=PACK))),
        ("a delta", to_cut(3, Parameters(run=RUN, version=5, cut=3, base=4, state=PACK))),
    ]
