"""UNet, a student with several scales."""

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sdkd_plugin._checks import check_sizes
from sdkd_plugin._explained import explained
from sdkd_plugin.models.blocks import AppendCoordinates, Padding, check_input, conv_block


@explained
class UNet(nn.Module):
    """Convolutions on ever coarser grids and back, with a skip at every level.

    Each level has two 3x3 convolutions with group normalisation and GELU; each coarser level has
    half the grid and twice the channels. Any grid works, odd sizes too. On a periodic grid whose
    sizes are multiples of ``2**depth`` it commutes with shifts by that many points, unless
    ``coordinates`` is set. Its tap ``latent`` is the coarsest level.

    Args:
        in_channels, out_channels: frames times variables, of the input and of the forecast.
        width: channels at full resolution; the latent has ``width * 2**depth``. At depth 2, with
            10 frames in and 10 out, 6 make 17 thousand parameters and 106 make 5 million.
        depth: halvings of the grid.
        padding: the boundary rule, ``"periodic"``, ``"reflect"`` or ``"zeros"``.
        coordinates: whether the first layer also reads the coordinates of each point.

    Raises:
        ValueError: for a size that is not positive or an unknown option; from ``forward``, for
            other channels or too coarse a grid.

    Example:
        >>> student = UNet(in_channels=10, out_channels=10)
        >>> student(torch.zeros(2, 10, 33, 32)).shape
        torch.Size([2, 10, 33, 32])

    Source: Ronneberger et al., MICCAI 2015; strided convolutions instead of pooling, group
    instead of no normalisation.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        width: int = 12,
        depth: int = 2,
        padding: Padding = "periodic",
        coordinates: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, out_channels=out_channels, width=width, depth=depth)
        levels = list(pairwise(width * 2**level for level in range(depth + 1)))
        self.in_channels = in_channels
        self.smallest = 2**depth + 1
        self.locate = AppendCoordinates(padding, coordinates)

        def level(c_in: int, c_out: int, stride: int = 1) -> nn.Sequential:
            return nn.Sequential(
                conv_block(c_in, c_out, padding=padding, stride=stride),
                conv_block(c_out, c_out, padding=padding),
            )

        first = level(in_channels + self.locate.channels, width)
        self.down = nn.ModuleList([first, *(level(fine, coarse, 2) for fine, coarse in levels)])
        # Kernel 2 at stride 2 reads one coarse point for each fine one: no boundary to honour.
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(coarse, fine, 2, stride=2) for fine, coarse in reversed(levels)
        )
        self.merge = nn.ModuleList(level(2 * fine, fine) for fine, _ in reversed(levels))
        self.readout = nn.Conv2d(width, out_channels, 1)
        self.taps = {"latent": f"down.{depth}"}

    def forward(self, x: Float[Tensor, "batch c_in nx ny"]) -> Float[Tensor, "batch c_out nx ny"]:
        """Forecast ``out_channels`` from ``in_channels`` fields on the same grid."""
        check_input(x, self.in_channels, self.smallest)
        x = self.locate(x)
        skips = []
        for down in self.down:
            x = down(x)
            skips.append(x)
        for up, merge, skip in zip(self.up, self.merge, skips[-2::-1], strict=True):
            # Where the finer grid is odd, the coarse one covers a point more.
            x = up(x)[..., : skip.shape[2], : skip.shape[3]]
            x = merge(torch.cat([x, skip], dim=1))
        return self.readout(x)
