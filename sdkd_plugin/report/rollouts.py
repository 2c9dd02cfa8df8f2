"""Errors of roll-outs: how they grow with the steps, and whether the statistics stay right.

A roll-out that diverges stays in every mean; its correlation is 0 from there on.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from sdkd_plugin._checks import check_shape
from sdkd_plugin.spectral import AbstractTransform, Bands, Spectrum

Fields = Float[Tensor, "batch steps channels ..."]
BINS = Bands(tuple(i / 32 for i in range(1, 32)))
"""In which spectra are compared; each is 1/32 of the frequencies wide."""

FLOOR = 1e-6
"""Of the truth's largest energy in a bin: what both spectra get, so that noise does not count."""

DIVERGED = 10.0
"""A roll-out has diverged where its root mean square is not below so many times the truth's."""


def rollout_curves(
    forecast: Fields, truth: Fields, transform: AbstractTransform, bands: Bands
) -> dict[str, Float[Tensor, "batch steps"]]:
    """Errors of each roll-out at each step; their means over the batch are what is published.

    Names are those of APEBench (``mean_nRMSE`` is the mean over the batch of ``nRMSE``) and The
    Well. With error e, truth t and a mean over the elements of a step:

    - ``nRMSE``: ``||e|| / ||t||``; ``nRMSE_band_0, ...``: the same within each band, APEBench's
      ``fourier_nRMSE``,
    - ``VRMSE``: ``||e|| / ||t - mean(t)||``, which is 1 for the forecast of the truth's mean,
    - ``correlation``: Pearson's, and 0 for a constant field,
    - ``diverged``: 1 from the step on at which the roll-out has diverged.

    Args:
        forecast: of `sdkd_plugin.rollouts.rollout`.
        truth: likewise.
        transform: the domain of the fields.
        bands: the partition of its frequencies.

    Raises:
        ValueError: if shapes differ, or the fields do not lie on the domain.

    Example:
        >>> from sdkd_plugin import GridTransform
        >>> wave = torch.linspace(0, 6.28318, 9)[:8].sin().expand(1, 2, 1, 8)
        >>> curves = rollout_curves(2 * wave, wave, GridTransform((8,)), Bands.split(0.5))
        >>> [round(float(curves[name][0, 0]), 3) for name in ("nRMSE", "correlation", "diverged")]
        [1.0, 1.0, 0.0]

    Source: APEBench, arXiv 2411.00180; The Well, arXiv 2412.00568.
    """
    check_shape("forecast", forecast.shape, truth.shape, "the truth's shape")
    steps, tiny = [], torch.finfo(torch.float64).tiny
    for mine, theirs in zip(forecast.double().unbind(1), truth.double().unbind(1), strict=True):
        error = mine - theirs
        a, b = (x.flatten(1) - x.flatten(1).mean(1, keepdim=True) for x in (mine, theirs))
        e, size, spread = error.flatten(1).norm(dim=1), theirs.flatten(1).norm(dim=1), b.norm(dim=1)
        of_error, of_truth = (transform.sample_band_energy(x, bands) for x in (error, theirs))
        in_bands = (of_error / of_truth.clamp_min(tiny)).sqrt()
        correlation = (a * b).sum(1) / (a.norm(dim=1) * spread).clamp_min(tiny)
        curves = {"nRMSE": e / size.clamp_min(tiny), "VRMSE": e / spread.clamp_min(tiny)}
        curves |= {"correlation": correlation.nan_to_num(0.0)}
        curves |= {f"nRMSE_band_{i}": value for i, value in enumerate(in_bands.unbind(1))}
        steps.append(curves)
    found = {name: torch.stack([step[name] for step in steps], 1) for name in steps[0]}
    level, limit = (x.double().flatten(2).square().mean(2).sqrt() for x in (forecast, truth))
    lost = (~(level <= DIVERGED * limit.mean())).cummax(1).values
    found["correlation"] = torch.where(lost, 0, found["correlation"])
    return {**found, "diverged": lost.double()}


def rollout_spectrum(fields: Fields, transform: AbstractTransform) -> Spectrum:
    """Mean energy of roll-outs in 32 equal bins of the frequency, over samples and steps.

    Bins that hold none of the domain's frequencies have energy 0.
    """
    each = [transform.sample_band_energy(x.double(), BINS).sum(0) for x in fields.unbind(1)]
    edges = torch.arange(32, dtype=torch.float64) / 32
    return Spectrum(edges + 1 / 64, torch.stack(each).sum(0) / fields.numel())


def rollout_scores(
    forecast: Fields, truth: Fields, transform: AbstractTransform, bands: Bands
) -> dict[str, float]:
    """Numbers of a batch of roll-outs; arguments and errors as of `rollout_curves`.

    - ``correlation_time``: the first step, counted from 1, at which the correlation is below 0.8,
      averaged over roll-outs; one step more than there are where it never is,
    - ``mean_nRMSE``, ``mean_VRMSE`` and ``mean_nRMSE_band_0, ...``: over roll-outs and steps; not
      finite if a roll-out has overflowed,
    - ``log_spectrum_error``: ``mean |log10(E / E_truth)|`` over the bins of `rollout_spectrum`,
      both energies plus a millionth of the truth's largest,
    - ``relative_spectrum_error``: ``sum |E - E_truth| / sum E_truth``,
    - ``diverged``: how many roll-outs diverged.

    Example:
        >>> from sdkd_plugin import GridTransform
        >>> truth = torch.randn(3, 5, 1, 16)
        >>> scores = rollout_scores(truth, truth, GridTransform((16,)), Bands.split(0.5))
        >>> scores["correlation_time"], scores["log_spectrum_error"], scores["diverged"]
        (6.0, 0.0, 0.0)
    """
    curves = rollout_curves(forecast, truth, transform, bands)
    lost, correlation = curves.pop("diverged"), curves.pop("correlation")
    kept = (correlation >= 0.8).long().cumprod(1).sum(1)
    mine, theirs = (rollout_spectrum(x, transform).energy for x in (forecast, truth))
    floor, held = FLOOR * theirs.max(), (theirs > 0) | ~(mine == 0)
    ratio = ((mine + floor) / (theirs + floor))[held]
    scores = {
        "correlation_time": 1 + kept.double().mean(),
        **{f"mean_{name}": curve.mean() for name, curve in curves.items()},
        "log_spectrum_error": ratio.log10().abs().mean(),
        "relative_spectrum_error": (mine - theirs).abs().sum() / theirs.sum(),
        "diverged": lost[:, -1].sum(),
    }
    return {name: float(value) for name, value in scores.items()}
