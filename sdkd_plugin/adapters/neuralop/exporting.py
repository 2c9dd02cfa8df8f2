"""How neuraloperator's Fourier layers are exported: as products with real matrices."""

from typing import Any

from neuralop.layers.spectral_convolution import SpectralConv
from torch import Tensor, nn

from sdkd_plugin.export import RealSpectralConv, portable


class _Layer(RealSpectralConv):
    """With the host's calls."""

    def forward(self, x: Tensor, output_shape: None = None) -> Tensor:
        return super().forward(x)

    def transform(self, x: Tensor, output_shape: None = None) -> Tensor:
        """What a skip around the layer does to reach its grid: nothing."""
        return x


@portable.register
def real_spectral_conv(layer: SpectralConv, x: Tensor) -> nn.Module:
    """The layer with its kept modes as real matrix products; factorised weights become dense.

    Raises:
        ValueError: if it has complex data, separable weights, another output grid, or half
            precision.
    """
    refused: dict[str, Any] = {
        "complex_data": layer.complex_data,
        "separable": layer.separable,
        "resolution_scaling_factor": layer.resolution_scaling_factor,
        "fno_block_precision": layer.fno_block_precision != "full",
    }
    for option, got in refused.items():
        if got:
            raise ValueError(
                f"a Fourier layer with `{option}={getattr(layer, option)}` is not exported, "
                "expected the default: train the student with that."
            )
    shape = list(x.shape[2:])
    weight = layer.weight if isinstance(layer.weight, Tensor) else layer.weight.to_tensor()
    # Where fewer modes are kept than the weight has, the host takes those around the middle.
    halves = [*shape[:-1], shape[-1] // 2 + 1]
    sizes = [min(pair) for pair in zip(halves, layer.n_modes, strict=True)]
    for axis, size in enumerate(sizes):
        extra = weight.shape[2 + axis] - size
        first = extra // 2 if axis < len(sizes) - 1 else 0
        weight = weight.narrow(2 + axis, first, size)
    read = [[k - m // 2 for k in range(m)] for m in sizes[:-1]] + [list(range(sizes[-1]))]
    # The host shifts twice by n // 2, which for an odd n is one short of a whole turn.
    odd = [n % 2 for n in shape[:-1]] + [0]
    written = [[k - n for k in ks] for ks, n in zip(read, odd, strict=True)]
    bias = None if layer.bias is None else layer.bias.detach()
    return _Layer(weight.detach(), shape, read, written, bias)
