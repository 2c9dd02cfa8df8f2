"""ResNet, a student of residual blocks at one resolution."""

from jaxtyping import Float
from torch import Tensor, nn

from sdkd_plugin._checks import check_sizes
from sdkd_plugin._explained import explained
from sdkd_plugin.models.blocks import (
    AppendCoordinates,
    Padding,
    ResidualBlock,
    Upsample,
    check_input,
    conv_block,
)


@explained
class ResNet(nn.Module):
    """A convolution, residual blocks, a readout; at full resolution or once downsampled.

    Any grid works, odd sizes too. On a periodic grid it commutes with shifts (downsampled: by 2
    points, on even sizes), unless ``coordinates`` is set. Its tap ``latent`` is the last block.

    Args:
        in_channels, out_channels: frames times variables, of the input and of the forecast.
        width: channels of all hidden layers. At depth 4 and downsampled, with 10 frames in and 10
            out, 14 make 19 thousand parameters and 238 make 5 million.
        depth: residual blocks.
        downsample: whether the blocks run on half the grid, at about a quarter of the cost and
            with twice the receptive field.
        padding: the boundary rule, ``"periodic"``, ``"reflect"`` or ``"zeros"``.
        coordinates: whether the first layer also reads the coordinates of each point.

    Raises:
        ValueError: for a size that is not positive or an unknown option; from ``forward``, for
            other channels or too coarse a grid.

    Example:
        >>> import torch
        >>> student = ResNet(in_channels=10, out_channels=10)
        >>> student(torch.zeros(2, 10, 33, 32)).shape
        torch.Size([2, 10, 33, 32])

    Source: He et al., CVPR 2016; group instead of batch normalisation.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        width: int = 28,
        depth: int = 4,
        downsample: bool = True,
        padding: Padding = "periodic",
        coordinates: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, out_channels=out_channels, width=width, depth=depth)
        self.in_channels = in_channels
        self.smallest = 3 if downsample else 2
        self.locate = AppendCoordinates(padding, coordinates)
        seen = in_channels + self.locate.channels
        self.stem = conv_block(seen, width, padding=padding, stride=2 if downsample else 1)
        self.blocks = nn.Sequential(*(ResidualBlock(width, padding=padding) for _ in range(depth)))
        self.up = Upsample(width, width, padding=padding) if downsample else None
        self.readout = nn.Conv2d(width, out_channels, 1)
        self.taps = {"latent": "blocks"}

    def forward(self, x: Float[Tensor, "batch c_in nx ny"]) -> Float[Tensor, "batch c_out nx ny"]:
        """Forecast ``out_channels`` from ``in_channels`` fields on the same grid."""
        check_input(x, self.in_channels, self.smallest)
        shape = (x.shape[2], x.shape[3])
        x = self.blocks(self.stem(self.locate(x)))
        return self.readout(self.up(x, shape) if self.up else x)
