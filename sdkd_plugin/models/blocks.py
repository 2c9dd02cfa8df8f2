"""What the grid models share: convolutions, encoder and decoder, coordinates, checks of inputs."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sdkd_plugin._checks import check_choice, check_type

Padding = Literal["periodic", "reflect", "zeros"]

# Torch's names of them, as a mode of `nn.Conv2d` and of `F.pad`.
_CONV_MODE = {"periodic": "circular", "reflect": "reflect", "zeros": "zeros"}
_PAD_MODE = {"periodic": "circular", "reflect": "reflect", "zeros": "constant"}


def check_multiple(argument: str, got: int, divisor: int, why: str) -> None:
    """Refuse a size that is not a multiple of ``divisor``."""
    if got % divisor:
        raise ValueError(f"`{argument}` is {got}, expected a multiple of {divisor} ({why}).")


def check_input(x: Tensor, channels: int, smallest: int) -> None:
    """Refuse an input of a wrong shape; every ``forward`` calls it, so it waits for no device."""
    if not isinstance(x, Tensor):
        check_type("x", x, Tensor, "a batch of fields")
    # NumPy's integers compare to NumPy's bools.
    torch._check_value(
        x.ndim == 4 and x.shape[1] == int(channels),
        lambda: (
            f"`x` has shape {tuple(x.shape)}, expected (batch, {channels}, nx, ny): frames times "
            "variables are its channels, `in_channels`."
        ),
    )
    torch._check_value(
        min(x.shape[2], x.shape[3]) >= int(smallest),
        lambda: (
            f"`x` has the grid {tuple(x.shape[2:])}, expected at least {smallest} points an axis; "
            "give a finer grid or build the model with fewer downsamplings."
        ),
    )


def group_norm(channels: int) -> nn.GroupNorm:
    """Group normalisation with at most 8 groups, of at least 4 channels each where there are 4."""
    # One channel alone would lose its mean over the grid, frequency zero, which a forecast needs.
    groups = max(g for g in range(1, 9) if channels % g == 0 and (g == 1 or channels // g >= 4))
    return nn.GroupNorm(groups, channels)


def conv2d(
    c_in: int, c_out: int, kernel: int, *, padding: Padding, dilation: int = 1, **options: Any
) -> nn.Conv2d:
    """A convolution with an odd kernel; n points become ceil(n / stride). It checks ``padding``."""
    check_choice("padding", padding, get_args(Padding))
    reach = dilation * (kernel - 1) // 2
    options |= {"dilation": dilation, "padding_mode": _CONV_MODE[padding]}
    return nn.Conv2d(c_in, c_out, kernel, padding=reach, **options)


def conv_block(
    c_in: int, c_out: int, kernel: int = 3, *, padding: Padding, **options: int
) -> nn.Sequential:
    """Convolution, group normalisation, GELU."""
    convolution = conv2d(c_in, c_out, kernel, padding=padding, bias=False, **options)
    return nn.Sequential(convolution, group_norm(c_out), nn.GELU())


def channel_mlp(channels: int, hidden: int) -> nn.Sequential:
    """Layer normalisation and an MLP over the last axis."""
    first, last = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
    return nn.Sequential(nn.LayerNorm(channels), first, nn.GELU(), last)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around the identity: ``x + conv(gelu(norm(conv(x))))``."""

    def __init__(self, channels: int, *, padding: Padding) -> None:
        super().__init__()
        self.expand = conv_block(channels, channels, padding=padding)
        self.project = conv2d(channels, channels, 3, padding=padding)

    def forward(self, x: Float[Tensor, "batch c nx ny"]) -> Float[Tensor, "batch c nx ny"]:
        """Add the convolutions' output to ``x``."""
        return x + self.project(self.expand(x))


