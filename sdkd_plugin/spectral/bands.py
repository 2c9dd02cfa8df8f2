"""How frequencies group into bands. Which frequencies a domain has: `grid`, `graph`."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sdkd_plugin._checks import check_positive_int, shown
from sdkd_plugin._explained import explained

SAME_FREQUENCY = 1e-9
"""Frequencies this close are one: round-off must not tear an eigenspace apart at a hard edge."""

_MOST_OCTAVES = 64


class Spectrum(NamedTuple):
    """The energy of fields at each frequency of their domain.

    Attributes:
        frequencies: in [0, 1], of shape ``(n_frequencies,)``, in the transform's order.
        energy: mean energy an element, of shape ``(n_frequencies,)``; it sums to the mean square.
    """

    frequencies: Tensor
    energy: Tensor


@explained
@dataclass(frozen=True)
class Bands:
    """A partition of the frequencies [0, 1] into bands, ordered from low to high.

    A band's weight at a frequency is a *power* weight: the share of the energy there that counts
    to the band. The weights of all bands sum to 1 at every frequency. With hard edges a frequency
    on an edge belongs to the band above it; with smooth edges each edge is a raised cosine,

        step(f) = (1 + sin(pi * clip((f - edge) / transition, -1/2, 1/2))) / 2.

    Args:
        edges: inner edges, ascending, each in (0, 1).
        transition: width of the smooth edges, a frequency difference; 0 is hard.

    Raises:
        ValueError: if there is no edge, an edge is outside (0, 1), edges do not ascend, or a
            transition reaches below frequency 0 or beyond 1.

    Example:
        >>> bands = Bands.split(0.25)
        >>> bands(torch.tensor([0.0, 0.2, 0.25, 1.0]))
        tensor([[1., 1., 0., 0.],
                [0., 0., 1., 1.]])
    """

    edges: tuple[float, ...]
    transition: float = 0.0

    def __post_init__(self) -> None:
        # A list is what YAML gives; floats of other kinds would not hash alike.
        object.__setattr__(self, "edges", tuple(float(e) for e in self.edges))
        if not self.edges:
            raise ValueError("`edges` is empty, expected at least one edge: one band is the MSE.")
        if not all(0 < e < 1 for e in self.edges):
            raise ValueError(
                f"`edges` is {self.edges}, expected cutoffs inside (0, 1): a frequency of 1 is "
                "the highest the domain carries."
            )
        if any(a >= b for a, b in zip(self.edges, self.edges[1:], strict=False)):
            raise ValueError(f"`edges` is {self.edges}, expected ascending edges.")
        reach = self.transition / 2
        if not 0 <= reach <= min(self.edges[0], 1 - self.edges[-1]) + SAME_FREQUENCY:
            raise ValueError(
                f"`transition` is {self.transition}, expected a width of at least 0 that keeps "
                f"the edges {self.edges} within [0, 1]."
            )

    @classmethod
    @explained
    def split(cls, cutoff: float, transition: float = 0.0) -> "Bands":
        """Two bands: low below ``cutoff``, in (0, 1), high from there on."""
        return cls((cutoff,), transition)

    @classmethod
    @explained
    def dyadic(cls, n: int, transition: float = 0.0) -> "Bands":
        """``n`` bands, from 2 to 64, octaves: edges 1/2, 1/4, 1/8 and so on.

        Example:
            >>> Bands.dyadic(3).edges
            (0.25, 0.5)
        """
        check_positive_int("n", n, minimum=2)
        if n > _MOST_OCTAVES:
            raise ValueError(f"`n` is {shown(n)}, expected at most {_MOST_OCTAVES} octaves.")
        return cls(tuple(2.0**-i for i in range(n - 1, 0, -1)), transition)

    @classmethod
    @explained
    def from_energy(cls, spectrum: Spectrum, n: int, transition: float = 0.0) -> "Bands":
        """``n`` bands whose energies are as nearly equal as the domain's frequencies allow.

        The edges, each midway between two neighbouring frequencies, minimise the sum of
        ``|share below edge j - j / n|``. The energy at frequency 0, the mean, belongs to the
        lowest band but is left out: a large mean would leave all other bands empty.

        Args:
            spectrum: of the data, from a transform's ``spectrum(x)``.
            n: number of bands.
            transition: as for `Bands`.

        Raises:
            ValueError: if the spectrum carries no energy besides the mean, or fewer than ``n``
                frequencies carry energy.

        Example:
            >>> flat = Spectrum(torch.linspace(0, 1, 101), torch.ones(101))
            >>> [round(edge, 3) for edge in Bands.from_energy(flat, 4).edges]
            [0.255, 0.505, 0.755]
        """
        check_positive_int("n", n, minimum=2)
        frequencies, order = spectrum.frequencies.double().cpu().sort()
        energy = spectrum.energy.detach().double().cpu()[order]
        # One entry a frequency, whatever the dimension of its eigenspace, and none for the mean.
        starts = frequencies.diff(prepend=frequencies.new_zeros(1)) > SAME_FREQUENCY
        group = starts.cumsum(0)
        frequencies = frequencies[starts]
        summed = torch.zeros(len(frequencies) + 1).double().index_add_(0, group, energy)
        mean, energy = summed[0], summed[1:]
        # Below a share of 1e-12 it is the round-off of a float32 transform.
        if not summed.isfinite().all() or energy.sum() <= 1e-12 * mean:
            raise ValueError(
                f"`spectrum` has energy {float(energy.sum())} besides the mean's {float(mean)}, "
                "expected a finite number well above 0."
            )
        share = energy.cumsum(0) / energy.sum()
        # An edge above a frequency without energy would be a second choice for the same bands.
        last = ((energy > 1e-12 * energy.sum()) & (share < 1 - 1e-12)).nonzero().flatten()
        if len(last) < n - 1:
            raise ValueError(
                f"`n` is {n}, expected fewer bands: the energy is concentrated on so few "
                "frequencies that they cannot be split further."
            )
        last = last[_nearest_increasing(share[last], n)]
        edges = (frequencies[last] + frequencies[last + 1]) / 2
        return cls(tuple(edges.tolist()), transition)

    @property
    def n_bands(self) -> int:
        """Number of bands."""
        return len(self.edges) + 1

    @explained
    def __call__(self, frequencies: Float[Tensor, "*shape"]) -> Float[Tensor, "n_bands *shape"]:
        """Power weight of each band at each frequency, in [0, 1]; the bands' sum to 1."""
        ones = torch.ones_like(frequencies)
        above = torch.stack([ones, *(self._step(frequencies - e) for e in self.edges), 0 * ones])
        return above[:-1] - above[1:]

    def _step(self, distance: Tensor) -> Tensor:
        if self.transition == 0:
            return (distance >= -SAME_FREQUENCY).to(distance.dtype)
        return (1 + torch.sin(math.pi * (distance / self.transition).clamp(-0.5, 0.5))) / 2


def _nearest_increasing(share: Tensor, n: int) -> Tensor:
    """Indices ``i_1 < ... < i_(n-1)`` that minimise ``sum_j |share[i_j] - j / n|``."""
    total = (share - 1 / n).abs()
    before = []
    for j in range(2, n):
        best, where = total.cummin(0)
        before.append(where)
        total = (share - j / n).abs()
        total[1:] += best[:-1]
        total[: j - 1] = math.inf
    chosen = [int(total.argmin())]
    for where in reversed(before):
        chosen.append(int(where[chosen[-1] - 1]))
    return torch.tensor(chosen[::-1])
