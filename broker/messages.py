"""What is said on each topic: one frozen, strictly validated model per kind of message.

On the wire a message is a MessagePack map of its fields, carried in frames (``broker.frames``).
Unknown fields are ignored, so that a newer peer may add some; everything else is checked here,
once, at the border.
A tensor is opaque at this level: the bytes of ``tensors.format``.

Here are the messages about a device and what it holds, and which message each topic carries;
``training_messages``, ``serving_messages``, ``identity_messages`` and ``update_messages`` have the
others.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import FailFast, Field, StringConstraints

from broker.fields import (
    BY_LABEL,
    BY_METRIC,
    BY_PARAMETER,
    MAX_BATCH,
    MAX_BLOCKS,
    MAX_PROGRAM_BYTES,
    Amount,
    Blob,
    Count,
    Duration,
    Message,
    Name,
    Real,
    Text,
    blob,
)
from broker.identity_messages import Certificate, Enrol, Renew
from broker.logs import LogLevel
from broker.maps import Buffer
from broker.serving_messages import Features, Prediction, Serving
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

PROTOCOL = 1


class Measurement(Message):
    """What a device measured of itself, to be assigned a cut layer by.

    ``step_ms``: milliseconds of forward and backward of one batch of ``batch_size`` images, per
    block from the first on; ``exit_ms`` the same for the exit head at each cut.
    """

    batch_size: Annotated[int, Field(ge=1, le=MAX_BATCH)]
    step_ms: Annotated[list[Amount], FailFast(), Field(max_length=MAX_BLOCKS)]
    exit_ms: Annotated[list[Amount], FailFast(), Field(max_length=MAX_BLOCKS)]
    memory_mb: Annotated[list[Amount], FailFast(), Field(max_length=MAX_BLOCKS)]
    available_mb: Amount
    cores: Annotated[int, Field(ge=1, le=4096)]
    uplink_bytes_per_s: Amount


# -- up: from a device ----------------------------------------------------------------------------


class Hello(Message):
    """A device joins: what it is and what it can do. Answered with an assignment."""

    boot: Name
    protocol: int = PROTOCOL
    software: Text
    samples: Count
    test_samples: Count = 0
    dataset: Text
    classes: Annotated[int, Field(ge=1, le=100_000)]
    image: Annotated[tuple[Count, Count, Count], Field(strict=False)]
    """Channels, height and width of one image."""
    cut: Annotated[int, Field(ge=1, le=MAX_BLOCKS)] | None = None
    measurement: Measurement | None = None
    frozen: bool = False
    """It computes its half of the network as a program that it is given, and never trains it."""


class Status(Message):
    """Retained state of a device, its heartbeat and its last will."""

    state: Literal["online", "offline"]
    connection: Name
    phase: Text = ""


class Buckets(Message):
    """Values counted per bucket, the last one unbounded, and their sum."""

    counts: Annotated[list[Count], FailFast(), Field(min_length=1, max_length=65)]
    total: Amount


class Telemetry(Message):
    """What a device has counted since its ``boot``, and how it is now; see ``broker.telemetry``.

    Metric → label value → number; what is not named is 0, or not known for a gauge. ``number``
    rises from report to report of a boot. ``cut`` is the one in use, 0 before there is one.
    """

    boot: Name
    number: Count
    uptime_s: Amount
    cut: Annotated[int, Field(ge=0, le=MAX_BLOCKS)] = 0
    device_class: Name = "generic"
    radio: Name = "none"
    counters: Annotated[dict[Text, Annotated[dict[Text, Amount], BY_LABEL]], BY_METRIC] = Field(
        default_factory=dict
    )
    gauges: Annotated[dict[Text, Annotated[dict[Text, Real], BY_LABEL]], BY_METRIC] = Field(
        default_factory=dict
    )
    histograms: Annotated[dict[Text, Annotated[dict[Text, Buckets], BY_LABEL]], BY_METRIC] = Field(
        default_factory=dict
    )


class Request(Message):
    """A device asks for parameters, its place in the round, its program, or probes the link."""

    what: Literal["parameters", "join", "program", "probe"]
    version: Count = 0
    run: Name | None = None
    round: Count = 0
    attempt: Count = 0
    padding: Annotated[Buffer, blob(1 << 20)] = b""


# -- down: to a device ----------------------------------------------------------------------------


class Network(Message):
    """The network to build; the fields of ``tensors.NetworkSpec``."""

    name: Text = "resnet18"
    width: Annotated[int, Field(ge=1, le=4096)] = 64
    channels: Annotated[int, Field(ge=1, le=4096)] = 3
    size: Annotated[int, Field(ge=1, le=4096)] = 32
    classes: Annotated[int, Field(ge=2, le=100_000)] = 10
    head: Literal["linear", "conv"] = "conv"
    norm: Literal["batch", "group"] = "batch"


class Noise(Message):
    """Every image's features are clipped to the L2 norm ``clip_norm``, then noise is added.

    It is Gaussian, of standard deviation ``noise_std`` on each value.
    """

    clip_norm: Duration
    noise_std: Duration


class KeptClassifier(Message):
    """The device keeps the network's last block, and the labels.

    The gradients that it sends are encoded with ``gradient_codec``.
    """

    gradient_codec: Text


class Assignment(Message):
    """Retained: what a device has to do in this run. Without a cut: measure and say hello again."""

    run: Name
    network: Network
    cut: Annotated[int, Field(ge=1, le=MAX_BLOCKS)] | None = None
    feedback: Literal["gradient", "none"]
    feedback_weight: Amount
    exit_weight: Amount
    distill_weight: Amount = 0.0
    """Of the distance between the exit's answers and the whole network's, sent with a gradient."""
    distill_temperature: Duration = 1.0
    label_skew: Literal["none", "calibrated"] = "none"
    activation_codec: Text
    bytes_per_sample: Duration | None = None
    """Budget of activations, in bytes for each training image; only fewer levels can keep it."""
    follow_link: bool = False
    """Whether activations are sent with as many levels as the uplink carries in time."""
    noise: Noise | None = None
    """What is done to features before they are encoded; nothing without it."""
    classifier: KeptClassifier | None = None
    """Without it the classifier is the coordinator's."""
    parameter_codec: Text
    batch_size: Annotated[int, Field(ge=1, le=MAX_BATCH)]
    quota: Annotated[int, Field(ge=1)]
    window: Annotated[int, Field(ge=1, le=1024)]
    credits: Annotated[int, Field(ge=1, le=1024)]
    momentum: Amount
    weight_decay: Amount
    gradient_timeout_s: Duration
    augment: Text
    seed: int


