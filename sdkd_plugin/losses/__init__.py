"""What is compared between teacher and student, and how much each part counts."""

from sdkd_plugin.losses.aggregation import (
    AbstractAggregation,
    AEKDAggregation,
    AggregationName,
    CAMKDAggregation,
    MeanAggregation,
    TeacherEvidence,
    make_aggregation,
    teacher_gradients,
    weighted_target,
)
from sdkd_plugin.losses.band_errors import band_errors
from sdkd_plugin.losses.features import (
    AbstractFeatureLoss,
    FeatureLossName,
    attention_loss,
    boundary_loss,
    fitnets_loss,
    make_feature_loss,
)
from sdkd_plugin.losses.frequency import (
    FrequencyAlignedLoss,
    FrequencyTerms,
    frequency_aligned_loss,
)
from sdkd_plugin.losses.measured_weighting import AdaptiveWeighting, ConfidenceWeighting
from sdkd_plugin.losses.projector import ChannelProjector
from sdkd_plugin.losses.weighting import (
    AbstractWeighting,
    BandEvidence,
    FixedWeighting,
    RelativeWeighting,
)
from sdkd_plugin.losses.weightings import WeightingName, make_weighting

__all__ = [
    "AEKDAggregation",
    "AbstractAggregation",
    "AbstractFeatureLoss",
    "AbstractWeighting",
    "AdaptiveWeighting",
    "AggregationName",
    "BandEvidence",
    "CAMKDAggregation",
    "ChannelProjector",
    "ConfidenceWeighting",
    "FeatureLossName",
    "FixedWeighting",
    "FrequencyAlignedLoss",
    "FrequencyTerms",
    "MeanAggregation",
    "RelativeWeighting",
    "TeacherEvidence",
    "WeightingName",
    "attention_loss",
    "band_errors",
    "boundary_loss",
    "fitnets_loss",
    "frequency_aligned_loss",
    "make_aggregation",
    "make_feature_loss",
    "make_weighting",
    "teacher_gradients",
    "weighted_target",
]
