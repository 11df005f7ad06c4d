"""The agent's configuration: one frozen object, checked before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from broker.config import BrokerConfig
from broker.errors import ConfigError, TopicError
from broker.fields import Name
from broker.logs import LogFormat, LogLevel
from broker.topics import check_device
from edge_agent.http_server import is_loopback, parse_address
from tensors.privacy import GaussianMechanism, rho_of

AUTO = "auto"


class AgentSettings(BaseModel):
    """Section ``[agent]``; durations in seconds."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    fleet: Name = "fleet"
    """The fleet's name in the topic tree."""
    device: str
    """This device's name; unique in the fleet, and the name the broker knows it by. ``auto``: the
    one of its identity, or before there is one, ``device_prefix`` and its serial number."""
    device_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{0,32}$")] = "device-"
    identity_dir: Path | None = None
    """Where its key and certificates lie, or the join token it gets them with; the broker's
    settings then have neither files nor a password."""
    claims_port: int = Field(default=8884, ge=1, le=65_535)
    """Where, on the broker's host, devices with a token or an ended certificate are let in."""
    updates_dir: Path | None = None
    """Where new versions of its software are installed, for start.sh to start (docs/updates.md);
    without it, and without an identity, it takes none."""
    state_dir: Path = Path("agent-state")
    """Where the device keeps its own learning between restarts."""

    # Its data
    dataset: str = "fashion-mnist-small"
    data_root: Path | None = None
    download: bool = False
    image_size: int | None = Field(default=None, ge=1, le=4096)
    """Pixels to which the pictures of an image folder are brought."""
    partition: str = "iid"
    """How a data set that several devices load is split: iid, dirichlet:ALPHA or lists:FILE."""
    share: int = Field(default=0, ge=0)
    """Which part of the split is this device's."""
    shares: int = Field(default=1, ge=1, le=100_000)
    """Into how many parts the data set is split; 1: all of it is this device's."""
    partition_seed: int = Field(default=0, ge=0)

    # How much of the network it runs
    cut: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = "auto"
    networks: tuple[str, ...] = ()
    """Factories ``package.module:function`` this device may import, beside the built-in ones."""

    # Where it is computed
    engine: Literal["torch", "onnxruntime"] = "torch"
    """onnxruntime: for a device too small for torch; its half of the network is not trained, but
    computed with what other devices of its cut have learnt (docs/method.md)."""
    compute: str = "cpu"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto"
    threads: int | None = Field(default=None, ge=1, le=1024)

    # What leaves it of its images
    clip_norm: float | None = Field(default=None, gt=0)
    """L2 norm to which the features of every image are clipped; needs noise_std."""
    noise_std: float | None = Field(default=None, gt=0)
    """Standard deviation of the noise on every value of them; needs clip_norm. Of these and what
    the coordinator wants, the smaller clip and the larger noise hold (docs/security.md)."""
    privacy_rho: float | None = Field(default=None, gt=0)
    """Budget of an image in zCDP: what would go beyond it is not released."""
    privacy_epsilon: float | None = Field(default=None, gt=0)
    """The same budget as the ε of (ε, δ)-differential privacy at privacy_delta."""
    privacy_delta: float = Field(default=1e-5, gt=0, lt=1)
    privacy_images: int = Field(default=1_000_000, ge=1, le=1_000_000_000)
    """How many images the account has room for, about 50 bytes each; no others are released."""

    # How it answers images
    offload_requests_per_h: float | None = Field(default=None, ge=0)
    """How many messages an hour may ask the coordinator about images; not given: any number."""
    offload_bytes_per_h: float | None = Field(default=None, ge=0)
    """How many bytes an hour they may have."""
    offload_burst_s: float = Field(default=60.0, gt=0)
    """What is not spent is kept for at most so long."""
    latency_s: float | None = Field(default=None, gt=0)
    """How long an answer may take: nothing is offloaded that is not expected back by then."""
    answer_queue: int = Field(default=256, ge=1, le=4096)
    """How many images wait to be answered; beyond it the oldest give way."""
    answer_batch: int = Field(default=32, ge=1, le=4096)
    """How many are computed together."""
    answer_deadline_s: float = Field(default=30.0, gt=0, le=600)
    """How long a request waits for its answer, if it does not say so itself."""

    http: str | None = None
    """HOST:PORT at which programs on this device may ask over HTTP; off without it."""
    http_token_file: Path | None = None
    """A file with the token they must show; needed where other machines reach HOST."""

    heartbeat_s: float = Field(default=30.0, gt=0)
    telemetry_s: float = Field(default=60.0, gt=0, le=300)
    """How often it tells the coordinator what it has counted (docs/metrics.md)."""
    device_class: Name = "generic"
    """What kind of board this is: figures of the fleet are shown by it, and those classes that are
    in ops/energy.toml have an estimate of energy."""
    metrics_port: int | None = Field(default=None, ge=1, le=65_535)
    """Where this device's own counts can be scraped; off without it."""
    metrics_host: str = "127.0.0.1"
    radio: Name = "none"
    """Of those in ops/energy.toml, what its bytes go over."""
    will_delay_s: int = Field(default=45, ge=0, le=86_400)
    """How long the broker waits before it says that the device is gone; longer than a back-off."""
    offline_batches: int = Field(default=64, ge=0, le=100_000)
    """How many batches wait to be sent while the coordinator cannot be reached and, without
    feedback, training goes on; the newest win. 0: it does not go on."""
    offline_expiry_s: float = Field(default=3600.0, gt=0)
    """How long a batch may wait so."""
    exit_when_finished: bool = False
    """End the process after the run instead of waiting for the next one."""

    log_level: LogLevel = "info"
    log_format: LogFormat = "human"

    @property
    def mechanism(self) -> GaussianMechanism | None:
        """What this device itself demands of features that leave it."""
        if self.clip_norm is None or self.noise_std is None:
            return None
        return GaussianMechanism(self.clip_norm, self.noise_std)

    @property
    def privacy_budget(self) -> float | None:
        """The most ρ that an image may be released with."""
        if self.privacy_epsilon is not None:
            return rho_of(self.privacy_epsilon, self.privacy_delta)
        return self.privacy_rho

    @field_validator("device")
    @classmethod
    def _check_device(cls, device: str) -> str:
        try:
            return check_device(device)
        except TopicError as exc:
            raise ValueError(str(exc)) from None

    @field_validator("http")
    @classmethod
    def _check_http(cls, http: str | None) -> str | None:
        if http is not None:
            parse_address(http)
        return http

    @model_validator(mode="after")
    def _check_token(self) -> Self:
        if self.http is None:
            if self.http_token_file is not None:
                raise ValueError("http_token_file needs http = HOST:PORT")
        elif self.http_token_file is None and not is_loopback(parse_address(self.http)[0]):
            raise ValueError(
                f"http = {self.http} can be reached from other machines: give an http_token_file, "
                "or listen on 127.0.0.1"
            )
        return self

    @model_validator(mode="after")
    def _check_updates(self) -> Self:
        if self.updates_dir is not None and self.identity_dir is None:
            raise ValueError("updates_dir needs identity_dir: only a fleet's own updates are taken")
        return self

    @model_validator(mode="after")
    def _check_privacy(self) -> Self:
        if (self.clip_norm is None) is not (self.noise_std is None):
            raise ValueError(
                "clip_norm and noise_std go together: noise hides nothing of known size without a "
                "clip, nor a clip without noise; set both, or neither"
            )
        if self.privacy_rho is not None and self.privacy_epsilon is not None:
            raise ValueError("privacy_rho and privacy_epsilon are one budget: give one of them")
        if self.privacy_budget is None:
            return self
        if self.mechanism is None:
            raise ValueError("a privacy budget needs noise to count: set clip_norm and noise_std")
        if self.mechanism.rho > self.privacy_budget:
            raise ValueError(
                f"one release costs ρ = {self.mechanism.rho:g}, more than the budget, "
                f"ρ = {self.privacy_budget:g}: nothing would leave; raise noise_std or the budget"
            )
        return self

    @model_validator(mode="after")
    def _check_engine(self) -> Self:
        if self.engine == "onnxruntime" and not (
            self.compute == "cpu" and self.precision in ("auto", "fp32")
        ):
            raise ValueError(
                f"compute = {self.compute}, precision = {self.precision}: engine = onnxruntime "
                "computes in fp32 on the CPU; leave both out, or use engine = torch"
            )
        return self

    @model_validator(mode="after")
    def _check_share(self) -> Self:
        if self.share >= self.shares:
            raise ValueError(f"share {self.share} of {self.shares}: the first is 0")
        return self


def check_broker_of_identity(broker: BrokerConfig) -> None:
    """Raise ConfigError if ``broker`` says what an identity takes the place of, or has no TLS."""
    own = (broker.ca_file, broker.cert_file, broker.key_file, broker.username, broker.password)
    if not broker.tls or any(value is not None for value in own):
        raise ConfigError(
            "agent.identity_dir needs broker.url = mqtts://HOST[:PORT], and none of ca_file, "
            "cert_file, key_file, username and password: the identity takes their place"
        )
