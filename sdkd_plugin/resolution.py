"""A model whose architecture or training is bound to one resolution, for inputs of any other.

Forecasts of two resolutions are compared in `teachers`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from sdkd_plugin._checks import check_type
from sdkd_plugin._explained import explained
from sdkd_plugin.spectral import GridTransform
from sdkd_plugin.spectral.crop import resample_frequencies
from sdkd_plugin.spectral.grid import Boundary
from sdkd_plugin.teachers import accepted_inputs


@explained
class AtResolution(nn.Module):
    """Gives a model its inputs at the resolution that it was trained at.

    Inputs ``x`` of any resolution are resampled by their spectra: frequencies that a coarser input
    does not have are 0. The forecast stays at the model's resolution. If data of that
    resolution exist, run the model on those, and pass its forecasts to a step as ``outputs``.

    Args:
        model: any module that forecasts on the grid.
        shape: sizes of the model's grid axes.
        boundary: what lies beyond the grid's edges.

    Raises:
        ValueError: if the shape or the boundary is not one of a `GridTransform`, or, in forward,
            if the inputs have too few axes.

    Example:
        >>> import torch
        >>> teacher = AtResolution(nn.Conv2d(1, 1, 3, padding=1), (16, 16))
        >>> teacher(torch.randn(2, 1, 8, 8)).shape
        torch.Size([2, 1, 16, 16])
    """

    def __init__(
        self, model: nn.Module, shape: Sequence[int], boundary: Boundary = "periodic"
    ) -> None:
        super().__init__()
        check_type("model", model, nn.Module, "whose resolution is to be kept")
        self.model = model
        self.grid = GridTransform(shape, boundary)
        # The grid of the last inputs; in a tuple, where nn.Module does not look.
        self._given: tuple[GridTransform, ...] = ()

    @property
    def taps(self) -> Mapping[str, str]:
        """Tap names and module paths, the model's own."""
        return {name: f"model.{path}" for name, path in getattr(self.model, "taps", {}).items()}

    def forward(self, x: Float[Tensor, "batch ..."], **inputs: Any) -> Float[Tensor, "batch ..."]:
        """The model's forecast, at its own resolution."""
        axes = self.grid.domain_axes
        if x.ndim <= len(axes):
            raise ValueError(
                f"`x` has shape {tuple(x.shape)}, expected a batch axis and {len(axes)} "
                "of the grid."
            )
        sizes = tuple(x.shape[axis] for axis in axes)
        if not self._given or self._given[0].shape != sizes:
            self._given = (self.grid.resized(sizes),)
        x = resample_frequencies(x, self._given[0].to(x.device), self.grid)
        return self.model(x, **accepted_inputs(self.model, inputs))
