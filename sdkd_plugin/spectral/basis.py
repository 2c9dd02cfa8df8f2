"""Transforms that know their domain's eigenbasis: coefficients, and quadratic forms in them.

Here live `AbstractBasisTransform`, which grids and graphs share, and the one autograd function
behind every spectral loss. The bases themselves are in `grid` and `graph`.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

from sdkd_plugin.spectral.bands import Bands, Spectrum
from sdkd_plugin.spectral.transform import AbstractTransform, check_field, working_dtype


class AbstractBasisTransform(AbstractTransform):
    """An orthonormal change of basis: coefficients of a field in its domain's eigenbasis.

    Parseval holds as ``sum(multiplicity * |forward(x)|^2) == sum(x^2)``.
    """

    frequencies: Tensor
    """In [0, 1], float64, of the shape of one field's coefficients, e.g. ``(nx, ny // 2 + 1)``."""

    multiplicity: Tensor
    """How often each stored coefficient counts in Parseval's sum; shaped as `frequencies`."""

    def __init__(self, frequencies: Tensor, multiplicity: Tensor) -> None:
        super().__init__()
        # Not persistent: they follow from the constructor's arguments.
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.register_buffer("multiplicity", multiplicity, persistent=False)
        self._masks: dict[tuple[Bands, torch.device, torch.dtype], Tensor] = {}

    @abstractmethod
    def forward(self, x: Float[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """Coefficients of fields, the frequency axes where the domain's axes were."""

    @abstractmethod
    def inverse(self, coefficients: Shaped[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Fields from their coefficients."""

    def masks(self, bands: Bands, like: Tensor) -> Float[Tensor, "n_bands ..."]:
        """Power weight of each band at each frequency, computed once for a device and dtype."""
        key = bands, like.device, working_dtype(like)
        if key not in self._masks:
            self._masks[key] = bands(self.frequencies.double()).to(like.device, key[2])
        return self._masks[key]

    def sample_band_energy(
        self, x: Float[Tensor, "batch ..."], bands: Bands
    ) -> Float[Tensor, "batch n_bands"]:
        """See `AbstractTransform`."""
        check_field(self, x, batched=True)
        energy: Tensor = _SampleBandEnergy.apply(x, self, self.masks(bands, x))
        return energy

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
        gain = response(self.frequencies) if callable(response) else response
        if gain.shape != self.frequencies.shape:
            raise ValueError(
                f"`response` has shape {tuple(gain.shape)}, expected that of the frequencies, "
                f"{tuple(self.frequencies.shape)}."
            )
        gain = self._over_axes(x.ndim, gain.to(x.device, working_dtype(x)))
        return self.inverse(self(x) * gain).to(x.dtype)

    def spectrum(self, x: Float[Tensor, "..."]) -> Spectrum:
        """Mean energy of fields at each frequency.

        Formula: ``energy_k = multiplicity_k |x_hat_k|^2 / (number of elements of x)``, summed over
        all fields, so that the energies sum to the mean square of ``x``.

        Raises:
            ValueError: if the fields do not lie on the domain.

        Example:
            >>> from sdkd_plugin import GridTransform
            >>> energy = GridTransform((8, 8)).spectrum(torch.ones(2, 1, 8, 8)).energy
            >>> round(float(energy.sum()), 6), round(float(energy[0]), 6)
            (1.0, 1.0)
        """
        power = self._power(self(x), keep=0)
        return Spectrum(self.frequencies.flatten(), power / x.numel())

    def _power(self, coefficients: Tensor, *, keep: int) -> Float[Tensor, "... n_frequencies"]:
        """Energy at each frequency, summed over all but the first ``keep`` axes."""
        frequency_axes = {a % coefficients.ndim for a in self.domain_axes}
        summed = [a for a in range(keep, coefficients.ndim) if a not in frequency_axes]
        # Complex numbers are read as pairs of reals: the modulus would take a square root.
        power = torch.view_as_real(coefficients) if coefficients.is_complex() else coefficients
        power = power.square()
        if summed:
            power = power.sum(summed)
        if coefficients.is_complex():
            power = power.sum(-1)
        return (power * self.multiplicity.to(power)).flatten(start_dim=keep)

    def _over_axes(self, ndim: int, per_frequency: Tensor) -> Tensor:
        """Shape ``(frequencies)`` or ``(batch, frequencies)`` to multiply ``ndim`` axes."""
        n_domain = len(self.domain_axes)
        batch = per_frequency.shape[:-n_domain]
        trailing = -self.domain_axes[-1] - 1
        between = ndim - len(batch) - n_domain - trailing
        return per_frequency.reshape(
            *batch, *[1] * between, *per_frequency.shape[-n_domain:], *[1] * trailing
        )


class _SampleBandEnergy(torch.autograd.Function):
    """``e[b, i] = sum_k masks[i, k] multiplicity[k] |x_hat[b, k]|^2``, summed over channels too.

    The gradient is ``2 g(L) x`` with the response ``g = sum_i de[b, i] masks[i]``: one transform
    on the way forward, one inverse on the way back, and only the coefficients are kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, transform: AbstractBasisTransform, masks: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            coefficients = transform(x)
            energy = transform._power(coefficients, keep=1) @ masks.flatten(1).mT
        ctx.save_for_backward(coefficients, masks)
        ctx.transform = transform
        ctx.dtype = x.dtype
        return energy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        coefficients, masks = ctx.saved_tensors
        transform: AbstractBasisTransform = ctx.transform
        with torch.autocast(grad.device.type, enabled=False):
            response = (2 * grad @ masks.flatten(1)).unflatten(1, masks.shape[1:])
            response = transform._over_axes(coefficients.ndim, response)
            return transform.inverse(coefficients * response).to(ctx.dtype), None, None
