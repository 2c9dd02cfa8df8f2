"""The adjusted mean squared error: an error of phases does not pay for lost amplitude.

A forecast that is uncertain lowers its MSE by damping; here the amplitude of each band is an error
of its own. Other spectral objectives are in `objectives`.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sdkd_plugin._checks import check_choice, check_within
from sdkd_plugin._explained import explained
from sdkd_plugin.spectral import AbstractTransform, Bands
from sdkd_plugin.spectral.transform import working_dtype

AmplitudeSource = Literal["target", "labels"]


@explained
@dataclass(frozen=True)
class AMSE:
    """How far the errors of the bands are the adjusted mean squared error, AMSE.

    Formula: ``error = MSE + weight * (AMSE - MSE)``; in each band and for each field, P_s and P_t
    being the energies of forecast and target and c their coherence,

        MSE  = P_s + P_t - 2 sqrt(P_s P_t) c
        AMSE = (sqrt P_s - sqrt P_t)^2 + 2 max(P_s, P_t) (1 - c)

    Both are equal where c is 1 or P_s = P_t; else the AMSE is larger. Narrow bands tell the
    amplitudes of the frequencies apart, see `Bands.equal`. It costs two more transforms a step.

    Args:
        weight: from 0, the MSE, to 1.
        amplitude: whose energy P_t is: the ``target``'s, or the ``labels``' where these have more,
            for a teacher whose forecasts are blurred. c stays the coherence with the target, and
            without labels P_t is the target's.

    Raises:
        ValueError: if the weight is not in [0, 1] or the amplitude is unknown.

    Source: Subich et al. 2025, arXiv 2501.19374, eq. 7; energies of labels are our own.
    """

    weight: float = 1.0
    amplitude: AmplitudeSource = "target"

    def __post_init__(self) -> None:
        check_within("weight", self.weight, "[0, 1]")
        check_choice("amplitude", self.amplitude, get_args(AmplitudeSource))

    @property
    def needs_labels(self) -> bool:
        """Whether labels are used beside the target."""
        return self.weight > 0 and self.amplitude == "labels"

    def excess(
        self,
        forecast: Float[Tensor, "batch ..."],
        target: Float[Tensor, "batch ..."],
        transform: AbstractTransform,
        bands: Bands,
        y: Float[Tensor, "batch ..."] | None = None,
        mask: Bool[Tensor, "..."] | None = None,
    ) -> Float[Tensor, "batch n_bands"]:
        """``weight * (AMSE - MSE)`` of each sample in each band, means per element."""
        dtype = torch.promote_types(working_dtype(forecast), target.dtype)
        forecast, target = forecast.to(dtype), target.to(dtype)
        mine, theirs, difference = (
            transform.band_energy(x, bands) for x in (forecast, target, forecast - target)
        )
        aim = theirs
        if self.needs_labels and y is not None:
            observed = y.to(dtype) if mask is None else torch.where(mask, y.to(dtype), target)
            aim = torch.maximum(theirs, transform.band_energy(observed, bands))
        # Round-off of the target's energies, below which no coherence can be told.
        floor = torch.finfo(dtype).eps * aim.detach().sum(-1, keepdim=True)
        floor = floor.clamp_min(1e-18).square()
        cross = (mine + theirs - difference) / 2
        coherence = cross / (mine * theirs + floor).sqrt()
        excess = (
            aim
            - theirs
            + 2 * (cross - (mine * aim + floor).sqrt() + torch.maximum(mine, aim) * (1 - coherence))
        )
        others = tuple(range(1, excess.ndim - 1))
        return self.weight * (excess.sum(others) if others else excess) / forecast[0].numel()
