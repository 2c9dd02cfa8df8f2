"""MLPMixer, the student that sees the whole grid at once, without convolution over positions.

Here lives the model alone; the one convolution over its seams is built by `blocks`.
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from sdkd_plugin._checks import check_positive_int, check_shape
from sdkd_plugin.models.blocks import Padding, check_input, check_multiple, check_padding, conv2d


class MixerBlock(nn.Module):
    """One MLP over the tokens of each channel, then one over the channels of each token.

        x = x + MLP_tokens(LayerNorm(x)),    x = x + MLP_channels(LayerNorm(x))

    Args:
        tokens: tokens in and out.
        channels: channels in and out.
        token_width: hidden width of the MLP over tokens.
        channel_width: hidden width of the MLP over channels.

    Example:
        >>> import torch
        >>> MixerBlock(16, 8, token_width=4, channel_width=32)(torch.zeros(2, 16, 8)).shape
        torch.Size([2, 16, 8])
    """

    def __init__(self, tokens: int, channels: int, *, token_width: int, channel_width: int) -> None:
        super().__init__()
        self.token_norm = nn.LayerNorm(channels)
        # No bias at the end: it would add one number to all channels of a token, which the
        # layer normalisation behind every block takes away again.
        self.token_mlp = nn.Sequential(
            nn.Linear(tokens, token_width),
            nn.GELU(),
            nn.Linear(token_width, tokens, bias=False),
        )
        self.channel_mlp = nn.Sequential(
            nn.LayerNorm(channels),
            nn.Linear(channels, channel_width),
            nn.GELU(),
            nn.Linear(channel_width, channels),
        )

    def forward(self, x: Float[Tensor, "batch tokens c"]) -> Float[Tensor, "batch tokens c"]:
        """Mix over tokens, then over channels."""
        x = x + self.token_mlp(self.token_norm(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channel_mlp(x)


class MLPMixer(nn.Module):
    """Patches as tokens, mixed over space and over channels by MLPs in turn.

    Its weights over tokens belong to one grid, so it needs that grid's shape, runs on no other,
    and knows where each point lies: it has no ``coordinates`` option. ``padding`` is the rule of
    one last 3x3 convolution that smooths the seams between patches.

    Args:
        in_channels: input frames times variables.
        out_channels: forecast frames times variables.
        shape: the grid (nx, ny), multiples of ``patch``.
        patch: points of a patch along each axis.
        width: channels of a token. At depth 3 on a 64 x 64 grid, with 10 frames in and 10 out,
            13 is 20 thousand parameters and 434 is 5 million.
        depth: mixer blocks.
        mlp_ratio: hidden channels of the MLP over channels, over ``width``; the MLP over tokens
            has ``width / 2``, an eighth of that at the default, as in the paper's models.
        padding: what lies beyond the boundary.

    Raises:
        ValueError: for a size that is not positive, an unknown option, or a shape that patches
            do not tile; from ``forward``, for other channels or another grid.

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
        check_positive_int("in_channels", in_channels)
        check_positive_int("out_channels", out_channels)
        check_positive_int("patch", patch)
        check_positive_int("width", width)
        check_positive_int("depth", depth)
        check_positive_int("mlp_ratio", mlp_ratio)
        check_padding(padding)
        if len(shape) != 2:
            raise ValueError(f"`shape` is {tuple(shape)!r}, expected the two sizes (nx, ny).")
        for axis, n in enumerate(shape):
            check_positive_int(f"shape[{axis}]", n)
            check_multiple(f"shape[{axis}]", n, patch, "`patch`: patches tile the grid")
        self.in_channels = in_channels
        self.shape = tuple(shape)
        self.tokens = tuple(n // patch for n in shape)
        self.embed = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.blocks = nn.Sequential(
            *(
                MixerBlock(
                    self.tokens[0] * self.tokens[1],
                    width,
                    token_width=max(1, width // 2),
                    channel_width=mlp_ratio * width,
                )
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(width)
        # Tokens become a grid again only here, so this is where the latent can be tapped.
        self.latent = nn.Identity()
        self.unembed = nn.ConvTranspose2d(width, out_channels, patch, stride=patch)
        self.smooth = conv2d(out_channels, out_channels, 3, padding=padding)

    @property
    def taps(self) -> dict[str, str]:
        """The tokens after the last block, on their grid: tap name to module path."""
        return {"latent": "latent"}

    def forward(
        self, x: Float[Tensor, "batch in_channels nx ny"]
    ) -> Float[Tensor, "batch out_channels nx ny"]:
        """Forecast ``out_channels`` from ``in_channels`` fields on the grid ``shape``."""
        check_input(x, self.in_channels, smallest=1)
        check_shape("x", x.shape[2:], self.shape, "the grid the MLPMixer was built for")
        tokens = self.norm(self.blocks(self.embed(x).flatten(2).transpose(1, 2)))
        latent = self.latent(tokens.transpose(1, 2).unflatten(2, self.tokens))
        return self.smooth(self.unembed(latent))
