"""SimVP, a teacher that encodes each frame alone and translates all frames at once."""

import math
from functools import partial, reduce
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sdkd_plugin._checks import check_choice, check_sizes
from sdkd_plugin._explained import explained
from sdkd_plugin.models.blocks import (
    AppendCoordinates,
    Decoder,
    Encoder,
    Padding,
    check_input,
    check_multiple,
    conv2d,
    conv_block,
    group_norm,
)

Translator = Literal["inception", "gated"]

_KERNELS, _GROUPS = (3, 5, 7, 11), 8  # of inception
# A kernel of about 15 as a local one and a dilated one. SimVP v2 uses 21 (5, and 7 at dilation
# 3), which needs a latent grid of 10 points an axis; 15 runs on the 8 of a 32 x 32 field.
_GATED_LOCAL, _GATED_WIDE, _GATED_DILATION = 5, 5, 3


class InceptionBlock(nn.Module):
    """The sum of grouped convolutions of several kernel sizes, after a pointwise one.

    Source: Gao et al., SimVP, CVPR 2022, section 3.3.
    """

    def __init__(self, c_in: int, hidden: int, c_out: int, *, padding: Padding) -> None:
        super().__init__()
        groups = math.gcd(_GROUPS, hidden, c_out)
        self.mix = nn.Conv2d(c_in, hidden, 1)
        self.branches = nn.ModuleList(
            conv_block(hidden, c_out, n, padding=padding, groups=groups) for n in _KERNELS
        )

    def forward(self, z: Float[Tensor, "batch c_in nx ny"]) -> Float[Tensor, "batch c_out nx ny"]:
        """Return the sum of the branches."""
        z = self.mix(z)
        return reduce(torch.add, (branch(z) for branch in self.branches))