class Parameters(Message):
    """The blocks and the exit head a device with this cut needs, as one parameter pack.

    With ``base`` the pack holds what changed since that version (``tensors.deltas``). Who does not
    hold it, or arrives at another state than the manifest's, asks for the whole.
    """

    run: Name
    version: Count
    cut: Annotated[int, Field(ge=1, le=MAX_BLOCKS)]
    base: Count | None = None
    state: Blob


class Program(Message):
    """A device's half with its exit, to be run as it is (``tensors.onnx_half``); or why not.

    ``parameters``: those that ``graph`` is to be run with, by name, and their shapes.
    """

    run: Name
    cut: Annotated[int, Field(ge=1, le=MAX_BLOCKS)]
    graph: Annotated[Buffer, blob(MAX_PROGRAM_BYTES)] | None = None
    parameters: Annotated[dict[Text, Annotated[list[Count], Field(max_length=8)]], BY_PARAMETER] = (
        Field(default_factory=dict)
    )
    refused: Text | None = None


class Command(Message):
    """An order to one device or to all.

    ``log_level``: log with ``level`` from now on; without one with that of the device's settings.
    ``update``: run another version, which ``update`` says. ``proven``: the version on trial is the
    one to keep.
    """

    command: Literal["stop", "log_level", "update", "proven"]
    reason: Text = ""
    level: LogLevel | None = None
    update: Update | None = None


# -- all and cut ----------------------------------------------------------------------------------


class Coordinator(Message):
    """Retained state of the coordinator, and its last will."""

    state: Literal["online", "offline"]
    boot: Name
    protocol: int = PROTOCOL


class Manifest(Message):
    """Retained: which parameters a device with this cut should hold, and their checksum.

    ``sha256`` and ``size`` are those of the pack of all of them, exact and in order of their names,
    however they are sent; ``base`` is the version that what is broadcast to this cut refers to.
    """

    run: Name
    version: Count
    base: Count | None = None
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    size: Count
    trained: bool


KINDS: dict[tuple[str, str], type[Message]] = {
    ("up", "hello"): Hello,
    ("up", "status"): Status,
    ("up", "activations"): Activations,
    ("up", "parameters"): DeviceParameters,
    ("up", "features"): Features,
    ("up", "report"): Report,
    ("up", "request"): Request,
    ("up", "gradients"): FeatureGradients,
    ("up", "telemetry"): Telemetry,
    ("up", "renew"): Renew,
    ("up", "enrol"): Enrol,
    ("up", "fetch"): Fetch,
    ("up", "software"): Software,
    ("down", "assignment"): Assignment,
    ("down", "features"): LastFeatures,
    ("down", "gradients"): Gradients,
    ("down", "receipt"): Receipt,
    ("down", "prediction"): Prediction,
    ("down", "parameters"): Parameters,
    ("down", "program"): Program,
    ("down", "command"): Command,
    ("down", "certificate"): Certificate,
    ("down", "piece"): Piece,
    ("all", "round"): Round,
    ("all", "serving"): Serving,
    ("all", "coordinator"): Coordinator,
    ("all", "command"): Command,
    ("cut", "manifest"): Manifest,
    ("cut", "parameters"): Parameters,
}
"""(direction or scope, kind) → model. Topics of the tree that are not here carry nothing yet."""

LOSSY = {("up", "report"), ("up", "telemetry"), ("up", "features"), ("down", "prediction")}
"""Sent with QoS 0: nothing is trained from them, and of questions the newest matter most."""
