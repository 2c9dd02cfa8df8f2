"""Losses between student, teachers and labels, and the weights of bands and teachers."""

from sdkd_plugin.losses.amplitude import AMSE
from sdkd_plugin.losses.band_weights import (
    AbstractWeighting,
    AdaptiveWeighting,
    BandEvidence,
    ConfidenceWeighting,
    FixedWeighting,
    RelativeWeighting,
    WeightingName,
)
from sdkd_plugin.losses.derivatives import DerivativeMatching
from sdkd_plugin.losses.features import AbstractFeatureLoss
from sdkd_plugin.losses.frequency import FrequencyAlignedLoss, band_errors, frequency_aligned_loss
from sdkd_plugin.losses.latents import LatentPair
from sdkd_plugin.losses.objectives import SpectralLoss, inverse_energy_weights
from sdkd_plugin.losses.task import masked_error
from sdkd_plugin.losses.teacher_weights import (
    AbstractAggregation,
    AEKDAggregation,
    AggregationName,
    CAMKDAggregation,
    MeanAggregation,
    TeacherEvidence,
)

__all__ = [
    "AMSE",
    "AEKDAggregation",
    "AbstractAggregation",
    "AbstractFeatureLoss",
    "AbstractWeighting",
    "AdaptiveWeighting",
    "AggregationName",
    "BandEvidence",
    "CAMKDAggregation",
    "ConfidenceWeighting",
    "DerivativeMatching",
    "FixedWeighting",
    "FrequencyAlignedLoss",
    "LatentPair",
    "MeanAggregation",
    "RelativeWeighting",
    "SpectralLoss",
    "TeacherEvidence",
    "WeightingName",
    "band_errors",
    "frequency_aligned_loss",
    "inverse_energy_weights",
    "masked_error",
]
