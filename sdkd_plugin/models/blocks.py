"""What the grid models share: padded convolutions, coarsening, refining, position, input checks.

Here live the parts that more than one grid model is built of. Attention lives with its model in
`stalternet`, translators in `simvp`; the graph models have parts of their own.
"""

import math
from itertools import pairwise
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sdkd_plugin._checks import check_choice

Padding = Literal["periodic", "reflect", "zeros"]

_ConvPadding = Literal["circular", "reflect", "zeros"]
_CONV_PADDING: dict[str, _ConvPadding] = {
    "periodic": "circular",
    "reflect": "reflect",
    "zeros": "zeros",
}
_PAD_MODE = {"periodic": "circular", "reflect": "reflect", "zeros": "constant"}


def check_padding(padding: str) -> None:
    """Refuse a boundary rule that is not a `Padding`."""
    check_choice("padding", padding, get_args(Padding))


def check_multiple(argument: str, got: int, divisor: int, why: str) -> None:
    """Refuse a size that is not a multiple of ``divisor``.

    Raises:
        ValueError: naming the argument, what it was, the divisor and ``why``.
    """
    if got % divisor:
        raise ValueError(f"`{argument}` is {got}, expected a multiple of {divisor} ({why}).")


def check_input(x: Tensor, channels: int, smallest: int) -> None:
    """Refuse a batch a model cannot take; part of every ``forward``, so it waits for no device.

    Raises:
        ValueError: if the channels are not ``channels``, or an axis is shorter than ``smallest``.
    """
    torch._check_value(
        x.shape[1] == channels,
        lambda: (
            f"`x` has {x.shape[1]} channels, expected {channels} (`in_channels`): "
            "frames and variables are folded into the channel axis."
        ),
    )
    torch._check_value(
        min(x.shape[2], x.shape[3]) >= smallest,
        lambda: (
            f"`x` has the grid {tuple(x.shape[2:])}, expected at least {smallest} points an axis; "
            "give a finer grid or build the model with fewer downsamplings."
        ),
    )


def group_norm(channels: int) -> nn.GroupNorm:
    """Group normalisation with at most 8 groups, of at least 4 channels each where there are 4.

    A group of one channel would subtract that channel's mean over the grid: frequency zero, which
    a forecast needs.
    """
    groups = max(g for g in range(1, 9) if channels % g == 0 and (g == 1 or channels // g >= 4))
    return nn.GroupNorm(groups, channels)


def conv2d(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    padding: Padding,
    stride: int = 1,
    groups: int = 1,
    dilation: int = 1,
    bias: bool = True,
) -> nn.Conv2d:
    """A convolution with an odd kernel; n points become ceil(n / stride)."""
    return nn.Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        stride=stride,
        padding=dilation * (kernel_size - 1) // 2,
        dilation=dilation,
        groups=groups,
        bias=bias,
        padding_mode=_CONV_PADDING[padding],
    )


def conv_block(
    in_channels: int,
    out_channels: int,
    kernel_size: int = 3,
    *,
    padding: Padding,
    stride: int = 1,
    groups: int = 1,
) -> nn.Sequential:
    """Convolution, group normalisation, GELU."""
    return nn.Sequential(
        conv2d(
            in_channels,
            out_channels,
            kernel_size,
            padding=padding,
            stride=stride,
            groups=groups,
            bias=False,
        ),
        group_norm(out_channels),
        nn.GELU(),
    )


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around the identity: ``x + conv(gelu(norm(conv(x))))``.

    Args:
        channels: channels in and out.
        padding: what lies beyond the boundary.

    Example:
        >>> ResidualBlock(8, padding="zeros")(torch.zeros(2, 8, 5, 6)).shape
        torch.Size([2, 8, 5, 6])
    """

    def __init__(self, channels: int, *, padding: Padding) -> None:
        super().__init__()
        self.expand = conv_block(channels, channels, padding=padding)
        self.project = conv2d(channels, channels, 3, padding=padding)

    def forward(self, x: Float[Tensor, "batch c nx ny"]) -> Float[Tensor, "batch c nx ny"]:
        """Return ``x`` plus what the two convolutions make of it."""
        return x + self.project(self.expand(x))


class LayerNorm2d(nn.Module):
    """Layer normalisation over the channels of each grid point.

    Args:
        channels: channels in and out.

    Example:
        >>> y = LayerNorm2d(4)(torch.arange(16.0).reshape(1, 4, 2, 2))
        >>> bool(y.mean(1).abs().max() < 1e-6)
        True
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Float[Tensor, "batch c nx ny"]) -> Float[Tensor, "batch c nx ny"]:
        """Normalise each point's channels to mean 0 and variance 1, then scale and shift."""
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


