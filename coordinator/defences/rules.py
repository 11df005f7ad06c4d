"""What of the defences a round goes by; they remember from round to round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from coordinator.defences.robust import RobustRule, robust_rule
from coordinator.defences.settings import DefenceSettings
from coordinator.defences.uploads import UploadLimits


@dataclass(frozen=True, slots=True)
class Defences:
    """``uploads`` clips what devices bring; ``robust``, if given, merges in the mean's place.

    ``refused`` is told of each batch or upload of a device that is refused, and why.
    """

    uploads: UploadLimits = field(default_factory=UploadLimits)
    robust: RobustRule | None = None
    refused: Callable[[str, str], None] = lambda _device, _reason: None


def defences(
    settings: DefenceSettings,
    *,
    state_dir: Path,
    devices: int,
    refused: Callable[[str, str], None],
) -> Defences:
    """Those of the settings, for at most so many devices; contributions wait in ``state_dir``."""
    return Defences(
        UploadLimits(settings.upload_clip, settings.upload_norm, devices),
        robust_rule(
            settings.aggregation_rule,
            settings.trim_share,
            state_dir,
            settings.contributions_bytes,
        ),
        refused,
    )
