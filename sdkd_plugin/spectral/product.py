"""Space and time together: a domain times the frames of a forecast."""

from typing import Literal, get_args

import torch
from torch import Tensor

from sdkd_plugin._checks import check_choice, check_sizes
from sdkd_plugin._explained import explained
from sdkd_plugin.spectral import cosine
from sdkd_plugin.spectral.basis import AbstractBasisTransform
from sdkd_plugin.spectral.graph import GraphTransform
from sdkd_plugin.spectral.transform import AbstractTransform

Over = Literal["joint", "time"]


@explained
class ProductTransform(AbstractBasisTransform):
    """Fields over a horizon: the DCT-II along time, times the transform of space.

    Time is the axis before those of space: ``time`` in ``(batch, time, nodes, features)``, and the
    channels in ``(batch, channels, *shape)``, which are frames of one or several variables.

    Frequency, with f_s of space, which has d axes (a graph has 1), and ``f_t = k / frames``:

        joint: sqrt((d f_s^2 + f_t^2) / (d + 1)), as on a grid of d + 1 axes
        time:  f_t, whatever happens in space

    Bands of space alone are those of ``space`` itself.

    Args:
        space: the domain of one frame. For joint frequencies it needs a whole basis: a grid, or a
            graph with all eigenvectors.
        frames: of a forecast.
        over: which frequencies the bands divide.
        variables: of a frame; channel ``frame * variables + variable`` holds each.

    Raises:
        ValueError: if a number is not a positive integer, ``over`` is unknown, or joint
            frequencies are wanted of a space without a basis.

    Example:
        >>> from sdkd_plugin import Bands, GridTransform
        >>> transform = ProductTransform(GridTransform((8, 8)), frames=10, over="time")
        >>> still = torch.randn(2, 1, 8, 8).expand(2, 10, 8, 8)
        >>> energy = transform.sample_band_energy(still, Bands.split(0.1))
        >>> bool((energy[:, 1] < 1e-4 * energy[:, 0]).all())
        True
    """

    domain_shape: tuple[int, ...] = ()
    domain_axes: tuple[int, ...] = ()
    channel_axis: int = 0
    _cosines: Tensor

    def __init__(
        self, space: AbstractTransform, frames: int, *, over: Over = "joint", variables: int = 1
    ) -> None:
        check_sizes(frames=frames, variables=variables)
        check_choice("over", over, get_args(Over))
        time = torch.arange(frames, dtype=torch.float64).repeat_interleave(variables) / frames
        multiplicity = torch.ones_like(time)
        basis = None
        if over == "joint":
            whole = space.basis if isinstance(space, GraphTransform) else space
            if not isinstance(whole, AbstractBasisTransform) or whole.needs_field:
                raise ValueError(
                    "`space` has no whole basis, expected a grid or a graph with all eigenvectors "
                    "(method='exact'): joint frequencies need one; over='time' does not."
                )
            basis, d = whole, len(space.domain_axes)
            time = time.reshape(-1, *[1] * whole.frequencies.ndim).to(whole.frequencies)
            time = ((d * whole.frequencies**2 + time**2) / (d + 1)).sqrt()
            multiplicity = whole.multiplicity.expand_as(time).contiguous()
        super().__init__(time, multiplicity)
        self.space, self.frames, self.variables = space, frames, variables
        self.over: Over = over
        self._basis = basis
        self.domain_shape = (frames * variables, *(space.domain_shape if basis else ()))
        self.domain_axes = (space.domain_axes[0] - 1, *(space.domain_axes if basis else ()))
        self.channel_axis = space.channel_axis
        # A horizon is short: one small product is faster than an FFT.
        self.register_buffer("_cosines", cosine.matrix(frames), persistent=False)

    def resized(self, domain_shape: tuple[int, ...]) -> AbstractTransform:
        """For another size; on a grid that of space alone, for latents have no frames there.

        Raises:
            ValueError: if space has no such size, or only time is transformed on a grid.
        """
        on_graph = self.space.channel_axis == -1
        if domain_shape == self.domain_shape or (self.over == "time" and not on_graph):
            return super().resized(domain_shape)
        space = self.space if self.over == "time" else self.space.resized(domain_shape[1:])
        return ProductTransform(space, domain_shape[0], over=self.over) if on_graph else space

    def _to_packed(self, x: Tensor) -> Tensor:
        x = self._along_time(self._cosines, x)
        return x if self._basis is None else self._basis._to_packed(x)

    def _from_packed(self, c: Tensor) -> Tensor:
        x = c if self._basis is None else self._basis._from_packed(c)
        return self._along_time(self._cosines.mT, x)

    def _pack(self, c: Tensor) -> Tensor:
        return c if self._basis is None else self._basis._pack(c)

    def _unpack(self, c: Tensor) -> Tensor:
        return c if self._basis is None else self._basis._unpack(c)

    def _along_time(self, matrix: Tensor, x: Tensor) -> Tensor:
        axis = self.domain_axes[0] % x.ndim
        rows = x.flatten(axis).unflatten(axis, (self.frames, -1))
        return (matrix.to(x.dtype) @ rows).reshape(x.shape)

    def _slots(self, values: Tensor) -> Tensor:
        return values if self._basis is None else self._basis._slots(values)

    def _slot_energy(self) -> Tensor:
        if self._basis is None:
            return self.multiplicity
        energy = self._basis._slot_energy()
        return energy.expand(self.domain_shape[0], *energy.shape)

    def extra_repr(self) -> str:
        """Frames and frequencies, for ``print``."""
        return f"frames={self.frames}, over={self.over!r}, variables={self.variables}"