class LayerNorm2d(nn.Module):
    """Layer normalisation over the channels of each grid point."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Float[Tensor, "batch c nx ny"]) -> Float[Tensor, "batch c nx ny"]:
        """Normalise the channels of each point."""
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


class Upsample(nn.Module):
    """A transposed convolution that doubles the resolution and keeps the boundary rule.

    ``nn.ConvTranspose2d`` knows zero padding only, so the input is padded by one ring of points
    of the boundary rule, and the ring's output is cut off. A kernel of 4 covers every output
    point equally often at stride 2; a kernel of 3 would leave a checkerboard.
    """

    def __init__(self, c_in: int, c_out: int, *, padding: Padding) -> None:
        super().__init__()
        self.pad_mode = _PAD_MODE[padding]
        # Padding 3 = 1 of the plain stride-2 layer, plus the ring's 2 output points a side.
        self.conv = nn.ConvTranspose2d(c_in, c_out, 4, stride=2, padding=3, bias=False)
        self.norm = group_norm(c_out)

    def forward(
        self, x: Float[Tensor, "batch c_in mx my"], shape: Sequence[int]
    ) -> Float[Tensor, "batch c_out nx ny"]:
        """Return a field on the grid ``shape``, at most twice as fine as that of ``x``."""
        x = self.conv(F.pad(x, (1, 1, 1, 1), mode=self.pad_mode))
        return F.gelu(self.norm(x[..., : shape[0], : shape[1]]))


class Encoder(nn.Module):
    """One convolution at full resolution, then one strided convolution a level.

    ``widths`` are the channels at full resolution and after each halving of the grid.
    """

    def __init__(self, in_channels: int, widths: list[int], *, padding: Padding) -> None:
        super().__init__()
        self.stem = conv_block(in_channels, widths[0], padding=padding)
        down = [conv_block(a, b, padding=padding, stride=2) for a, b in pairwise(widths)]
        self.down = nn.Sequential(*down)

    def forward(
        self, x: Float[Tensor, "batch c_in nx ny"]
    ) -> tuple[Float[Tensor, "batch c_out mx my"], Float[Tensor, "batch c_skip nx ny"]]:
        """Return the coarse latent and the first layer's activation, the decoder's skip."""
        skip = self.stem(x)
        return self.down(skip), skip


class Decoder(nn.Module):
    """The encoder with its ``widths`` mirrored, then the skip and a pointwise readout."""

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
        """Refine ``latent`` to the grid of ``skip`` and compute the forecast from both."""
        for level, up in zip(reversed(range(len(self.up))), self.up, strict=True):
            coarser = 2**level
            latent = up(latent, [(n + coarser - 1) // coarser for n in skip.shape[2:]])
        return self.readout(self.merge(torch.cat([latent, skip], dim=1)))


def positions(n: int, like: Tensor, *, padding: Padding) -> Float[Tensor, " {n}"]:
    """Coordinates of n points on an axis of length 1, where the domain's basis has its samples.

    i / n on a periodic axis (Fourier), (i + 1/2) / n on a bounded one (cosine).
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    index = torch.arange(n, device=like.device, dtype=dtype)
    return index / n if padding == "periodic" else (index + 0.5) / n


class AppendCoordinates(nn.Module):
    """Append the coordinates of each point as channels, the same at every resolution.

    cos 2πx, sin 2πx, cos 2πy, sin 2πy on a periodic grid; cos πx, cos πy on a bounded one. They
    let a periodic convolution tell places apart, as a force that is fixed in space needs. Without
    ``append`` the input passes unchanged.
    """

    def __init__(self, padding: Padding, append: bool = True) -> None:
        super().__init__()
        self.padding: Padding = padding
        self.channels = (4 if padding == "periodic" else 2) if append else 0

    def forward(self, x: Float[Tensor, "batch c nx ny"]) -> Float[Tensor, "batch c_out nx ny"]:
        """Return ``x``, then the coordinates."""
        if not self.channels:
            return x
        turn = 2 * math.pi if self.padding == "periodic" else math.pi
        columns = []
        for n, shape in zip(x.shape[2:], ((-1, 1), (1, -1)), strict=True):
            angle = turn * positions(n, x, padding=self.padding)
            waves = [angle.cos(), angle.sin()][: self.channels // 2]
            columns += [wave.view(shape).expand(x.shape[2:]) for wave in waves]
        grid = torch.stack(columns).to(x.dtype)
        return torch.cat([x, grid.expand(x.shape[0], -1, -1, -1)], dim=1)