class Upsample(nn.Module):
    """Transposed convolution, twice as fine, that honours the boundary rule.

    ``nn.ConvTranspose2d`` knows zero padding only. Here one ring of the boundary's own points is
    laid around the input first, and what that ring makes outside the grid is cut off, so a
    periodic field stays periodic. The kernel of 4 covers every output point equally often at
    stride 2, which 3 does not (checkerboards).

    Args:
        in_channels: channels in.
        out_channels: channels out.
        padding: what lies beyond the boundary.

    Example:
        >>> up = Upsample(4, 2, padding="periodic")
        >>> up(torch.zeros(1, 4, 5, 8), (9, 16)).shape
        torch.Size([1, 2, 9, 16])
    """

    def __init__(self, in_channels: int, out_channels: int, *, padding: Padding) -> None:
        super().__init__()
        self.pad_mode = _PAD_MODE[padding]
        # Padding 3 = 1 of the plain stride-2 layer, plus the ring's 2 output points a side.
        self.conv = nn.ConvTranspose2d(
            in_channels, out_channels, 4, stride=2, padding=3, bias=False
        )
        self.norm = group_norm(out_channels)

    def forward(
        self, x: Float[Tensor, "batch c_in mx my"], shape: tuple[int, int]
    ) -> Float[Tensor, "batch c_out nx ny"]:
        """Return a field on the grid ``shape``, at most twice as fine as that of ``x``."""
        x = self.conv(F.pad(x, (1, 1, 1, 1), mode=self.pad_mode))
        return F.gelu(self.norm(x[..., : shape[0], : shape[1]]))


class Encoder(nn.Module):
    """One convolution at full resolution, then one strided convolution a level.

    Args:
        in_channels: channels in.
        widths: channels at full resolution and after each halving.
        padding: what lies beyond the boundary.

    Example:
        >>> latent, skip = Encoder(3, [8, 16], padding="zeros")(torch.zeros(1, 3, 9, 8))
        >>> latent.shape, skip.shape
        (torch.Size([1, 16, 5, 4]), torch.Size([1, 8, 9, 8]))
    """

    def __init__(self, in_channels: int, widths: list[int], *, padding: Padding) -> None:
        super().__init__()
        self.stem = conv_block(in_channels, widths[0], padding=padding)
        self.down = nn.Sequential(
            *(
                conv_block(fine, coarse, padding=padding, stride=2)
                for fine, coarse in pairwise(widths)
            )
        )

    def forward(
        self, x: Float[Tensor, "batch c_in nx ny"]
    ) -> tuple[Float[Tensor, "batch c_out mx my"], Float[Tensor, "batch c_skip nx ny"]]:
        """Return the coarse latent and the first layer's activation, the decoder's skip."""
        skip = self.stem(x)
        return self.down(skip), skip


class Decoder(nn.Module):
    """The encoder mirrored: transposed convolutions, the skip, and a pointwise readout.

    Args:
        widths: the encoder's ``widths``.
        out_channels: channels out.
        padding: what lies beyond the boundary.

    Example:
        >>> decoder = Decoder([8, 16], 3, padding="zeros")
        >>> decoder(torch.zeros(1, 16, 5, 4), torch.zeros(1, 8, 9, 8)).shape
        torch.Size([1, 3, 9, 8])
    """

    def __init__(self, widths: list[int], out_channels: int, *, padding: Padding) -> None:
        super().__init__()
        self.up = nn.ModuleList(
            Upsample(coarse, fine, padding=padding) for coarse, fine in pairwise(reversed(widths))
        )
        self.merge = conv_block(2 * widths[0], widths[0], padding=padding)
        self.readout = nn.Conv2d(widths[0], out_channels, 1)

    def forward(
        self,
        latent: Float[Tensor, "batch c_latent mx my"],
        skip: Float[Tensor, "batch c_skip nx ny"],
    ) -> Float[Tensor, "batch c_out nx ny"]:
        """Refine ``latent`` to the grid of ``skip`` and read the forecast off both."""
        shapes = [(skip.shape[2], skip.shape[3])]
        for _ in self.up:
            nx, ny = shapes[-1]
            shapes.append(((nx + 1) // 2, (ny + 1) // 2))
        x = latent
        for up, shape in zip(self.up, shapes[-2::-1], strict=True):
            x = up(x, shape)
        return self.readout(self.merge(torch.cat([x, skip], dim=1)))


def positions(n: int, like: Tensor, *, padding: Padding) -> Float[Tensor, " {n}"]:
    """Where the n points of an axis of length 1 lie, whatever the resolution.

    i / n on a periodic axis, (i + 1/2) / n on a bounded one: where the Fourier and the cosine
    basis of the spectral core sample theirs.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    index = torch.arange(n, device=like.device, dtype=dtype)
    return index / n if padding == "periodic" else (index + 0.5) / n


class AppendCoordinates(nn.Module):
    """Add channels that say where a point lies, the same at every resolution.

    cos 2πx, sin 2πx, cos 2πy, sin 2πy on a periodic grid, cos πx, cos πy on a bounded one.
    A periodic convolution cannot tell one place from another; an equation with a force that is
    fixed in space needs this.

    Args:
        padding: what lies beyond the boundary.

    Example:
        >>> AppendCoordinates("periodic")(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 7, 8, 8])
    """

    def __init__(self, padding: Padding) -> None:
        super().__init__()
        self.padding: Padding = padding
        self.channels = 4 if padding == "periodic" else 2

    def forward(self, x: Float[Tensor, "batch c nx ny"]) -> Float[Tensor, "batch c_out nx ny"]:
        """Return ``x`` with the coordinates' channels behind its own."""
        turn = 2 * math.pi if self.padding == "periodic" else math.pi
        columns = []
        for axis in (2, 3):
            angle = turn * positions(x.shape[axis], x, padding=self.padding)
            waves = [angle.cos(), angle.sin()] if self.padding == "periodic" else [angle.cos()]
            for wave in waves:
                wave = wave[:, None] if axis == 2 else wave
                columns.append(wave.expand(x.shape[2], x.shape[3]))
        grid = torch.stack(columns).to(x.dtype)
        return torch.cat([x, grid.expand(x.shape[0], -1, -1, -1)], dim=1)
