"""Spectral objectives against labels, and weights of frequencies measured from labels.

The same weights and `AMSE` serve `DistillationLoss`, as its ``weighting`` and ``amse``.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sdkd_plugin._checks import check_finite, check_positive, check_type
from sdkd_plugin._explained import explained
from sdkd_plugin.losses.amplitude import AMSE
from sdkd_plugin.losses.band_weights import BandEvidence, make_weighting
from sdkd_plugin.losses.frequency import band_errors
from sdkd_plugin.spectral import AbstractTransform, Bands

PROBED = 4096
"""Up to this size of a domain the coefficients of a band are counted; beyond, estimated."""


@explained
@torch.no_grad()
def inverse_energy_weights(
    fields: Float[Tensor, "batch ..."] | Iterable[Float[Tensor, "batch ..."]],
    transform: AbstractTransform,
    bands: Bands,
    *,
    floor: float = 1e-3,
) -> tuple[float, ...]:
    """Weights of bands by the inverse of the energy that labels have in each of their frequencies.

    Formula: with e_i the mean energy of a coefficient in band i and n_i how many there are,

        w_i = c / (e_i + floor * max_j e_j),    sum_i n_i w_i = sum_i n_i

    The floor is a dial: from large, where all weights are 1 (the MSE), to 0, where every frequency
    counts relative to its own energy. Take narrow bands, such as ``Bands.equal(48)``, and choose
    the floor on validation roll-outs: at some floors all of ours diverged
    (``benchmarks/rollouts.py``).

    Args:
        fields: labels of the training data, or batches of them.
        transform: their domain; above 4,096 points the n_i are estimated, within a few percent.
        bands: the partition of its frequencies; an empty band has weight 0.
        floor: above 0.

    Returns:
        one weight a band, for ``weighting=`` or `SpectralLoss`.

    Raises:
        ValueError: if the floor is not positive, or fields are none, NaN, Inf or all 0.

    Example:
        >>> from sdkd_plugin import GridTransform
        >>> wave = torch.cos(2 * torch.pi * torch.arange(8) / 8)[None, None]
        >>> weights = inverse_energy_weights(wave, GridTransform((8,)), Bands.equal(4), floor=1.0)
        >>> [round(w, 3) for w in weights]
        [1.143, 0.571, 1.143, 1.143]

    Source: our own; that the MSE neglects what has little energy: Lippe et al. 2023, PDE-Refiner,
    arXiv 2308.05732.
    """
    check_positive("floor", floor)
    energy, count = torch.zeros(bands.n_bands, dtype=torch.float64), 0
    for batch in [fields] if isinstance(fields, Tensor) else fields:
        check_finite("fields", batch)
        energy += transform.sample_band_energy(batch, bands).double().sum(0).cpu()
        count += batch.numel()
    if not energy.sum() > 0:
        raise ValueError("`fields` have no energy, expected labels that are not all 0.")
    size = math.prod(transform.domain_shape)
    sizes = band_sizes(transform, bands)
    held = sizes > 1e-6 * size
    density = torch.where(held, energy / sizes.clamp_min(1e-6 * size), 0)
    weights = torch.where(held, 1 / (density + floor * density.max()), 0)
    return tuple((weights * sizes.sum() / (weights * sizes).sum()).tolist())


@torch.no_grad()
def band_sizes(transform: AbstractTransform, bands: Bands) -> Float[Tensor, " n_bands"]:
    """How many coefficients each band has, the trace of ``g_i(L)``; in sum the domain's points.

    Above `PROBED` points it is estimated from the energies of 256 fields of random signs.
    """
    shape, behind = transform.domain_shape, [1] * (-transform.domain_axes[-1] - 1)
    size = math.prod(shape)
    device = next(transform.buffers()).device
    if size <= PROBED:
        probes, share = torch.eye(size, dtype=torch.float64), 1.0
    else:
        signs = torch.randint(2, (256, size), generator=torch.Generator().manual_seed(0))
        probes, share = 2.0 * signs - 1, 1 / 256
    total = torch.zeros(bands.n_bands, dtype=torch.float64)
    for part in probes.split(max(1, 2**22 // size)):
        part = part.reshape(-1, *shape, *behind).to(device)
        total += transform.sample_band_energy(part, bands).double().sum(0).cpu()
    return share * total


@explained
class SpectralLoss(nn.Module):
    """A spectral error against labels: the task loss of a student alone, or beside a teacher.

    Formula: ``sum_i w_i e[b, i]`` with the errors of `band_errors`, or of `AMSE`. With all weights
    1 and without AMSE it is the MSE. Missing labels count as no error.

    Args:
        transform: the domain of the forecasts.
        bands: the partition of its frequencies.
        weights: of the bands, from low to high, such as `inverse_energy_weights` finds them; all 1
            by default.
        amse: counts lost amplitude too.

    Raises:
        ValueError: if there is not one weight a band.

    Example:
        >>> from sdkd_plugin import GridTransform
        >>> loss = SpectralLoss(GridTransform((8,)), Bands.split(0.5), amse=AMSE())
        >>> loss(torch.randn(4, 1, 8), torch.randn(4, 1, 8)).shape
        torch.Size([4])
    """

    def __init__(
        self,
        transform: AbstractTransform,
        bands: Bands,
        weights: Sequence[float] | None = None,
        *,
        amse: AMSE | None = None,
    ) -> None:
        super().__init__()
        check_type("transform", transform, AbstractTransform, "such as GridTransform((64, 64))")
        check_type("bands", bands, Bands, "such as Bands.split(0.25)")
        if amse is not None:
            check_type("amse", amse, AMSE, "or None")
        self.transform, self.bands = transform, bands
        weights = [1.0] * bands.n_bands if weights is None else weights
        self.weighting = make_weighting(weights, bands.n_bands)
        self.amse = AMSE(0.0) if amse is None else amse

    def forward(
        self, forecast: Float[Tensor, "batch ..."], y: Float[Tensor, "batch ..."]
    ) -> Float[Tensor, " batch"]:
        """The loss of each sample, as ``task_loss=`` expects it."""
        fields = forecast, y, self.transform, self.bands
        errors = band_errors(*fields)
        weights = self.weighting(BandEvidence(errors.detach()))
        return (errors + self.amse.excess(*fields) if self.amse.weight else errors) @ weights
