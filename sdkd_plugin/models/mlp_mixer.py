"""MLPMixer, a student that reads the whole grid at once."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from sdkd_plugin._checks import check_shape, check_sizes, shown
from sdkd_plugin._explained import explained
from sdkd_plugin.models.blocks import Padding, channel_mlp, check_input, check_multiple, conv2d


class MixerBlock(nn.Module):
    """One MLP over the tokens of each channel, then one over the channels of each token.

    x = x + MLP_tokens(LayerNorm(x)),    x = x + MLP_channels(LayerNorm(x))
    """

    def __init__(self, tokens: int, channels: int, *, token_width: int, channel_width: int) -> None:
        super().__init__()
        self.token_norm = nn.LayerNorm(channels)
        # The last layer has no bias: it would add one number to all channels of a token, and the
        # layer normalisation after every block would subtract it.
        first, last = nn.Linear(tokens, token_width), nn.Linear(token_width, tokens, bias=False)
        self.token_mlp = nn.Sequential(first, nn.GELU(), last)
        self.channel_mlp = channel_mlp(channels, channel_width)

    def forward(self, x: Float[Tensor, "batch tokens c"]) -> Float[Tensor, "batch tokens c"]:
        """Mix over tokens, then over channels."""
        x = x + self.token_mlp(self.token_norm(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channel_mlp(x)


@explained
class MLPMixer(nn.Module):
    """Patches as tokens, mixed over space and over channels by MLPs in turn.

    Its weights over tokens belong to one grid, so it needs that grid's shape and runs on no other.
    Every token has weights of its own, so there is no ``coordinates`` option. One last 3x3
    convolution smooths the seams between patches; ``padding`` is its boundary rule. Its tap
    ``latent`` is the tokens after the last block, on their grid.

    Args:
        in_channels, out_channels: frames times variables, of the input and of the forecast.
        shape: the grid (nx, ny), multiples of ``patch``.
        patch: points of a patch along each axis.
        width: channels of a token. At depth 3 on a 64 x 64 grid, with 10 frames in and 10 out,
            13 make 20 thousand parameters and 434 make 5 million.
        depth: mixer blocks.
        mlp_ratio: hidden channels of the MLP over channels, over ``width``; the MLP over tokens
            has ``width / 2``, an eighth of that at the default, as in the paper's models.
        padding: the boundary rule, ``"periodic"``, ``"reflect"`` or ``"zeros"``.

    Raises:
        ValueError: for a size that is not positive, an unknown option, or a shape that is no
            multiple of ``patch``; from ``forward``, for other channels or another grid.

    Example:
        >>> import torch
        >>> student = MLPMixer(in_channels=10, out_channels=10, shape=(32, 32))
        >>> student(torch.zeros(2, 10, 32, 32)).shape
        torch.Size([2, 10, 32, 32])

    Source: Tolstikhin et al., NeurIPS 2021; a readout of patches in place of its classifier.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        shape: Sequence[int],
        patch: int = 4,
        width: int = 40,
        depth: int = 3,
        mlp_ratio: int = 4,
        padding: Padding = "periodic",
    ) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, out_channels=out_channels, patch=patch)
        check_sizes(width=width, depth=depth, mlp_ratio=mlp_ratio)
        if len(shape) != 2:
            raise ValueError(f"`shape` is {shown(tuple(shape))}, expected the two sizes (nx, ny).")
        for axis, n in enumerate(shape):
            check_sizes(**{f"shape[{axis}]": n})
            check_multiple(f"shape[{axis}]", n, patch, "`patch`: patches tile the grid")
        self.in_channels = in_channels
        self.shape = tuple(shape)
        self.tokens = tuple(n // patch for n in shape)
        widths = {"token_width": max(1, width // 2), "channel_width": mlp_ratio * width}
        self.embed = nn.Conv2d(in_channels, width, patch, stride=patch)
        n_tokens = self.tokens[0] * self.tokens[1]
        self.blocks = nn.Sequential(*(MixerBlock(n_tokens, width, **widths) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        # Tokens become a grid again only here, so this is where the latent can be tapped.
        self.latent = nn.Identity()
        self.unembed = nn.ConvTranspose2d(width, out_channels, patch, stride=patch)
        self.smooth = conv2d(out_channels, out_channels, 3, padding=padding)
        self.taps = {"latent": "latent"}

    def forward(self, x: Float[Tensor, "batch c_in nx ny"]) -> Float[Tensor, "batch c_out nx ny"]:
        """Forecast ``out_channels`` from ``in_channels`` fields on the grid ``shape``."""
        check_input(x, self.in_channels, smallest=1)
        check_shape("x", x.shape[2:], self.shape, "the grid the MLPMixer was built for")
        tokens = self.norm(self.blocks(self.embed(x).flatten(2).transpose(1, 2)))
        latent = self.latent(tokens.transpose(1, 2).unflatten(2, self.tokens))
        return self.smooth(self.unembed(latent))
