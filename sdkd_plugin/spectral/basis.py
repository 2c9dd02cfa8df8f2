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

    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> "AbstractBasisTransform":
        """Follow to another device, but in full precision: `half` must not move frequencies."""
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self

    @abstractmethod
    def forward(self, x: Float[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """Coefficients of fields, the frequency axes where the domain's axes were."""

    @abstractmethod
    def inverse(self, coefficients: Shaped[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Fields from their coefficients."""

    @property
    @abstractmethod
    def _unscaled_energy(self) -> float:
        """Energy of an orthonormal coefficient over that of an unscaled one."""

    @abstractmethod
    def _unscaled(self, x: Tensor) -> Tensor:
        """Coefficients, of float32 or float64 fields, in the scale that is fastest."""

    @abstractmethod
    def _from_unscaled(self, coefficients: Tensor) -> Tensor:
        """The inverse of `_unscaled`."""

    def masks(self, bands: Bands, like: Tensor) -> Float[Tensor, "n_bands ..."]:
        """Power weight of each band at each frequency, computed once for a device and dtype."""
        key = bands, like.device, working_dtype(like)
        if key not in self._masks:
            # A validation pass in inference mode may come first; training needs normal tensors.
            with torch.inference_mode(False):
                self._masks[key] = bands(self.frequencies).to(like.device, key[2])
        return self._masks[key]

    def sample_band_energy(
        self, x: Float[Tensor, "batch ..."], bands: Bands
    ) -> Float[Tensor, "batch n_bands"]:
        """See `AbstractTransform`."""
        check_field(self, x, batched=True)
        x = x.to(working_dtype(x))
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
        squares = self._squares(self(x), keep=0).unflatten(0, (self.frequencies.numel(), -1))
        power = self.multiplicity.flatten().to(squares) * squares.sum(-1)
        return Spectrum(self.frequencies.flatten(), power / x.numel())

    def _squares(self, coefficients: Tensor, *, keep: int) -> Float[Tensor, "*kept n_reals"]:
        """Squares of the real numbers in coefficients, all but the first ``keep`` axes summed.

        A complex coefficient gives two, its real and its imaginary part's, side by side: the
        modulus would take a square root, and adding the two here is slow.
        """
        n = coefficients.ndim
        summed = [axis for axis in range(keep, n) if axis - n not in self.domain_axes]
        reals = torch.view_as_real(coefficients) if coefficients.is_complex() else coefficients
        squares = reals.square()
        return (squares.sum(summed) if summed else squares).flatten(start_dim=keep)

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
            coefficients = transform._unscaled(x)
            squares = transform._squares(coefficients, keep=1)
            multiplicity = transform._unscaled_energy * transform.multiplicity
            weights = (masks * multiplicity.to(masks)).flatten(1)
            parts = squares.shape[1] // weights.shape[1]
            energy = squares @ weights.repeat_interleave(parts, dim=1).mT
        ctx.save_for_backward(coefficients, masks)
        ctx.transform = transform
        return energy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        coefficients, masks = ctx.saved_tensors
        transform: AbstractBasisTransform = ctx.transform
        with torch.autocast(grad.device.type, enabled=False):
            response = (2 * grad @ masks.flatten(1)).unflatten(1, masks.shape[1:])
            response = transform._over_axes(coefficients.ndim, response)
            return transform._from_unscaled(coefficients * response), None, None
