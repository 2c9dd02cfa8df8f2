"""Spectral decoupled knowledge distillation: a large forecaster teaches a small one.

The front door. Here are the names that users import; importing it loads no host library. What
works behind neuraloperator and torch-spatiotemporal is in `sdkd_plugin.adapters`.
"""

from sdkd_plugin._version import __version__
from sdkd_plugin.augmentation import GaussianNoise, Mixup
from sdkd_plugin.cache import TeacherCache, precompute
from sdkd_plugin.distiller import SDKDDistiller
from sdkd_plugin.judging import measure_teachers
from sdkd_plugin.loss import DistillationLoss, DistillationTerms
from sdkd_plugin.losses import (
    AMSE,
    AdaptiveWeighting,
    AEKDAggregation,
    CAMKDAggregation,
    ConfidenceWeighting,
    DerivativeMatching,
    FixedWeighting,
    FrequencyAlignedLoss,
    LatentPair,
    MeanAggregation,
    RelativeWeighting,
    SpectralLoss,
    frequency_aligned_loss,
    inverse_energy_weights,
)
from sdkd_plugin.on_policy import OnPolicy
from sdkd_plugin.resolution import AtResolution
from sdkd_plugin.spectral import (
    Bands,
    GraphTransform,
    GridTransform,
    ProductTransform,
    Spectrum,
    SphereTransform,
)
from sdkd_plugin.taps import TapReader
from sdkd_plugin.teachers import TeacherOutput

__all__ = [
    "AMSE",
    "AEKDAggregation",
    "AdaptiveWeighting",
    "AtResolution",
    "Bands",
    "CAMKDAggregation",
    "ConfidenceWeighting",
    "DerivativeMatching",
    "DistillationLoss",
    "DistillationTerms",
    "FixedWeighting",
    "FrequencyAlignedLoss",
    "GaussianNoise",
    "GraphTransform",
    "GridTransform",
    "LatentPair",
    "MeanAggregation",
    "Mixup",
    "OnPolicy",
    "ProductTransform",
    "RelativeWeighting",
    "SDKDDistiller",
    "SpectralLoss",
    "Spectrum",
    "SphereTransform",
    "TapReader",
    "TeacherCache",
    "TeacherOutput",
    "__version__",
    "frequency_aligned_loss",
    "inverse_energy_weights",
    "measure_teachers",
    "precompute",
]
