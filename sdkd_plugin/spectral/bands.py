"""How frequencies group into bands. Which frequencies a domain has: `grid`, `graph`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sdkd_plugin._checks import check_positive_int
from sdkd_plugin._explained import explained

SAME_FREQUENCY = 1e-9
"""Frequencies this close are one: round-off must not tear an eigenspace apart at a hard edge."""


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
        check_positive_int("n", n, minimum=2, most=64)
        return cls(tuple(2.0**-i for i in range(n - 1, 0, -1)), transition)

    @classmethod
    @explained
    def equal(cls, n: int, transition: float = 0.0) -> "Bands":
        """``n`` bands, at least two, of equal width.

        On a periodic grid of one axis and N points each of ``N // 2`` bands has one wavenumber, and
        the highest band Nyquist's too.

        Example:
            >>> Bands.equal(4).edges
            (0.25, 0.5, 0.75)
        """
        check_positive_int("n", n, minimum=2, most=10_000)
        return cls(tuple(i / n for i in range(1, n)), transition)

    @classmethod
    @explained
    def from_skill(
        cls,
        error: Spectrum,
        truth: Spectrum,
        thresholds: Sequence[float] = (0.1, 1.0),
        transition: float = 0.0,
    ) -> "Bands":
        """Bands that begin where a teacher's relative error crosses thresholds.

        Formula: the edge of a threshold t minimises ``sum_(f < edge) (error_f - t truth_f)`` with
        the energies at each frequency. Where the relative error grows with the frequency, that is
        where it crosses t. So from an edge of t = 1 on the teacher's error has the truth's energy.

        Args:
            error: of teacher minus truth, from a transform's ``spectrum`` on validation data.
            truth: of the truth, of the same transform.
            thresholds: of the relative error energy, ascending, above 0. Those that are not
                crossed give no edge.
            transition: as for `Bands`.

        Raises:
            ValueError: if spectra are of different frequencies or not finite, thresholds do not
                ascend from above 0, or none gives an edge.

        Example:
            >>> f = torch.linspace(0, 1, 5)
            >>> error = Spectrum(f, torch.tensor([0.0, 0.01, 0.04, 0.2, 0.3]))
            >>> truth = Spectrum(f, torch.tensor([1.0, 1.0, 0.3, 0.2, 0.2]))
            >>> Bands.from_skill(error, truth).edges
            (0.375, 0.625)
        """
        levels = tuple(float(t) for t in thresholds)
        if not levels or levels[0] <= 0 or any(a >= b for a, b in pairwise(levels)):
            raise ValueError(f"`thresholds` is {levels}, expected ascending numbers above 0.")
        if error.frequencies.shape != truth.frequencies.shape or not torch.allclose(
            error.frequencies, truth.frequencies
        ):
            raise ValueError("`error` and `truth` are of different transforms, expected one.")
        frequencies, wrong = _by_frequency(error)
        _, right = _by_frequency(truth)
        if not (wrong.isfinite().all() and right.isfinite().all()):
            raise ValueError("`error` or `truth` has energies that are not finite.")
        edges = set()
        for level in levels:
            total = (wrong - level * right).cumsum(0)
            below = int(total.argmin())
            if below + 1 < len(frequencies) and total[below] < 0:
                edges.add(float(frequencies[below : below + 2].mean()))
        if not edges:
            raise ValueError(
                f"`thresholds` is {levels}, but the relative error crosses none: choose "
                "others, or place the edge yourself by Bands.split."
            )
        return cls(tuple(sorted(edges)), transition)

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
        frequencies, summed = _by_frequency(spectrum)
        mean, frequencies, energy = summed[0], frequencies[1:], summed[1:]
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


def _by_frequency(spectrum: Spectrum) -> tuple[Tensor, Tensor]:
    """The distinct frequencies, the mean's first, and the energy of each."""
    frequencies, order = spectrum.frequencies.double().cpu().sort()
    energy = spectrum.energy.detach().double().cpu()[order]
    starts = frequencies.diff(prepend=frequencies.new_zeros(1)) > SAME_FREQUENCY
    distinct = torch.cat([frequencies.new_zeros(1), frequencies[starts]])
    return distinct, torch.zeros_like(distinct).index_add_(0, starts.cumsum(0), energy)


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
