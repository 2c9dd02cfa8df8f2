"""A Fourier layer without complex numbers: its few kept modes as real matrix products."""

from collections.abc import Sequence

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn


class RealSpectralConv(nn.Module):
    """A spectral convolution on one grid, as products with real matrices.

    Along each axis, ``h = E x``, ``y = E' (W h)``: E is the discrete Fourier transform at the kept
    frequencies only, E' the inverse, W a matrix over the channels of each mode. Along the last axis
    x is real, so that its frequencies are not negative and each stands for its conjugate too. With
    m of n frequencies an axis costs O(n m) instead of O(n log n), in operations that run fast on
    small grids and that every exporter knows.

    Args:
        weight: of each mode, over the channels.
        shape: sizes of the grid.
        read: for each axis, the frequency at which each mode reads.
        written: for each axis, the frequency at which each mode writes, by default the same.
        bias: added to the output; broadcasts against it.

    Example:
        >>> conv = RealSpectralConv(torch.ones(1, 1, 1, dtype=torch.cfloat), [8], [[1]])
        >>> turns = torch.arange(8) * torch.pi / 4
        >>> kept, lost = turns.cos().expand(1, 1, 8), (2 * turns).cos().expand(1, 1, 8)
        >>> [round(float((conv(wave) - kept).norm()), 5) for wave in (kept, lost + kept)]
        [0.0, 0.0]

    Source: Li et al., Fourier Neural Operator, ICLR 2021, equation 4.
    """

    def __init__(
        self,
        weight: Complex[Tensor, "c_in c_out *modes"],
        shape: Sequence[int],
        read: Sequence[Sequence[int]],
        written: Sequence[Sequence[int]] | None = None,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.modes = tuple(weight.shape[2:])
        self.register_buffer("bias", bias)
        # (modes, 2 c_in, 2 c_out): real and imaginary parts as channels.
        re, im = (part.flatten(2).permute(2, 0, 1) for part in (weight.real, weight.imag))
        rows = [torch.cat([re, im], dim=2), torch.cat([-im, re], dim=2)]
        self.register_buffer("weight", torch.cat(rows, dim=1).contiguous())
        pairs = list(zip(shape, read, written or read, strict=True))
        for axis, (n, of_input, of_output) in enumerate(pairs):
            last = axis == len(pairs) - 1
            to, _ = _waves(n, of_input)
            back, k = _waves(n, of_output)
            to, back = to.conj() / n, back.mT  # (n, modes), (modes, n)
            if last:
                # A frequency and its conjugate; those that are their own conjugate count once.
                back = back * torch.where((k == 0) | (2 * k == n), 1.0, 2.0)[:, None]
                to_real = torch.cat([to.real, to.imag], dim=1)
                back_real = torch.cat([back.real, -back.imag], dim=0)
            else:
                to_real, back_real = _as_real(to), _as_real(back)
            self.register_buffer(f"to_{axis}", to_real.to(weight.real.dtype))
            self.register_buffer(f"back_{axis}", back_real.to(weight.real.dtype))

    def forward(self, x: Float[Tensor, "batch c_in *shape"]) -> Float[Tensor, "batch c_out *shape"]:
        """Filter and mix the channels."""
        last = len(self.modes) - 1
        h = (x @ self.get_buffer(f"to_{last}")).unflatten(-1, (2, -1)).movedim(-2, 2)
        for axis in range(last):
            h = _along(h, axis, self.get_buffer(f"to_{axis}"))
        # (batch, c_in, 2, *modes) to (modes, batch, 2 c_in) and back.
        h = h.flatten(3).permute(3, 0, 2, 1).flatten(2) @ self.get_buffer("weight")
        h = h.unflatten(2, (2, -1)).permute(1, 3, 2, 0).unflatten(3, self.modes)
        for axis in range(last):
            h = _along(h, axis, self.get_buffer(f"back_{axis}"))
        y = h.movedim(2, -2).flatten(-2) @ self.get_buffer(f"back_{last}")
        return y if self.bias is None else y + self.bias


def _waves(n: int, frequencies: Sequence[int]) -> tuple[Tensor, Tensor]:
    """``exp(2 pi i k x / n)``, (n, modes), in complex128, and the frequencies k."""
    k = torch.as_tensor(frequencies, dtype=torch.long)
    # Reduced before the product with pi, which loses digits for large multiples.
    turns = (torch.arange(n)[:, None] * k) % n
    return torch.polar(torch.ones_like(turns).double(), 2 * torch.pi * turns.double() / n), k


def _as_real(matrix: Tensor) -> Tensor:
    """A complex matrix for rows of real parts, then imaginary parts."""
    top = torch.cat([matrix.real, matrix.imag], dim=1)
    return torch.cat([top, torch.cat([-matrix.imag, matrix.real], dim=1)], dim=0)


def _along(h: Tensor, axis: int, matrix: Tensor) -> Tensor:
    """Multiply a complex field, (batch, channels, 2, *axes), along one of its axes."""
    h = h.movedim((2, 3 + axis), (-2, -1)).flatten(-2) @ matrix
    return h.unflatten(-1, (2, -1)).movedim((-2, -1), (2, 3 + axis))
