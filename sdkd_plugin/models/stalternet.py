"""STAlterNet, a teacher with separate branches for high and for low frequencies."""

import math
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sdkd_plugin._checks import check_choice, check_sizes
from sdkd_plugin._explained import explained
from sdkd_plugin.models.blocks import (
    AppendCoordinates,
    Decoder,
    Encoder,
    LayerNorm2d,
    Padding,
    ResidualBlock,
    channel_mlp,
    check_input,
    check_multiple,
    positions,
)

Order = Literal["parallel", "serial"]


def rotary_angles(
    nx: int, ny: int, head_width: int, like: Tensor, *, padding: Padding
) -> Float[Tensor, "tokens half"]:
    """Angles by which the queries and keys of each token are rotated.

    ``2π k x`` and ``2π k y`` on a periodic grid, ``π k x`` and ``π k y`` on a bounded one, with
    k = 0 ... head_width / 4 - 1 and x, y in [0, 1), at every resolution. The product of a query
    and a key depends on the difference of their angles, on a periodic grid the torus distance.
    """
    turn = 2 * math.pi if padding == "periodic" else math.pi
    x, y = (positions(n, like, padding=padding) for n in (nx, ny))
    wavenumbers = turn * torch.arange(head_width // 4, device=x.device, dtype=x.dtype)
    along_x = (x[:, None] * wavenumbers)[:, None].expand(nx, ny, -1)
    along_y = (y[:, None] * wavenumbers)[None].expand(nx, ny, -1)
    return torch.cat([along_x, along_y], dim=-1).flatten(0, 1)


def rotate(
    tokens: Float[Tensor, "batch heads tokens width"], angles: Float[Tensor, "tokens half"]
) -> Float[Tensor, "batch heads tokens width"]:
    """Rotate the pairs (i, i + width / 2) of each token's channels by that token's angles.

    Source: Su et al., RoFormer, 2021, equation 34; here with two axes.
    """
    cos, sin = angles.cos().to(tokens.dtype), angles.sin().to(tokens.dtype)
    first, second = tokens.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class AttentionBranch(nn.Module):
    """A Transformer layer over the latent positions, without the identity around its attention.

        a = Attention(LayerNorm(z)),    z_low = a + MLP(LayerNorm(a))

    Softmax attention averages over positions, a low-pass filter (Park & Kim 2022); an identity
    would pass every frequency.
    """

    def __init__(self, channels: int, *, heads: int, mlp_ratio: int, padding: Padding) -> None:
        super().__init__()
        self.heads = heads
        self.padding: Padding = padding
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.project = nn.Linear(channels, channels)
        self.mlp = channel_mlp(channels, mlp_ratio * channels)

    def forward(self, z: Float[Tensor, "batch c nx ny"]) -> Float[Tensor, "batch c nx ny"]:
        """Return the low-frequency part of the latent's evolution."""
        batch, channels, nx, ny = z.shape
        head_width = channels // self.heads
        tokens = self.norm(z.flatten(2).transpose(1, 2))
        qkv = self.qkv(tokens).reshape(batch, nx * ny, 3, self.heads, head_width)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        angles = rotary_angles(nx, ny, head_width, z, padding=self.padding)
        mixed = F.scaled_dot_product_attention(rotate(query, angles), rotate(key, angles), value)
        a = self.project(mixed.transpose(1, 2).reshape(batch, nx * ny, channels))
        a = a + self.mlp(a)
        return a.transpose(1, 2).reshape(batch, channels, nx, ny)


class EvolutionBlock(nn.Module):
    """One step of latent evolution: a convolution branch, an attention branch, and their fusion.

    parallel:  z_high = z + Conv(z),  z_low = Transformer(z),       LayerNorm(z_high + z_low)
    serial:    z_high = z + Conv(z),  z_low = Transformer(z_high),  LayerNorm(z_high + z_low)
    """

    def __init__(
        self, channels: int, *, heads: int, mlp_ratio: int, order: Order, padding: Padding
    ) -> None:
        super().__init__()
        self.order = order
        self.convolution = ResidualBlock(channels, padding=padding)
        branch = AttentionBranch(channels, heads=heads, mlp_ratio=mlp_ratio, padding=padding)
        self.attention = branch
        self.norm = LayerNorm2d(channels)

    def forward(self, z: Float[Tensor, "batch c nx ny"]) -> Float[Tensor, "batch c nx ny"]:
        """Return the latent one block later."""
        high = self.convolution(z)
        low = self.attention(z if self.order == "parallel" else high)
        return self.norm(high + low)


@explained
class STAlterNet(nn.Module):
    """Encoder, latent evolution with separate high and low frequency branches, decoder.

    The encoder halves the grid ``n_downsampling`` times and doubles the channels each time;
    ``depth`` blocks (`EvolutionBlock`) evolve the latent; transposed convolutions decode it,
    with a skip from the encoder's first layer. Runs at any resolution, also at others than it
    was trained at. On a periodic grid it commutes with shifts by ``2**n_downsampling`` points,
    unless ``coordinates`` is set. Taps are of the last block: ``latent``, and its branches
    ``latent_high`` and ``latent_low``.

    Args:
        in_channels, out_channels: frames times variables, of the input and of the forecast.
        width: channels at full resolution; the latent has ``width * 2**n_downsampling``.
        depth: latent evolution blocks.
        heads: attention heads; the latent's channels over the heads are a multiple of 4.
        n_downsampling: halvings of the grid. Attention costs the square of the latent points.
        mlp_ratio: hidden channels of the Transformers' MLPs over the latent's channels.
        order: ``"parallel"``, both branches on the same latent, as the paper's text has it, or
            ``"serial"``, convolution then attention, as AlterNet's stages are.
        padding: the boundary rule, ``"periodic"``, ``"reflect"`` or ``"zeros"``.
        coordinates: whether the encoder also reads the coordinates of each point.

    Raises:
        ValueError: for a size that is not positive, an unknown option, or channels that are no
            multiple of ``4 * heads``; from ``forward``, for other channels or too coarse a grid.

    Example:
        >>> teacher = STAlterNet(in_channels=10, out_channels=10, width=8, depth=2)
        >>> teacher(torch.zeros(2, 10, 32, 32)).shape
        torch.Size([2, 10, 32, 32])
        >>> teacher.taps["latent_low"]
        'blocks.1.attention'

    Source: Li et al., SDKD, arXiv 2507.02939, section 3 (structure and fusion; it prints no
    widths, ours are our own choice); Park & Kim, ICLR 2022, for the branches' filters.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        width: int = 32,
        depth: int = 4,
        heads: int = 4,
        n_downsampling: int = 2,
        mlp_ratio: int = 2,
        order: Order = "parallel",
        padding: Padding = "periodic",
        coordinates: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, out_channels=out_channels, width=width, depth=depth)
        check_sizes(heads=heads, n_downsampling=n_downsampling, mlp_ratio=mlp_ratio)
        check_choice("order", order, get_args(Order))
        widths = [width * 2**level for level in range(n_downsampling + 1)]
        why = "4 * `heads`: each head rotates pairs of channels by two coordinates"
        check_multiple("width * 2**n_downsampling", widths[-1], 4 * heads, why)
        self.in_channels = in_channels
        self.smallest = 2**n_downsampling + 1
        self.locate = AppendCoordinates(padding, coordinates)
        self.encoder = Encoder(in_channels + self.locate.channels, widths, padding=padding)
        shared: dict[str, Any] = {"heads": heads, "mlp_ratio": mlp_ratio, "padding": padding}
        blocks = [EvolutionBlock(widths[-1], order=order, **shared) for _ in range(depth)]
        self.blocks = nn.Sequential(*blocks)
        self.decoder = Decoder(widths, out_channels, padding=padding)
        parts = {"latent": "norm", "latent_high": "convolution", "latent_low": "attention"}
        self.taps = {tap: f"blocks.{depth - 1}.{part}" for tap, part in parts.items()}

    def forward(self, x: Float[Tensor, "batch c_in nx ny"]) -> Float[Tensor, "batch c_out nx ny"]:
        """Forecast ``out_channels`` from ``in_channels`` fields on the same grid."""
        check_input(x, self.in_channels, self.smallest)
        latent, skip = self.encoder(self.locate(x))
        return self.decoder(self.blocks(latent), skip)
