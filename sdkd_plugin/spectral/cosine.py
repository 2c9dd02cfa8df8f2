"""The DCT-II of any number of axes, and its inverse: on small grids by matrices, else a real FFT.

Here live the matrices, the reordering, the twiddle factors and the packed layout; what a frequency
is, is in `grid`. `scipy.fft.dctn` has no gradient, and a matrix grows with the square of an axis.

With ``v = (x_0, x_2, ..., x_3, x_1)`` along each axis, V its DFT and ``w_k = exp(-i pi k / 2N)``,
the unscaled DCT-II along one axis is ``C_k = Re(w_k V_k)``, ``C_(N-k) = -Im(w_k V_k)``; along a
further axis it is ``C_k = (w_k V_k + conj(w_k) V_(-k)) / 2``, linear in the complex numbers of
before. *Packed* coefficients are those complex numbers, half of them along the last axis.

Source: Makhoul 1980, "A fast cosine transform in one and two dimensions".
"""

import math
from collections.abc import Sequence

import numpy as np
import scipy.fft
import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor


def matrix(size: int) -> Float[Tensor, "k n"]:
    """The orthonormal DCT-II of an axis, float64."""
    return torch.tensor(scipy.fft.dct(np.eye(size), axis=0, norm="ortho"))


def product(
    x: Float[Tensor, "..."], matrices: Sequence[Tensor], axes: Sequence[int]
) -> Float[Tensor, "..."]:
    """Fields with a matrix applied along each axis; the axes are the last ones, ascending."""
    for of_axis, axis in zip(matrices[:-1], axes[:-1], strict=True):
        x = (of_axis @ x.flatten(axis + 1)).reshape(x.shape)
    return x @ matrices[-1].mT


def packed_cosines(
    x: Float[Tensor, "..."], axes: Sequence[int], twiddles: Sequence[Tensor], order: Tensor
) -> Complex[Tensor, "..."]:
    """``2^(d - 1)`` times the packed coefficients of fields over their d last axes.

    ``axes`` are counted from the end, ascending; ``twiddles`` are those of each, as `twiddle` gives
    them, in the dtype of ``x``; ``order`` is `even_odd` of the sizes.
    """
    c = torch.fft.rfftn(_reordered(x, order), dim=tuple(axes))
    factor = torch.view_as_complex(twiddles[-1])[: c.shape[-1]]
    for axis, twiddle in zip(axes[:-1], twiddles[:-1], strict=True):
        w = _along(torch.view_as_complex(twiddle), axis)
        c = _combined(c, axis, w * factor, w.conj() * factor)
        factor = factor.new_ones(())
    return c if len(axes) > 1 else c * factor


def fields_from_packed(
    c: Complex[Tensor, "..."],
    last: int,
    axes: Sequence[int],
    twiddles: Sequence[Tensor],
    place: Tensor,
) -> Float[Tensor, "..."]:
    """The inverse of `packed_cosines`, which may overwrite ``c``; ``last`` is an axis' length.

    ``place`` is where `even_odd` came from, its ``argsort``.
    """
    factor = torch.view_as_complex(twiddles[-1])[: c.shape[-1]].conj()
    for axis, twiddle in zip(axes[:-1], twiddles[:-1], strict=True):
        w = _along(torch.view_as_complex(twiddle), axis).conj() / 2
        # At k = 0 both terms are the same one.
        mirrored = torch.cat(
            [torch.zeros_like(w.narrow(axis, 0, 1)), -1j * w.narrow(axis, 1, w.shape[axis] - 1)],
            axis,
        )
        c = _combined(c, axis, w * factor, mirrored * factor)
        factor = factor.new_ones(())
    c = c if len(axes) > 1 else c * factor
    shape = (*(c.shape[axis] for axis in axes[:-1]), last)
    return _reordered(torch.fft.irfftn(c, s=shape, dim=tuple(axes)), place)


def twiddle(size: int) -> Float[Tensor, "k 2"]:
    """``exp(-i pi k / 2N)`` as pairs of real numbers, float64."""
    angle = -math.pi / (2 * size) * torch.arange(size, dtype=torch.float64)
    return torch.stack((angle.cos(), angle.sin()), -1)


def slots(values: Float[Tensor, "..."]) -> Float[Tensor, "... 2"]:
    """Values at wavenumbers 0 to N - 1 of the last axis, at the real numbers of packed ones."""
    size = values.shape[-1]
    mirrored = torch.cat((values[..., :1], values[..., size - size // 2 :].flip(-1)), -1)
    return torch.stack((values[..., : size // 2 + 1], mirrored), -1)


def amplitudes(shape: Sequence[int]) -> Float[Tensor, "..."]:
    """Orthonormal coefficients over those of `packed_cosines`, float64."""
    product = torch.ones((), dtype=torch.float64)
    for size in shape:
        factor = torch.full((size,), math.sqrt(2 / size) / 2, dtype=torch.float64)
        factor[0] /= math.sqrt(2)
        product = product[..., None] * factor
    return 2 * product


def slot_energy(shape: Sequence[int]) -> Float[Tensor, "... 2"]:
    """Energy of a packed real number 1; the wavenumber N / 2 of the last axis is stored twice."""
    energy = slots(amplitudes(shape).square())
    if shape[-1] % 2 == 0:
        energy[..., -1, :] /= 2
    return energy


def unpack(c: Complex[Tensor, "..."], last: int) -> Float[Tensor, "..."]:
    """Packed coefficients as real ones of wavenumbers 0 to ``last - 1``."""
    reals = torch.view_as_real(c)
    mirrored = -reals[..., 1 : (last + 1) // 2, 1]
    return torch.cat((reals[..., 0], mirrored.flip(-1)), -1)


def pack(coefficients: Float[Tensor, "..."]) -> Complex[Tensor, "..."]:
    """The inverse of `unpack`."""
    reals = slots(coefficients)
    sign = reals.new_ones(reals.shape[-2:])
    sign[:, 1] = -1
    sign[0, 1] = 0
    return torch.view_as_complex(reals * sign)


def even_odd(shape: Sequence[int]) -> Int[Tensor, " points"]:
    """The reordering of all axes at once, as places in a field that is flat."""
    order = torch.zeros(1, dtype=torch.int32)
    for size in shape:
        along = torch.arange(size, dtype=torch.int32)
        along = torch.cat((along[::2], along[1::2].flip(0)))
        order = (order[:, None] * size + along).flatten()
    return order


def _reordered(x: Tensor, order: Tensor) -> Tensor:
    # In one pass; `index_select` is fast on two axes only.
    flat = x.reshape(-1, order.numel())
    return flat.index_select(1, order).reshape(x.shape)


def _along(values: Tensor, axis: int) -> Tensor:
    """A vector along one axis, counted from the end."""
    return values.reshape(-1, *[1] * (-axis - 1))


def _combined(c: Tensor, axis: int, here: Tensor, mirrored: Tensor) -> Tensor:
    """``here c_k + mirrored c_(-k)``, with k modulo the axis' length; in place where it may be."""
    size = c.shape[axis]
    other = c.index_select(axis, -torch.arange(size, device=c.device) % size)
    if torch.is_grad_enabled():
        return torch.addcmul(c * here, other, mirrored)
    return c.mul_(here).addcmul_(other, mirrored)
