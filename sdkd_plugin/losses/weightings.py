"""Weightings by their names.

Here lives the way from a string, as configurations have it, to a weighting with its defaults.
"""

from collections.abc import Sequence
from typing import Literal, get_args

from sdkd_plugin._checks import check_choice
from sdkd_plugin.losses.measured_weighting import AdaptiveWeighting, ConfidenceWeighting
from sdkd_plugin.losses.weighting import AbstractWeighting, FixedWeighting, RelativeWeighting

WeightingName = Literal["fixed", "relative", "adaptive", "confidence"]


def make_weighting(
    weighting: WeightingName | AbstractWeighting | Sequence[float], n_bands: int
) -> AbstractWeighting:
    """The weighting of a name, with its defaults.

    Args:
        weighting: a name; numbers, one a band from low to high, are a `FixedWeighting`; a weighting
            comes back as it is. ``fixed`` is 1 for the lowest band and 2 for the others: the
            paper's form with an alpha of 1/2, our own choice.
        n_bands: of the partition.

    Raises:
        ValueError: if the name is unknown, or the weighting does not fit the bands.

    Example:
        >>> make_weighting("fixed", 3).weights.tolist()
        [1.0, 2.0, 2.0]
    """
    made: AbstractWeighting
    if isinstance(weighting, AbstractWeighting):
        made = weighting
    elif not isinstance(weighting, str):
        made = FixedWeighting(weighting)
    else:
        check_choice("weighting", weighting, get_args(WeightingName))
        if weighting == "fixed":
            made = FixedWeighting((1.0, *[2.0] * (n_bands - 1)))
        elif weighting == "relative":
            made = RelativeWeighting()
        elif weighting == "adaptive":
            made = AdaptiveWeighting(n_bands)
        else:
            made = ConfidenceWeighting(n_bands)
    made.check(n_bands)
    return made
