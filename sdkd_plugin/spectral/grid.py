"""Fields on regular grids: Fourier where the data wrap around, cosines where they do not."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from sdkd_plugin._checks import check_choice, check_positive_int, shown
from sdkd_plugin._explained import explained
from sdkd_plugin.spectral import cosine
from sdkd_plugin.spectral.basis import AbstractBasisTransform

Boundary = Literal["periodic", "reflect"]

CACHED = 2**21
"""Elements of a block of fields that a CPU transforms by the DCT at once."""

BY_MATRIX = 128
"""Where no axis is longer, the DCT is a product with a matrix along each: on a CPU that is faster
than an FFT with its reordering."""


@explained
class GridTransform(AbstractBasisTransform):
    """Orthonormal transform of fields on a regular grid of one to three axes.

    ``periodic`` is the real FFT, for data that wrap around; ``reflect`` the DCT-II along each
    axis, for data that do not (its implied continuation is even about the edges). With integer
    wavenumbers k_i on axes of N_i points the frequency of a coefficient is::

        periodic: sqrt(sum_i (|k_i| / (N_i / 2))^2 / d)
        reflect:  sqrt(sum_i (k_i / N_i)^2 / d)

    so 0 is the mean and the corner of the spectrum is 1 (for even N_i, periodic).

    Coefficients are complex, ``(..., *shape[:-1], shape[-1] // 2 + 1)``, or with ``reflect`` real,
    ``(..., *shape)``.

    Args:
        shape: sizes of the grid's axes, the last axes of a field ``(batch, channels, *shape)``.
        boundary: what lies beyond the grid's edges.

    Raises:
        ValueError: if there are not one to three axes, a size is not a positive integer, the
            boundary is unknown, or a field of another shape is given.

    Example:
        >>> transform = GridTransform((4, 6))
        >>> x = torch.randn(2, 3, 4, 6)
        >>> transform(x).shape
        torch.Size([2, 3, 4, 4])
        >>> torch.allclose(transform.inverse(transform(x)), x, atol=1e-6)
        True

    Source: the DFT by `torch.fft`; the DCT-II by `sdkd_plugin.spectral.cosine`.
    """

    domain_shape: tuple[int, ...] = ()
    domain_axes: tuple[int, ...] = ()
    channel_axis: int = 0
    _order: Tensor
    _place: Tensor

    def __init__(self, shape: Sequence[int], boundary: Boundary = "periodic") -> None:
        if isinstance(shape, str) or not 1 <= len(shape) <= 3:
            raise ValueError(f"`shape` is {shown(shape)}, expected one to three sizes.")
        for size in shape:
            check_positive_int("shape", size)
        check_choice("boundary", boundary, get_args(Boundary))
        wavenumbers = [
            _wavenumbers(size, boundary, one_sided=axis == len(shape) - 1)
            for axis, size in enumerate(shape)
        ]
        squares = torch.stack(torch.meshgrid(*[k**2 for k in wavenumbers], indexing="ij"))
        multiplicity = torch.ones(squares.shape[1:], dtype=torch.float64)
        if boundary == "periodic":
            # A one-sided real FFT leaves out the mirror image of every column but the mean's and,
            # for an even length, Nyquist's.
            multiplicity[..., 1 : (shape[-1] + 1) // 2] = 2
        super().__init__(squares.mean(0).sqrt(), multiplicity)
        self.shape = self.domain_shape = tuple(shape)
        self.domain_axes = tuple(range(-len(shape), 0))
        self.channel_axis = -len(shape) - 1
        self.boundary: Boundary = boundary
        # Of the three layouts only that of the DCT by FFT is not the one of `frequencies`.
        self._folded = boundary == "reflect" and max(shape) > BY_MATRIX
        self._paired = boundary == "periodic"
        self._scale = math.prod(shape) ** -0.5 if self._paired else 1.0
        if self._folded:
            order = cosine.even_odd(shape)
            self.register_buffer("_order", order, persistent=False)
            self.register_buffer("_place", order.argsort().int(), persistent=False)
        for axis, size in enumerate(shape if boundary == "reflect" else ()):
            factors = cosine.twiddle(size) if self._folded else cosine.matrix(size)
            self.register_buffer(f"_factors_{axis}", factors, persistent=False)

    def resized(self, domain_shape: tuple[int, ...]) -> "GridTransform":
        """A grid of another resolution with the same boundary."""
        return GridTransform(domain_shape, self.boundary)

    def _pack(self, c: Tensor) -> Tensor:
        if self._folded:
            return cosine.pack(c / cosine.amplitudes(self.shape).to(c))
        return super()._pack(c)

    def _unpack(self, c: Tensor) -> Tensor:
        if self._folded:
            return cosine.unpack(c, self.shape[-1]) * cosine.amplitudes(self.shape).to(c.real)
        return super()._unpack(c)

    def _to_packed(self, x: Tensor) -> Tensor:
        if self._paired:
            return torch.fft.rfftn(x, dim=self.domain_axes)
        factors = self._factors(x.dtype)
        if not self._folded:
            return cosine.product(x, factors, self.domain_axes)
        options = self.domain_axes, factors, self._order
        return self._in_blocks(lambda x: cosine.packed_cosines(x, *options), x)

    def _from_packed(self, c: Tensor) -> Tensor:
        if self._paired:
            return torch.fft.irfftn(c, s=self.shape, dim=self.domain_axes)
        factors = self._factors(c.real.dtype)
        if not self._folded:
            return cosine.product(c, [matrix.mT for matrix in factors], self.domain_axes)
        options = self.shape[-1], self.domain_axes, factors, self._place
        return self._in_blocks(lambda c: cosine.fields_from_packed(c, *options), c)

    def _in_blocks(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """A function of a batch in blocks, so that temporary tensors stay in the cache."""
        whole = x.ndim == len(self.shape) or x.numel() <= CACHED
        if whole or x.is_cuda or torch.is_grad_enabled():
            return function(x)
        samples = max(1, CACHED * len(x) // x.numel())
        return torch.cat([function(block) for block in x.split(samples)])

    def _factors(self, dtype: torch.dtype) -> list[Tensor]:
        return [getattr(self, f"_factors_{axis}").to(dtype) for axis in range(len(self.shape))]

    def _slots(self, values: Tensor) -> Tensor:
        return cosine.slots(values) if self._folded else super()._slots(values)

    def _slot_energy(self) -> Tensor:
        if self._folded:
            return cosine.slot_energy(self.shape).to(self.frequencies.device)
        return super()._slot_energy()

    def extra_repr(self) -> str:
        """Shape and boundary, for ``print``."""
        return f"shape={self.shape}, boundary={self.boundary!r}"


def _wavenumbers(size: int, boundary: Boundary, *, one_sided: bool) -> Float[Tensor, " k"]:
    """Wavenumbers of one axis over the highest it carries."""
    if boundary == "reflect":
        return torch.arange(size, dtype=torch.float64) / size
    cycles = torch.fft.rfftfreq if one_sided else torch.fft.fftfreq
    return 2 * cycles(size, dtype=torch.float64).abs()
