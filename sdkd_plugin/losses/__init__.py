"""What is compared between teacher and student, and how much each part counts."""

from sdkd_plugin.losses.frequency import (
    FrequencyAlignedLoss,
    FrequencyTerms,
    band_errors,
    frequency_aligned_loss,
)
from sdkd_plugin.losses.projector import ChannelProjector
from sdkd_plugin.losses.weighting import (
    AbstractWeighting,
    BandEvidence,
    FixedWeighting,
    RelativeWeighting,
)

__all__ = [
    "AbstractWeighting",
    "BandEvidence",
    "ChannelProjector",
    "FixedWeighting",
    "FrequencyAlignedLoss",
    "FrequencyTerms",
    "RelativeWeighting",
    "band_errors",
    "frequency_aligned_loss",
]
