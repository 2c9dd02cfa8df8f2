"""Transforms that know their domain's eigenbasis, whole or its lowest part.

The bases themselves are in `grid`, `graph_basis`, `product` and `sphere`.
"""

from abc import abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from sdkd_plugin.spectral.bands import Bands, Spectrum
from sdkd_plugin.spectral.quadratic import AbstractQuadraticTransform
from sdkd_plugin.spectral.transform import check_field, full_precision, working_dtype


class AbstractBasisTransform(AbstractQuadraticTransform):
    """An orthonormal change of basis: coefficients of a field in its domain's eigenbasis.

    Parseval holds as ``sum(multiplicity * |forward(x)|^2) == sum(x^2)``, on a part of a basis as
    ``<=``; the difference belongs to the highest band.

    Inside, coefficients may be *packed*: perhaps unscaled, and in the layout that is fastest.
    """

    frequencies: Tensor
    """In [0, 1], float64, of the shape of one field's coefficients, e.g. ``(nx, ny // 2 + 1)``."""

    multiplicity: Tensor
    """How often each stored coefficient counts in Parseval's sum; shaped as `frequencies`."""

    _areas: Tensor | None
    """Weights of the inner product in which the basis is orthonormal, where they are not 1."""

    _scale: float = 1.0
    """Orthonormal over packed coefficients."""

    _paired: bool = False
    """Whether packed coefficients are complex."""

    def __init__(
        self, frequencies: Tensor, multiplicity: Tensor, areas: Tensor | None = None
    ) -> None:
        super().__init__()
        # Not persistent: they follow from the constructor's arguments.
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.register_buffer("multiplicity", multiplicity, persistent=False)
        self.register_buffer("_areas", areas, persistent=False)

    @abstractmethod
    def _to_packed(self, x: Tensor) -> Tensor:
        """Packed coefficients of fields, real or complex."""

    @abstractmethod
    def _from_packed(self, c: Tensor) -> Tensor:
        """Fields from packed coefficients, which may be overwritten."""

    def _pack(self, c: Tensor) -> Tensor:
        """Packed from orthonormal coefficients."""
        return c / self._scale

    def _unpack(self, c: Tensor) -> Tensor:
        """Orthonormal from packed coefficients."""
        return c * self._scale

    def _slots(self, values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Values at `frequencies`, one for each real number in packed coefficients."""
        return torch.stack((values, values), -1) if self._paired else values

    def _slot_energy(self) -> Float[Tensor, "..."]:
        """Energy of a 1 in the place of each of these real numbers."""
        return self._slots(self.multiplicity * self._scale**2)

    def forward(self, x: Float[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """Coefficients of fields, the frequency axes where the domain's axes were.

        Raises:
            ValueError: if the fields do not lie on the domain.
        """
        check_field(self, x)
        with full_precision(x):
            return self._unpack(self._to_packed(x.to(working_dtype(x))))

    def inverse(self, coefficients: Shaped[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Fields from their coefficients."""
        with full_precision(coefficients):
            return self._from_packed(self._pack(coefficients))

    def _weighted(self, x: Tensor) -> Tensor:
        return x if self._areas is None else x * self._areas.to(x)

    def _tables(self, bands: Bands, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The bands' power weights at each real number, and these times its energy."""
        kept, needed = float(self.frequencies.max()), bands.edges[-1] + bands.transition / 2
        if self.needs_field and needed > kept:
            raise ValueError(
                f"`bands` reach up to {needed:.4g}, expected edges up to {kept:.4g}: this "
                f"transform keeps {self.frequencies.numel()} frequencies and takes all others as "
                "one band. Keep more of them, or choose another method."
            )
        weights = self._slots(bands(self.frequencies)).flatten(1)
        tables = torch.stack([weights, weights * self._slot_energy().to(weights).flatten()])
        return tables.to(device, dtype)

    def _analyse(self, x: Tensor, tables: Tensor) -> Tensor:
        return self._to_packed(x)

    def _bilinear(
        self, x: Tensor, a: Tensor, y: Tensor, b: Tensor, tables: Tensor
    ) -> Float[Tensor, "batch n_bands"]:
        before, behind = a.ndim + self.domain_axes[0] - 1, -self.domain_axes[-1] - 1
        p, q = (torch.view_as_real(a), torch.view_as_real(b)) if a.is_complex() else (a, b)
        p, q = (p.flatten(1, before), q.flatten(1, before)) if before else (p[:, None], q[:, None])
        if a.is_cuda or p.shape[1] > 16:
            products = (p * q).sum(1)
        else:
            # Channel by channel, without a temporary tensor as large as the field.
            products = p[:, 0] * q[:, 0]
            for channel in range(1, p.shape[1]):
                products = torch.addcmul(products, p[:, channel], q[:, channel])
        if behind:
            first = 1 + len(self.domain_axes)
            products = products.sum(tuple(range(first, first + behind)))
        energy = products.flatten(1) @ tables[1].mT
        if not self.needs_field:
            return energy
        rest = (self._weighted(x) * y).flatten(1).sum(1) - energy.sum(1)
        return torch.cat([energy[:, :-1], energy[:, -1:] + rest[:, None]], 1)

    def _combine(self, x: Tensor, a: Tensor, weights: Tensor, tables: Tensor) -> Tensor:
        if not self.needs_field:
            return self._from_packed(self._times(a, weights @ tables[0]))
        top = weights[:, -1:]
        low = self._from_packed(self._times(a, (weights - top) @ tables[0]))
        return self._weighted(top.reshape(-1, *[1] * (x.ndim - 1)) * x + low)

    def _adjoint(self, a: Tensor, tables: Tensor) -> Tensor:
        energy = self._slot_energy().to(tables).flatten()
        return self._weighted(self._from_packed(self._times(a, 1 / energy[None])))

    def _times(self, a: Tensor, factors: Float[Tensor, "batch slots"]) -> Tensor:
        """Packed coefficients with each real number multiplied by a factor."""
        first, last = self.domain_axes[0], self.domain_axes[-1]
        parts, reals = ([2], torch.view_as_real(a)) if a.is_complex() else ([], a)
        domain = [*a.shape[first : last + 1 or None], *[1] * (-last - 1), *parts]
        # A field without a batch axis has one factor for all.
        leading = [-1, *[1] * (a.ndim + first - 1)] if a.ndim + first else []
        product = reals * factors.reshape(*leading, *domain)
        return torch.view_as_complex(product) if parts else product

    def filter(
        self,
        x: Float[Tensor, "..."],
        response: Callable[[Tensor], Tensor] | Float[Tensor, "..."],
    ) -> Float[Tensor, "..."]:
        """See `AbstractTransform`; ``response`` may also be its values at `frequencies`.

        Example:
            >>> from sdkd_plugin import GridTransform
            >>> x = torch.randn(2, 1, 8)
            >>> mean = GridTransform((8,)).filter(x, lambda frequency: frequency == 0)
            >>> torch.allclose(mean, x.mean(-1, keepdim=True).expand_as(x), atol=1e-6)
            True
        """
        check_field(self, x)
        gain = response(self.frequencies) if callable(response) else response
        if gain.shape != self.frequencies.shape:
            raise ValueError(
                f"`response` has shape {tuple(gain.shape)}, expected that of the frequencies, "
                f"{tuple(self.frequencies.shape)}."
            )
        rest = self._rest_of(response) if self.needs_field else 0.0
        working = x.to(working_dtype(x))
        factors = self._slots(gain.to(working) - rest).flatten()[None]
        with full_precision(x):
            filtered = self._from_packed(self._times(self._to_packed(working), factors))
        return (filtered + rest * working if self.needs_field else filtered).to(x.dtype)

    def _rest_of(self, response: Callable[[Tensor], Tensor] | Tensor) -> float:
        """The response at the frequencies that are not kept, which must be one number."""
        highest = self.frequencies.max()
        if callable(response):
            beyond = highest + (1 - highest) * torch.linspace(0, 1, 65).to(highest)
            values = response(beyond).to(highest)
            if torch.allclose(values, values[-1], atol=1e-6):
                return float(values[-1])
        raise ValueError(
            "`response` differs between frequencies that this transform does not keep "
            f"(above {float(highest):.4g}), expected a function that is constant there."
        )

    def spectrum(self, x: Float[Tensor, "..."]) -> Spectrum:
        """Mean energy of fields at each frequency.

        Formula: ``energy_k = multiplicity_k |x_hat_k|^2 / (number of elements of x)``, summed over
        all fields, so that the energies sum to the mean square of ``x`` (on a part of a basis: of
        what it spans).

        Raises:
            ValueError: if the fields do not lie on the domain.

        Example:
            >>> from sdkd_plugin import GridTransform
            >>> energy = GridTransform((8, 8)).spectrum(torch.ones(2, 1, 8, 8)).energy
            >>> round(float(energy.sum()), 6), round(float(energy[0]), 6)
            (1.0, 1.0)
        """
        c = self(x)
        axes = {axis % c.ndim for axis in self.domain_axes}
        others = [axis for axis in range(c.ndim) if axis not in axes]
        squares = (c * c.conj()).real
        power = (squares.sum(others) if others else squares) * self.multiplicity.to(squares)
        return Spectrum(self.frequencies.flatten(), power.flatten() / x.numel())
