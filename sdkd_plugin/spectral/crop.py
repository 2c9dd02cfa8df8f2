"""Fields of two resolutions, brought to the frequencies that both have."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from sdkd_plugin.spectral.grid import GridTransform


def shared_grid(first: GridTransform, second: GridTransform) -> GridTransform:
    """The grid that carries exactly the frequencies which two grids both have.

    Along an axis of N and M points, N > M, these are the wavenumbers

        periodic: |k| < M / 2, a grid of M points for odd M and of M - 1 for even M
        reflect:  k < M, a grid of M points

    A coarse even periodic axis loses its Nyquist wavenumber M / 2: its samples cannot tell the
    waves k and -k of the finer axis apart. Axes of one size keep all.

    Raises:
        ValueError: if the grids' numbers of axes or boundaries differ.

    Example:
        >>> shared_grid(GridTransform((16, 32)), GridTransform((16, 24))).shape
        (16, 23)
    """
    if len(first.shape) != len(second.shape) or first.boundary != second.boundary:
        raise ValueError(
            f"`second` has the shape {second.shape} and the boundary {second.boundary!r}, "
            f"expected as many axes as {first.shape} and the boundary {first.boundary!r}: only "
            "grids of one domain share frequencies."
        )
    sizes = []
    for n, m in zip(first.shape, second.shape, strict=True):
        coarse = min(n, m)
        ambiguous = first.boundary == "periodic" and n != m and coarse % 2 == 0
        sizes.append(coarse - 1 if ambiguous else coarse)
    return GridTransform(sizes, first.boundary)


def crop_frequencies(
    x: Float[Tensor, "..."], source: GridTransform, target: GridTransform
) -> Float[Tensor, "..."]:
    """Fields on a coarser grid that carries a part of their frequencies; the others are dropped.

    Formula: ``y_hat_k = sqrt(prod_i M_i / N_i) x_hat_k`` for the wavenumbers k of the target's
    axes of M_i points, the source's having N_i. With this factor of orthonormal transforms a field
    without higher frequencies keeps its values: both grids sample one continuous function, at
    ``j / N`` where periodic and at the cells' centres ``(j + 1/2) / N`` where reflecting.

    Args:
        x: fields ``(..., *source.shape)``.
        source: their grid.
        target: the coarser grid, as `shared_grid` finds it.

    Raises:
        ValueError: if ``x`` does not lie on the source, the target is of another boundary or number
            of axes, an axis is finer than the source's, or it is periodic, coarser and even: its
            Nyquist wavenumber would be ambiguous.

    Example:
        >>> wave = lambda n: torch.cos(2 * torch.pi * 3 * torch.arange(n) / n)
        >>> coarse = crop_frequencies(wave(16), GridTransform((16,)), GridTransform((9,)))
        >>> torch.allclose(coarse, wave(9), atol=1e-6)
        True
    """
    _check_target(source, target)
    if source.shape == target.shape:
        return x
    c = source(x)
    for axis, size in zip(target.domain_axes, target.shape, strict=True):
        if source.boundary == "reflect":
            c = c.narrow(axis, 0, size)
        elif axis == -1:
            # A one-sided real FFT holds no negative wavenumbers along the last axis.
            c = c.narrow(axis, 0, size // 2 + 1)
        elif size != c.shape[axis]:
            last = c.narrow(axis, c.shape[axis] - size // 2, size // 2)
            c = torch.cat([c.narrow(axis, 0, size - size // 2), last], dim=axis)
    scale = math.sqrt(math.prod(target.shape) / math.prod(source.shape))
    return target.inverse(c * scale).to(x.dtype)


def resample_frequencies(
    x: Float[Tensor, "..."], source: GridTransform, target: GridTransform
) -> Float[Tensor, "..."]:
    """Fields on any grid, with the frequencies that both grids have and no others.

    Formula: `crop_frequencies` to `shared_grid`; then the spectrum is filled up with zeros to the
    target's, with the inverse of that factor. Arguments and errors are as there.

    Example:
        >>> wave = lambda n: torch.cos(2 * torch.pi * 3 * torch.arange(n) / n)
        >>> fine = resample_frequencies(wave(16), GridTransform((16,)), GridTransform((24,)))
        >>> torch.allclose(fine, wave(24), atol=1e-5)
        True
    """
    shared = shared_grid(source, target)
    cropped = crop_frequencies(x, source, shared)
    if shared.shape == target.shape:
        return cropped
    c = shared(cropped)
    for axis, size in zip(target.domain_axes, target.shape, strict=True):
        one_sided = target.boundary == "periodic" and axis == -1
        missing = (size // 2 + 1 if one_sided else size) - c.shape[axis]
        if missing:
            # Behind the highest wavenumber; on a two-sided axis the negative ones come after it.
            two_sided = target.boundary == "periodic" and not one_sided
            negative = c.shape[axis] // 2 if two_sided else 0
            first, last = c.split([c.shape[axis] - negative, negative], axis)
            shape = list(c.shape)
            shape[axis] = missing
            c = torch.cat([first, c.new_zeros(shape), last], dim=axis)
    scale = math.sqrt(math.prod(target.shape) / math.prod(shared.shape))
    return target.inverse(c * scale).to(x.dtype)


def complete_frequencies(
    x: Float[Tensor, "..."],
    rest: Float[Tensor, "..."],
    source: GridTransform,
    target: GridTransform,
) -> Float[Tensor, "..."]:
    """Fields on another grid, with the frequencies they lack there taken from other fields.

    Formula: ``P x + (1 - P) rest``, P the projection on the frequencies that both grids have. So
    the difference to ``rest`` is 0 at frequencies that ``x`` does not have.

    Args:
        x: fields ``(..., *source.shape)``.
        rest: fields ``(..., *target.shape)``.
        source: the grid of ``x``.
        target: the grid of ``rest`` and of what is returned.

    Example:
        >>> grids = GridTransform((8,)), GridTransform((16,))
        >>> x, rest = torch.ones(8), torch.cos(2 * torch.pi * 5 * torch.arange(16) / 16)
        >>> torch.allclose(complete_frequencies(x, rest, *grids), 1 + rest, atol=1e-6)
        True
    """
    shared = shared_grid(source, target)
    known = resample_frequencies(crop_frequencies(rest, target, shared), shared, target)
    return rest - known + resample_frequencies(x, source, target).to(rest.dtype)


def _check_target(source: GridTransform, target: GridTransform) -> None:
    same_kind = len(source.shape) == len(target.shape) and source.boundary == target.boundary
    if not same_kind or any(m > n for m, n in zip(target.shape, source.shape, strict=True)):
        raise ValueError(
            f"`target` has the shape {target.shape} and the boundary {target.boundary!r}, expected "
            f"a grid no finer than {source.shape} along each axis, with the boundary "
            f"{source.boundary!r}."
        )
    for m, n in zip(target.shape, source.shape, strict=True):
        if target.boundary == "periodic" and m < n and m % 2 == 0:
            raise ValueError(
                f"`target` has an axis of {m} points, expected an odd number or the source's "
                f"{n}: the Nyquist wavenumber {m // 2} of a coarser even axis is ambiguous; "
                f"take {m - 1} points."
            )
