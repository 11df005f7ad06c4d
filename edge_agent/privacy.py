"""What a device lets out of its images: clipped, with noise, booked, and within a budget."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from broker.messages import Assignment, Noise
from edge_agent.errors import StateError
from edge_agent.meters import Meters
from edge_agent.noise import SecureNormal
from edge_agent.privacy_account import FILE, PrivacyAccount
from edge_agent.settings import AgentSettings
from tensors.privacy import GaussianMechanism, Normal

log = logging.getLogger("splitfleet.agent")


class Release:
    """How features leave: without a mechanism as they are, booked as infinitely dear.

    Without an account none do.
    """

    def __init__(
        self, mechanism: GaussianMechanism | None, account: PrivacyAccount | None, normal: Normal
    ) -> None:
        self._mechanism = mechanism
        self._account = account
        self._normal = normal
        self._rho = math.inf if mechanism is None else mechanism.rho

    def admit(self, keys: Sequence[bytes]) -> NDArray[np.bool_]:
        """Book one release of each image; which of them (N,) may be released."""
        if self._account is None:
            return np.zeros(len(keys), bool)
        return self._account.charge(keys, self._rho)

    def of(self, features: Any) -> Any:
        """Features (N, …) of images that were admitted, as they may leave."""
        if self._mechanism is None:
            return features
        return self._mechanism.release(features, self._normal)


class Batches(Protocol):
    """Training batches that can say which images they are made of."""

    def batch(self, position: int) -> tuple[Any, Any]: ...

    def keys(self, position: int) -> Sequence[bytes]: ...


class ReleasedStream:
    """Training batches of the images that may be released; reading one books its release."""

    def __init__(self, stream: Batches, release: Release) -> None:
        self._stream = stream
        self._release = release

    def batch(self, position: int) -> tuple[Any, Any]:
        """Images and labels, N ≤ B of each; none if none may be released."""
        images, labels = self._stream.batch(position)
        allowed = self._release.admit(self._stream.keys(position))
        return (images, labels) if allowed.all() else (images[allowed], labels[allowed])

    def keys(self, position: int) -> Sequence[bytes]:
        """Of all images that the batch has by itself."""
        return self._stream.keys(position)


class Privacy:
    """A device's rules for what leaves it, and the account of what did.

    ``own`` is what the device itself demands; an assignment can demand more, never less. ``budget``
    is the most ρ that an image is released with. The account lies in ``folder``, or in memory, and
    is begun when noise is first added. Raises :class:`StateError` for an account that is unusable.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        own: GaussianMechanism | None = None,
        budget: float | None = None,
        most_images: int = 1_000_000,
        normal: Normal | None = None,
    ) -> None:
        self._folder = folder
        self._own = own
        self._budget = budget
        self._most_images = most_images
        self._normal = normal or SecureNormal()
        self._account: PrivacyAccount | None = None
        self._rho = 0.0
        if own is not None or (folder is not None and (folder / FILE).exists()):
            self._open()

    @classmethod
    def by(cls, settings: AgentSettings, folder: Path | None) -> Privacy:
        """As the settings of an agent have it."""
        return cls(
            folder,
            own=settings.mechanism,
            budget=settings.privacy_budget,
            most_images=settings.privacy_images,
        )

    def applied_to(self, assignment: Assignment) -> Assignment:
        """The assignment with the stricter of its own demands and the device's."""
        mechanism = self._mechanism(assignment)
        if mechanism is None:
            return assignment
        noise = Noise(clip_norm=mechanism.clip, noise_std=mechanism.std)
        return assignment.model_copy(update={"noise": noise})

    def release(self, assignment: Assignment) -> Release | None:
        """How features leave under an assignment; None if they are neither changed nor booked.

        Where the account cannot be begun none do.
        """
        mechanism = self._mechanism(assignment)
        self._rho = 0.0 if mechanism is None else mechanism.rho
        if mechanism is None and self._account is None:
            return None
        try:
            account = self._open()
        except StateError as exc:
            log.warning("no features leave this device: %s", exc)
            account = None
        return Release(mechanism, account, self._normal)

    def meter(self, meters: Meters) -> None:
        """Enter how the account stands."""
        if self._account is None:
            return
        found = self._account.summary(self._rho)
        if math.isfinite(found.rho_max):
            meters.gauge("privacy_rho", found.rho_max)
        open_ones = found.images - found.exhausted - found.without_noise
        meters.gauge("privacy_images", open_ones, "within_budget")
        meters.gauge("privacy_images", found.exhausted, "exhausted")
        meters.gauge("privacy_images", found.without_noise, "without_noise")

    def _mechanism(self, assignment: Assignment) -> GaussianMechanism | None:
        if assignment.noise is None:
            return self._own
        wanted = GaussianMechanism(assignment.noise.clip_norm, assignment.noise.noise_std)
        return wanted if self._own is None else wanted.stricter(self._own)

    def _open(self) -> PrivacyAccount:
        if self._account is None:
            self._account = PrivacyAccount(
                self._folder, budget=self._budget, most_images=self._most_images
            )
        return self._account