class InceptionTranslator(nn.Module):
    """A U of inception blocks at one resolution: ``depth`` down, ``depth`` up, skips between."""

    def __init__(
        self, in_channels: int, out_channels: int, *, width: int, depth: int, padding: Padding
    ) -> None:
        super().__init__()

        def block(c_in: int, c_out: int) -> InceptionBlock:
            return InceptionBlock(c_in, max(1, width // 2), c_out, padding=padding)

        self.first = nn.ModuleList(block(width if i else in_channels, width) for i in range(depth))
        self.second = nn.ModuleList(
            block(2 * width if i else width, width if i < depth - 1 else out_channels)
            for i in range(depth)
        )

    def forward(self, z: Float[Tensor, "batch c_in nx ny"]) -> Float[Tensor, "batch c_out nx ny"]:
        """Turn the input frames' latents into the forecast frames'."""
        skips = [z]
        for block in self.first:
            skips.append(block(skips[-1]))
        z = self.second[0](skips.pop())
        for block in self.second[1:]:
            z = block(torch.cat([z, skips.pop()], dim=1))
        return z


class GatedBlock(nn.Module):
    """Gated spatiotemporal attention: large-kernel depthwise convolutions, gated, then an MLP.

        f, g = pointwise(wide(local(norm(z)))),   z = z + pointwise(sigmoid(g) * f),
        z = z + MLP(norm(z))

    Source: Tan et al., SimVP v2, 2022 (gSTA), after the large-kernel attention of Guo et al., VAN.
    """

    def __init__(self, channels: int, *, padding: Padding) -> None:
        super().__init__()

        c, depthwise = channels, partial(conv2d, channels, channels, groups=channels)
        self.spread = nn.Sequential(
            group_norm(channels),
            nn.Conv2d(c, c, 1),
            nn.GELU(),
            depthwise(_GATED_LOCAL, padding=padding),
            depthwise(_GATED_WIDE, padding=padding, dilation=_GATED_DILATION),
            nn.Conv2d(c, 2 * c, 1),
        )
        self.project = nn.Conv2d(c, c, 1)
        hidden, out = nn.Conv2d(c, 2 * c, 1), nn.Conv2d(2 * c, c, 1)
        self.mlp = nn.Sequential(group_norm(c), hidden, nn.GELU(), out)

    def forward(self, z: Float[Tensor, "batch c nx ny"]) -> Float[Tensor, "batch c nx ny"]:
        """Return the latent one block later."""
        feature, gate = self.spread(z).chunk(2, dim=1)
        z = z + self.project(torch.sigmoid(gate) * feature)
        return z + self.mlp(z)


@explained
class SimVP(nn.Module):
    """Encode each frame, translate all of them at once, decode each forecast frame.

    The encoder turns each frame of ``in_channels / in_frames`` variables into ``width`` channels
    on a coarser grid. The translator turns the ``in_frames * width`` channels of all input frames
    into the ``out_frames * width`` of all forecast frames, the tap ``latent``. The decoder turns
    each of these into a field, with a skip from the encoder's first layer: forecast frame t uses
    input frame t, counted among the ``out_frames`` latest where there are more input frames; where
    there are fewer, the remaining forecast frames use the last one.

    Args:
        in_channels: input frames times variables, frame by frame: channel
            ``frame * variables + variable``.
        out_channels: forecast frames times variables, in the same order.
        in_frames: input frames. By default one variable a frame.
        out_frames: forecast frames. By default as many variables a frame as in the input.
        width: channels of a frame, in the encoder, the latent and the decoder.
        latent_width: channels of the translator.
        depth: translator blocks (inception: of each half).
        n_downsampling: halvings of the grid.
        translator: ``"inception"``, parallel grouped kernels of 3, 5, 7 and 11 (SimVP v1), or
            ``"gated"``, a decomposed large kernel with a gate (SimVP v2's gSTA).
        padding: the boundary rule, ``"periodic"``, ``"reflect"`` or ``"zeros"``.
        coordinates: whether the encoder also reads the coordinates of each point.

    Raises:
        ValueError: for a size that is not positive, an unknown option, or channels that are no
            multiple of the frames; from ``forward``, for other channels or too coarse a grid.

    Example:
        >>> teacher = SimVP(in_channels=10, out_channels=20, width=8, latent_width=32)
        >>> teacher(torch.zeros(2, 10, 32, 32)).shape
        torch.Size([2, 20, 32, 32])

    Source: Gao et al., SimVP, CVPR 2022; Tan et al., SimVP v2, 2022 (gSTA). Strided and
    transposed convolutions once a level; GELU in place of leaky ReLU.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        in_frames: int | None = None,
        out_frames: int | None = None,
        width: int = 16,
        latent_width: int = 128,
        depth: int = 3,
        n_downsampling: int = 2,
        translator: Translator = "inception",
        padding: Padding = "periodic",
        coordinates: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, out_channels=out_channels, width=width, depth=depth)
        check_sizes(latent_width=latent_width, n_downsampling=n_downsampling)
        check_choice("translator", translator, get_args(Translator))
        in_frames = in_channels if in_frames is None else in_frames
        check_sizes(in_frames=in_frames)
        check_multiple("in_channels", in_channels, in_frames, "`in_frames`")
        variables = in_channels // in_frames
        if out_frames is None:
            why = "the variables of an input frame; give `out_frames` if the forecast has others"
            check_multiple("out_channels", out_channels, variables, why)
            out_frames = out_channels // variables
        check_sizes(out_frames=out_frames)
        check_multiple("out_channels", out_channels, out_frames, "`out_frames`")

        self.in_channels = in_channels
        self.in_frames = in_frames
        self.out_frames = out_frames
        gated = max(_GATED_LOCAL // 2, _GATED_DILATION * (_GATED_WIDE // 2))
        reach = max(_KERNELS) // 2 if translator == "inception" else gated
        # Padding may not reach around the whole grid, so the latent needs more points than that.
        self.smallest = reach * 2**n_downsampling + 1
        widths = [width] * (n_downsampling + 1)
        self.locate = AppendCoordinates(padding, coordinates)
        self.encoder = Encoder(variables + self.locate.channels, widths, padding=padding)
        read, written = in_frames * width, out_frames * width
        self.translator: nn.Module
        if translator == "inception":
            self.translator = InceptionTranslator(
                read, written, width=latent_width, depth=depth, padding=padding
            )
        else:
            self.translator = nn.Sequential(
                nn.Conv2d(read, latent_width, 1),
                *(GatedBlock(latent_width, padding=padding) for _ in range(depth)),
                nn.Conv2d(latent_width, written, 1),
            )
        self.decoder = Decoder(widths, out_channels // out_frames, padding=padding)
        self.taps = {"latent": "translator"}

    def forward(self, x: Float[Tensor, "batch c_in nx ny"]) -> Float[Tensor, "batch c_out nx ny"]:
        """Forecast ``out_channels`` from ``in_channels`` fields on the same grid."""
        check_input(x, self.in_channels, self.smallest)
        frames = x.unflatten(1, (self.in_frames, -1)).flatten(0, 1)
        latent, skip = self.encoder(self.locate(frames))
        latent = self.translator(latent.unflatten(0, (-1, self.in_frames)).flatten(1, 2))
        latent = latent.unflatten(1, (self.out_frames, -1)).flatten(0, 1)
        fields = self.decoder(latent, self._pair_frames(skip))
        return fields.unflatten(0, (-1, self.out_frames)).flatten(1, 2)

    def _pair_frames(self, skip: Tensor) -> Tensor:
        """Give each forecast frame the skip of its input frame."""
        if self.in_frames == self.out_frames:
            return skip
        first = max(0, self.in_frames - self.out_frames)
        source = [min(first + t, self.in_frames - 1) for t in range(self.out_frames)]
        return skip.unflatten(0, (-1, self.in_frames))[:, source].flatten(0, 1)
