"""From the student's channels to the teacher's, for latents of different width."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sdkd_plugin._checks import check_positive_int


class ChannelProjector(nn.Module):
    """A linear map of the channels at every place, that is a 1x1 convolution on any domain.

    It is trained with the student and dropped with the distiller. Its weights start orthogonal
    (an isometry as far as the widths allow) and are drawn from a generator of their own: making a
    projector leaves torch's random state as it is.

    Args:
        in_channels: the student's.
        out_channels: the teacher's.
        channel_axis: where the channels are, counted from the end.
        seed: of the weights.

    Raises:
        ValueError: if a number of channels is not a positive integer.

    Example:
        >>> ChannelProjector(4, 7, channel_axis=-3)(torch.randn(2, 4, 8, 8)).shape
        torch.Size([2, 7, 8, 8])
    """

    def __init__(
        self, in_channels: int, out_channels: int, channel_axis: int, seed: int = 0
    ) -> None:
        super().__init__()
        check_positive_int("in_channels", in_channels)
        check_positive_int("out_channels", out_channels)
        self.channel_axis = channel_axis
        self.linear = nn.utils.skip_init(nn.Linear, in_channels, out_channels)
        generator = torch.Generator().manual_seed(seed)
        nn.init.orthogonal_(self.linear.weight, generator=generator)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Map the channels of ``x``."""
        return self.linear(x.movedim(self.channel_axis, -1)).movedim(-1, self.channel_axis)
