"""Errors on the globe, where a grid cell is the smaller the nearer it is to a pole."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from sdkd_plugin._checks import check_shape


def latitude_weights(latitude: Float[Tensor, " lat"]) -> Float[Tensor, " lat"]:
    """The area of a grid cell in each row, divided by the mean area.

    Formula: ``w_i ~ sin(upper edge of row i) - sin(lower edge)``, edges halfway between rows and
    at the poles. On WeatherBench's equiangular grids this is ``cos(latitude)`` over its mean.

    Raises:
        ValueError: unless latitudes ascend or descend, in degrees north from -90 to 90.

    Example:
        >>> latitude_weights(torch.tensor([-45.0, 45.0]))
        tensor([1., 1.])
    """
    steps = latitude.diff()
    monotonic = bool((steps > 0).all()) or bool((steps < 0).all())
    if not len(latitude) or not monotonic or not bool((latitude.abs() <= 90).all()):
        raise ValueError(
            f"`latitude` is {latitude.tolist()}, expected degrees in [-90, 90] that ascend or "
            "descend."
        )
    pole = latitude.new_tensor([-90.0 if bool((steps < 0).any()) else 90.0])
    edges = torch.cat([-pole, (latitude[1:] + latitude[:-1]) / 2, pole]).double()
    areas = torch.sin(edges * math.pi / 180).diff().abs()
    return (areas / areas.mean()).to(latitude.dtype)


def latitude_weighted_rmse(
    forecast: Float[Tensor, "*times channels lat lon"],
    truth: Float[Tensor, "*times channels lat lon"],
    latitude: Float[Tensor, " lat"],
) -> Float[Tensor, " channels"]:
    """The root mean square error of each channel, with grid cells weighted by their areas.

    Formula: ``sqrt(mean over times, lat, lon of w_lat (forecast - truth)^2)``, w from
    :func:`latitude_weights`. The mean over times is under the root, as in WeatherBench 2.

    Args:
        forecast: fields; all axes before the channels are times.
        truth: fields of the same shape.
        latitude: degrees north of each row.

    Raises:
        ValueError: if shapes do not match.

    Example:
        >>> truth = torch.zeros(5, 1, 2, 4)
        >>> latitude_weighted_rmse(truth + 3, truth, torch.tensor([-45.0, 45.0]))
        tensor([3.])

    Source: Rasp et al., WeatherBench 2, arXiv 2308.15560, section 3.
    """
    check_shape("truth", truth.shape, forecast.shape, "as `forecast` has")
    check_shape("latitude", latitude.shape, forecast.shape[-2:-1], "one for each row")
    weights = latitude_weights(latitude).to(forecast)[:, None]
    squares = weights * (forecast - truth).square()
    return squares.mean((-2, -1)).reshape(-1, forecast.shape[-3]).mean(0).sqrt()
