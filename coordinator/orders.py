"""What the coordinator tells devices to do, as pure functions of the settings."""

from __future__ import annotations

import math

from broker.envelopes import Envelope, down, to_all
from broker.fields import RunPhase
from broker.messages import Assignment, KeptClassifier, Noise
from broker.serving_messages import Serving
from broker.training_messages import Round
from coordinator.registry import Device
from coordinator.rounds import (
    MAX_QUOTA,
    feedback_share,
    learning_rate,
    quota_of,
    server_share,
)
from coordinator.settings import CoordinatorSettings
from coordinator.versions import Version


def quota(settings: CoordinatorSettings, device: Device) -> int:
    """Batches of this device in a round: its share of :func:`full_quota`, at least one."""
    return max(1, math.ceil(device.load.share * full_quota(settings, device)))


def full_quota(settings: CoordinatorSettings, device: Device) -> int:
    """Batches of this device in a round if it can do it all; by time, more than it ever can."""
    if settings.round_seconds is not None and settings.batches_per_round is None:
        return MAX_QUOTA
    samples = device.hello.samples if device.hello else 0
    return quota_of(samples, settings.batch_size, settings.batches_per_round)


def assignment(settings: CoordinatorSettings, run: str, device: Device, grant: int) -> Envelope:
    """What a device has to do in this run; ``grant`` are its credits.

    Nothing comes back to a frozen one, for it learns nothing.
    """
    return down(
        device.name,
        Assignment(
            run=run,
            network=settings.network,
            cut=device.cut,
            feedback="none" if device.frozen else settings.feedback,
            feedback_weight=settings.feedback_weight,
            exit_weight=settings.exit_weight,
            distill_weight=settings.distill_weight,
            distill_temperature=settings.distill_temperature,
            label_skew=settings.label_skew,
            activation_codec=settings.codec,
            bytes_per_sample=settings.bytes_per_sample,
            follow_link=settings.follow_link,
            noise=_noise(settings),
            classifier=_classifier(settings),
            parameter_codec=settings.parameter_codec,
            batch_size=settings.batch_size,
            quota=full_quota(settings, device),
            window=settings.window,
            credits=grant,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            gradient_timeout_s=settings.gradient_timeout_s,
            augment=settings.augment,
            seed=settings.seed,
        ),
    )


def _noise(settings: CoordinatorSettings) -> Noise | None:
    if settings.clip_norm is None or settings.noise_std is None:
        return None
    return Noise(clip_norm=settings.clip_norm, noise_std=settings.noise_std)


def _classifier(settings: CoordinatorSettings) -> KeptClassifier | None:
    if settings.labels == "server":
        return None
    return KeptClassifier(gradient_codec=settings.codec_of_gradients.name)


def announcement(
    settings: CoordinatorSettings,
    stamp: tuple[str, int, int],
    phase: RunPhase,
    version: int,
    deadline_s: float,
) -> Envelope:
    """What the fleet is doing now."""
    run, number, attempt = stamp
    return to_all(
        Round(
            run=run,
            round=number,
            attempt=attempt,
            phase=phase,
            version=version,
            rounds=settings.rounds,
            learning_rate=rate(settings, max(1, number)),
            feedback_weight=feedback_weight(settings, max(1, number)),
            deadline_s=deadline_s,
            train_s=settings.round_seconds or 0.0,
            barrier=settings.aggregation == "rounds",
        )
    )


def serving(settings: CoordinatorSettings, run: str, version: Version) -> Envelope:
    """Which version answers images, and how."""
    return to_all(
        Serving(
            run=run,
            version=version.number,
            exit_rule=settings.exit_rule,
            offload_timeout_s=settings.offload_timeout_s,
            audit_share=settings.audit_share,
            cuts={str(cut): policy for cut, policy in sorted(version.policies.items())},
        )
    )


def rate(settings: CoordinatorSettings, number: int) -> float:
    """The learning rate of a round."""
    return learning_rate(settings.learning_rate, number, settings.rounds, settings.schedule)


def feedback_weight(settings: CoordinatorSettings, number: int) -> float | None:
    """The weight of the feedback in a round, where it is not always that of the assignment."""
    if settings.feedback_schedule == "constant":
        return None
    share = feedback_share(settings.feedback_schedule, number, settings.rounds)
    return settings.feedback_weight * share


def server_rate(settings: CoordinatorSettings, number: int, participants: int) -> float:
    """The learning rate of the server's side in a round with so many participants."""
    return rate(settings, number) * server_share(settings.server_rate, participants)
