"""What of the defences a round goes by; they remember from round to round."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from coordinator.defences.robust import RobustRule, robust_rule
from coordinator.defences.settings import DefenceSettings
from coordinator.defences.uploads import UploadLimits


@dataclass(frozen=True, slots=True)
class Defences:
    """``uploads`` clips what devices bring; ``robust``, if given, merges in the mean's place."""

    uploads: UploadLimits = field(default_factory=UploadLimits)
    robust: RobustRule | None = None


def defences(settings: DefenceSettings, *, state_dir: Path, devices: int) -> Defences:
    """Those of the settings, for at most so many devices; contributions wait in ``state_dir``."""
    return Defences(
        UploadLimits(settings.upload_clip, settings.upload_norm, devices),
        robust_rule(
            settings.aggregation_rule,
            settings.trim_share,
            state_dir,
            settings.contributions_bytes,
        ),
    )
