"""The coordinator's configuration: one frozen object, checked before anything starts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from broker.fields import Name
from broker.logs import LogFormat, LogLevel
from broker.messages import Network
from coordinator.defences.settings import (
    CHANGE_THE_MODEL,
    DefenceSettings,
    NotNegative,
    Positive,
)
from coordinator.exit_policies import parse_exit_policy
from coordinator.server_momentum import MomentumRule
from tensors.codecs import MAX_LEVELS, Codec, parse_codec
from tensors.errors import TensorsError
from tensors.exit_rules import ExitRule
from tensors.privacy import GaussianMechanism


class CoordinatorSettings(DefenceSettings):
    """Section ``[coordinator]``; durations in seconds unless the name says otherwise."""

    fleet: Name = "fleet"
    """The fleet's name in the topic tree; a broker can carry several fleets."""
    state_dir: Path = Path("coordinator-state")
    """Where runs and their checkpoints live."""
    fleet_dir: Path | None = None
    """The folder that ``splitfleet fleet init`` made: devices get their certificates from here."""

    # What is trained
    network: Network = Network()
    strategy: Literal["averaging", "sequential", "cascade"] = "averaging"
    labels: Literal["server", "device"] = "server"
    """Who has the labels. device: each device keeps its own and the network's last block, the
    classifier (strategy averaging or sequential; docs/method.md)."""
    feedback: Literal["gradient", "none"] = "gradient"
    """Whether the gradient at the cut goes back to the device."""
    feedback_weight: NotNegative = 1.0
    feedback_schedule: Literal["constant", "rising", "falling"] = "constant"
    """How the feedback's weight goes over the rounds: rising from feedback_weight / rounds to
    feedback_weight, or falling the other way round; needs feedback = gradient."""
    exit_weight: NotNegative = 1.0
    distill_weight: NotNegative = 0.0
    """Above 0, every gradient brings the whole network's answers, and the exit also learns to give
    those; needs feedback = gradient."""
    distill_temperature: Positive = 3.0
    """By how much both answers are softened before they are compared."""
    label_skew: Literal["none", "calibrated"] = "none"
    """calibrated: losses account for which labels a device has many of, on the device by its own
    images, here by the labels it has sent."""
    device_copies: bool = True
    """Whether devices count as holders of blocks that the server trains too."""
    codec: str = "int4+zstd"
    """Codec of activations."""
    gradient_codec: str | None = None
    """Codec of gradients; without it that of activations with four times the levels."""
    mask_gradients: bool = True
    """Leave out gradients of activations that are zero; right where every block ends in a ReLU."""
    bytes_per_sample: Positive | None = None
    """Budget for each training image, up and down: batches that exceed it get fewer levels.

    The levels of ``codec`` and ``gradient_codec`` are the most that is used.
    """
    follow_link: bool = False
    """Whether devices send fewer levels while sending a batch takes longer than computing it."""
    clip_norm: Positive | None = None
    """L2 norm to which devices clip the features of every image; needs noise_std."""
    noise_std: Positive | None = None
    """Standard deviation of the noise they add to every value before the codec; needs clip_norm and
    network.norm = group. A device may demand more (docs/security.md)."""
    parameter_codec: str = "fp32"
    batch_size: int = Field(default=32, ge=1, le=4096)
    window: int = Field(default=2, ge=1, le=1024)
    """Batches a device may have out while it computes the next."""
    learning_rate: Positive = 0.05
    schedule: Literal["cosine", "constant"] = "cosine"
    server_rate: Literal["same", "sqrt", "linear"] = "same"
    """Learning rate of a server network that a round's N participants share (sequential, cascade):
    the round's, that divided by √N, or by N."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    server_momentum: MomentumRule = "averaged"
    """What becomes of the server's momentum at a round's end. averaged: the mean of the copies', as
    of the weights. reset: none. outer: none either, but one of the versions among themselves."""
    outer_momentum: float = Field(default=0.5, ge=0, lt=1)
    """Its coefficient, with server_momentum = outer."""
    weight_decay: NotNegative = 5e-4
    augment: Literal["none", "crop-flip"] = "none"
    seed: int = Field(default=0, ge=0, lt=2**31)

    # Rounds
    rounds: int = Field(default=5, ge=1, le=1_000_000)
    batches_per_round: int | None = Field(default=None, ge=1, le=65_536)
    """Quota of every device; without it one pass over the device's images."""
    min_devices: int = Field(default=1, ge=1, le=100_000)
    """How many devices must be there before the first round starts."""
    max_devices: int = Field(default=1000, ge=1, le=100_000)
    participation: float = Field(default=1.0, gt=0, le=1)
    """Share of the devices that take part in a round, drawn anew for each."""
    quorum: float = Field(default=0.5, gt=0, le=1)
    """Share of a round's participants that must finish before its deadline."""
    round_deadline_s: Positive = 600.0
    """The longest a round may take."""
    deadline_mads: NotNegative | None = 8.0
    """A round's deadline is what its cuts took before: median + this many median absolute
    deviations, at most round_deadline_s. None: always round_deadline_s."""
    round_seconds: Positive | None = None
    """Rounds by time: devices train for so long, however many batches that are."""
    aggregation: Literal["rounds", "buffered"] = "rounds"
    """rounds: all participants finish, or the deadline comes. buffered: no barrier; a version after
    every buffer_size contributions (strategy averaging)."""
    buffer_size: int = Field(default=8, ge=1, le=100_000)
    max_staleness: int | None = Field(default=None, ge=0, le=1000)
    """How many versions a contribution may be late and still be folded in, as a discounted
    difference; 0: never. None: 2, and without a barrier 16."""
    late_devices: int = Field(default=64, ge=0, le=100_000)
    """For how many devices that missed a round's end their server-side copy is kept."""
    adapt_work: bool = True
    """Whether a device that is always late gets less work, then a shallower cut; where a round is
    a number of batches, with a barrier."""
    return_wait_s: Positive = 15.0
    """After a restart, how long to wait for the devices known before."""
    gradient_timeout_s: Positive = 30.0
    queue_chunks: int = Field(default=1000, ge=1)
    """Messages the broker queues for one client (Mosquitto's max_queued_messages)."""
    step_budget_ms: Positive = 250.0
    """Cut ``auto``: the longest training step, upload included, a device may be given."""
    memory_budget_mb: Positive | None = None
    """Cut ``auto``: memory for training; without it half of what a device has available."""

    # Answering
    inference: bool = True
    """Whether devices answer their share of the test images after the last round."""
    exit_policy: str = "threshold"
    """What the exits' thresholds are chosen for after each round, on held-out images: threshold
    (nothing, it is given), accuracy:0.9 (the fewest offloads with this accuracy of device and
    server together), offload:0.2 (at most this share offloaded)."""
    threshold: float = Field(default=0.7, allow_inf_nan=True)
    """With exit_policy = threshold, and until the first round has closed."""
    exit_rule: ExitRule = "entropy"
    calibration_images: int = Field(default=1000, ge=0, le=10_000_000)
    """Held-out images that thresholds are chosen on and exits are judged by; 0: none."""
    audit_share: float = Field(default=0.02, ge=0, le=1)
    """Of the images that an exit is sure of, how many the server is asked about all the same."""
    offload_timeout_s: Positive = 10.0
    serving_versions: int = Field(default=3, ge=1, le=100)
    """Features computed with one of so many last versions are answered with that version."""
    answer_batch: int = Field(default=64, ge=1, le=65_536)
    """Images answered together at most; a single question always."""
    answer_queue: int = Field(default=1024, ge=1, le=1_000_000)
    """Images that wait for an answer at most."""
    batch_wait_s: float = Field(default=0.001, ge=0, le=1)
    """How long a question that finds the coordinator idle waits for company."""
    inference_deadline_s: Positive = 120.0

    stay: bool = False
    """Go on answering devices after the last round instead of ending."""

    # Where it is computed
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto"
    threads: int | None = Field(default=None, ge=1, le=1024)
    answer_threads: int | None = Field(default=None, ge=1, le=1024)
    """Of those, how many an answer is computed with while others train; without it half."""
    keep_checkpoints: int = Field(default=3, ge=2, le=1000)

    # Held-out images to score checkpoints on
    dataset: str | None = None
    data_root: Path | None = None
    download: bool = False
    metrics_port: int | None = Field(default=None, ge=1, le=65_535)
    """Where ``/metrics``, ``/status`` and ``/healthz`` are served."""
    metrics_host: str = "127.0.0.1"
    metrics_devices: int = Field(default=50, ge=0, le=10_000)
    """How many devices the metrics show one by one; the rest are together."""
    broker_figures: bool = False
    """Whether the metrics have what the broker says of itself ($SYS). Mosquitto does; another one,
    the embedded too, may cut a connection that asks."""
    energy_table: Path | None = None
    """A file in the manner of ops/energy.toml, for the classes and radios of the fleet."""
    stall_s: Positive = 120.0
    """``/healthz`` calls a coordinator dead that has been at one step for longer."""

    log_level: LogLevel = "info"
    log_format: LogFormat = "human"

    @field_validator("network", mode="before")
    @classmethod
    def _check_network(cls, network: object) -> object:
        # On the wire what is unknown is of a later version; in a file it is a slip of the pen.
        if isinstance(network, dict) and (odd := sorted(network.keys() - Network.model_fields)):
            raise ValueError(f"{odd[0]} is not a setting of the network")
        return network

    @field_validator("codec", "gradient_codec", "parameter_codec")
    @classmethod
    def _check_codec(cls, name: str | None) -> str | None:
        try:
            if name is None:
                return None
            return parse_codec(name).name
        except TensorsError as exc:
            raise ValueError(str(exc)) from None

    @field_validator("threshold")
    @classmethod
    def _check_threshold(cls, threshold: float) -> float:
        if math.isnan(threshold):
            raise ValueError("it must be a number; confidence lies between 0 and 1")
        return threshold

    @field_validator("exit_policy")
    @classmethod
    def _check_exit_policy(cls, policy: str) -> str:
        parse_exit_policy(policy)
        return policy

    @model_validator(mode="after")
    def _check_answering(self) -> Self:
        measured = self.dataset is not None and self.calibration_images > 0
        if self.exit_policy != "threshold" and not measured:
            raise ValueError(
                f"exit_policy = {self.exit_policy} needs held-out images to choose thresholds on: "
                "set dataset, and calibration_images above 0"
            )
        if self.answer_queue < self.batch_size:
            raise ValueError(
                f"answer_queue = {self.answer_queue} must be at least batch_size = "
                f"{self.batch_size}, the images of one question"
            )
        return self

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        if self.feedback == "none":
            if self.feedback_schedule != "constant":
                raise ValueError(
                    f"feedback_schedule = {self.feedback_schedule} needs feedback = gradient: "
                    "without feedback there is no weight to change"
                )
            if self.distill_weight:
                raise ValueError(
                    f"distill_weight = {self.distill_weight:g} needs feedback = gradient: what the "
                    "exits would learn from comes with the gradients"
                )
            if not self.exit_weight:
                raise ValueError(
                    "with exit_weight = 0 and no gradient feedback the devices would learn nothing"
                )
        elif not (self.exit_weight or self.feedback_weight or self.distill_weight):
            raise ValueError(
                "with exit_weight, feedback_weight and distill_weight = 0 the devices would learn "
                "nothing"
            )
        return self

    @model_validator(mode="after")
    def _check_labels(self) -> Self:
        if self.labels == "server":
            return self
        if self.strategy == "cascade":
            raise ValueError(
                "labels = device needs strategy = averaging or sequential: a joint step of cascade "
                "would have to wait for the slowest of its devices"
            )
        if self.loss_mads is not None:
            raise ValueError(
                "loss_mads needs labels = server: with labels = device the coordinator knows no "
                "losses; take gradient_clip"
            )
        return self

    @model_validator(mode="after")
    def _check_server_rate(self) -> Self:
        if self.server_rate != "same" and self.strategy == "averaging":
            raise ValueError(
                f"server_rate = {self.server_rate} needs strategy = sequential or cascade: with "
                "averaging every device has a server network of its own"
            )
        return self

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        if self.bytes_per_sample is None and not self.follow_link:
            return self
        for key, name in (("codec", self.codec), ("gradient_codec", self.gradient_codec)):
            if name is not None and parse_codec(name).levels is None:
                budget = "follow_link" if self.bytes_per_sample is None else "bytes_per_sample"
                raise ValueError(
                    f"{budget} needs a codec with levels to choose from: {key} = {name} has none; "
                    "take int2 … int8 or levels3 … levels256"
                )
        return self

    @model_validator(mode="after")
    def _check_noise(self) -> Self:
        if (self.clip_norm is None) is not (self.noise_std is None):
            raise ValueError(
                "clip_norm and noise_std go together: noise hides nothing of known size without a "
                "clip, nor a clip without noise; set both, or neither"
            )
        if self.noise_std is not None and self.network.norm == "batch":
            raise ValueError(
                "noise_std needs network.norm = group: BatchNorm lets every image of a batch into "
                "the features of all others, so noise on one image's features does not hide it"
            )
        return self

    @property
    def mechanism(self) -> GaussianMechanism | None:
        """What devices do to features before they send them, unless they do more."""
        if self.clip_norm is None or self.noise_std is None:
            return None
        return GaussianMechanism(self.clip_norm, self.noise_std)

    @model_validator(mode="after")
    def _check_aggregation(self) -> Self:
        if self.aggregation == "buffered" and self.strategy != "averaging":
            raise ValueError(
                f"aggregation = buffered needs strategy = averaging: with {self.strategy} all "
                "devices train one server network, of which no device's difference can be told"
            )
        if self.round_seconds is not None and self.round_seconds >= self.round_deadline_s:
            raise ValueError(
                f"round_seconds = {self.round_seconds:g} must be below round_deadline_s = "
                f"{self.round_deadline_s:g}: devices also need time to finish"
            )
        return self

    @property
    def codec_of_gradients(self) -> Codec:
        """Gradients have longer tails than activations, so their levels have to be finer."""
        if self.gradient_codec is not None:
            return parse_codec(self.gradient_codec)
        codec = parse_codec(self.codec)
        if codec.levels is None:
            return codec
        return codec.with_levels(min(4 * codec.levels, MAX_LEVELS))

    @property
    def codecs_by_role(self) -> dict[str, str]:
        """Role of messages that carry tensors → the codec; a budget may take fewer levels."""
        return {
            "activation": self.codec,
            "feature": self.codec,
            "gradient": self.codec_of_gradients.name,
            "parameter": self.parameter_codec,
            "prediction": "fp32",
        }

    @property
    def staleness(self) -> int:
        """``max_staleness``, or what stands for it."""
        if self.max_staleness is not None:
            return self.max_staleness
        return 2 if self.aggregation == "rounds" else 16

    def identity(self) -> dict[str, object]:
        """What a resumed run must have in common with its first start."""
        keys = [
            "fleet",
            "network",
            "strategy",
            "labels",
            "feedback",
            "feedback_weight",
            "feedback_schedule",
            "exit_weight",
            "distill_weight",
            "distill_temperature",
            "label_skew",
            "device_copies",
            "codec",
            "gradient_codec",
            "mask_gradients",
            "clip_norm",
            "noise_std",
            "batch_size",
            "server_rate",
            "momentum",
            "server_momentum",
            "outer_momentum",
            "weight_decay",
            "augment",
            "seed",
            "dataset",
        ]
        return self.model_dump(mode="json", include={*keys, *CHANGE_THE_MODEL})
