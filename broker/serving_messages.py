"""What is said about answering images: the features sent up, the answers, how they are served."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from broker.fields import (
    BY_CUT,
    Amount,
    Count,
    Cut,
    Duration,
    ExitRule,
    Message,
    Name,
    Share,
    Tensor,
    Text,
)


class Features(Message):
    """Features of images that the server is asked about; answered with a prediction, if that."""

    run: Name
    request: Count
    version: Count
    deadline_ms: Annotated[int, Field(ge=1, le=600_000)]
    tensor: Tensor


class Prediction(Message):
    """The full network's answer to offloaded features: ``(N, K)`` probabilities, or a refusal.

    Where the device keeps the classifier: the last features ``(N, …)``, for that to answer.
    ``version`` is that of the features. ``queue_ms`` and ``forward_ms``: how long they waited for
    their turn, and how long the network then took for all that it answered together.
    """

    request: Count
    version: Count
    tensor: Tensor | None = None
    refused: Text | None = None
    queue_ms: Amount | None = None
    forward_ms: Amount | None = None


class Inference(Message):
    """What a device measured while it answered its share of the test images."""

    version: Count
    threshold: float
    images: Count
    exits: Count
    offloads: Count
    answered: Count
    refused: Count
    timeouts: Count
    correct: Count
    exit_correct: Count
    bytes_up: Count
    bytes_down: Count
    exit_ms: Amount
    offload_ms: Amount


class CutPolicy(Message):
    """When the exit at a cut answers, and what that came to on held-out images, if there are any.

    ``agreement``: of the images it answers, at least this share gets the whole network's answer
    (the lower end of a 95 % interval, so that few images promise little).
    ``accuracy``: that of device and server together. ``offload_rate``: what is left to the server.
    """

    threshold: Annotated[float, Field(ge=-1, le=1)]
    agreement: Share | None = None
    accuracy: Share | None = None
    offload_rate: Share | None = None


class Serving(Message):
    """Retained: the version of the parameters that images are answered with, and how.

    ``cuts`` has an entry for every cut whose exit has been trained; any other never answers. Of the
    images that an exit is sure of, the server is asked about a share ``audit_share`` all the same.
    """

    run: Name
    version: Count
    exit_rule: ExitRule
    offload_timeout_s: Duration
    audit_share: Share = 0.0
    cuts: Annotated[dict[Cut, CutPolicy], BY_CUT] = Field(default_factory=dict)
