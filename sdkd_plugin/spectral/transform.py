"""What every domain promises to the losses, and the checks on fields."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sdkd_plugin._checks import check_shape, check_type
from sdkd_plugin.spectral.bands import Bands


class AbstractTransform(nn.Module, ABC):
    """The spectral view of fields on one domain.

    Frequencies are numbers in [0, 1]: 0 is the mean (of each component, where a domain is not
    connected), 1 the highest the domain carries. Energies are orthonormal: over all bands they sum
    to ``sum(x^2)`` (Parseval). So with equal weights the frequency-aligned loss is the MSE.

    Half-precision fields are transformed in float32, also under autocast; float64 stays float64.
    """

    @property
    @abstractmethod
    def domain_shape(self) -> tuple[int, ...]:
        """Sizes of the domain's axes."""

    @property
    @abstractmethod
    def domain_axes(self) -> tuple[int, ...]:
        """Axes of a field that the domain takes, counted from the end, ascending."""

    @property
    @abstractmethod
    def channel_axis(self) -> int:
        """Axis of a field that holds its channels or features, counted from the end."""

    def resized(self, domain_shape: tuple[int, ...]) -> "AbstractTransform":
        """The same kind of transform for latents on a domain of another size.

        Raises:
            ValueError: if the domain has no such size; a graph has one.
        """
        check_shape("domain_shape", domain_shape, self.domain_shape, "the only size of this domain")
        return self

    @abstractmethod
    def sample_band_energy(
        self, x: Float[Tensor, "batch ..."], bands: Bands
    ) -> Float[Tensor, "batch n_bands"]:
        """Energy of each sample in each band, summed over its channels.

        Differentiable any number of times, also by forward mode and `torch.func`.

        Args:
            x: fields, the first axis the batch.
            bands: the partition.

        Returns:
            float32, or float64 where ``x`` is.

        Raises:
            ValueError: if the fields do not lie on the domain, are empty or have no batch axis.
        """

    @abstractmethod
    def filter(
        self,
        x: Float[Tensor, "..."],
        response: Callable[[Tensor], Tensor] | Float[Tensor, "..."],
    ) -> Float[Tensor, "..."]:
        """Multiply each frequency of fields by a real response: ``g(L) x``, shaped as ``x``.

        Args:
            x: fields on the domain.
            response: amplitudes, a function of the frequencies in [0, 1]. The image of a band
                with power weights m has the response ``sqrt(m)``.

        Raises:
            ValueError: if the fields do not lie on the domain or the response does not fit it.
        """

    def band_energy(
        self, x: Float[Tensor, "..."], bands: Bands
    ) -> Float[Tensor, "*other_axes n_bands"]:
        """Energy of every field in each band: the domain's axes summed, all others kept.

        Over the bands it sums to the fields' energy. Arguments and errors are those of
        `sample_band_energy`, but no batch axis is needed.

        Example:
            >>> from sdkd_plugin import Bands, GridTransform
            >>> x = torch.ones(1, 3, 8, 8)
            >>> GridTransform((8, 8)).band_energy(x, Bands.split(0.5))[0, 0]
            tensor([64.,  0.])
        """
        check_field(self, x)
        check_type("bands", bands, Bands, "such as Bands.split(0.25)")
        n_domain = len(self.domain_axes)
        last = x.movedim(self.domain_axes, tuple(range(-n_domain, 0)))
        # Every field becomes a sample of its own; axes behind the domain have length 1.
        behind = [1] * (-self.domain_axes[-1] - 1)
        samples = last.reshape(-1, *self.domain_shape, *behind)
        energy = self.sample_band_energy(samples, bands)
        return energy.reshape(*last.shape[:-n_domain], bands.n_bands)


def full_precision(x: Tensor) -> AbstractContextManager[None]:
    """A context without autocast and without products in TF32 or bfloat16."""
    if torch.compiler.is_compiling():
        return torch.autocast(x.device.type, enabled=False)
    autocast = torch.is_autocast_enabled(x.device.type)
    # Where nothing is to be done, a context costs as much as a small kernel.
    exact = not autocast and torch.get_float32_matmul_precision() == "highest"
    return nullcontext() if exact else _full_precision(x)


@contextmanager
def _full_precision(x: Tensor) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(x.device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def working_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 fields, float32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_field(transform: AbstractTransform, x: Tensor, *, batched: bool = False) -> None:
    """Refuse a field that is empty or does not lie on the transform's domain."""
    shape, axes = transform.domain_shape, transform.domain_axes
    if not isinstance(x, Tensor):
        check_type("x", x, Tensor, "a field")
    if not x.is_floating_point():
        raise ValueError(f"`x` as a field is of {x.dtype}, expected floating-point numbers.")
    if x.ndim < -axes[0] or tuple(map(x.shape.__getitem__, axes)) != shape:
        raise ValueError(
            f"`x` as a field has shape {tuple(x.shape)}, expected {shape} along axes {axes}: "
            "build the transform for the shape of the data."
        )
    if batched and x.ndim == -axes[0]:
        raise ValueError(
            f"`x` as a field has shape {tuple(x.shape)}, expected a batch axis before its domain, "
            f"{shape}."
        )
    if x.numel() == 0:
        raise ValueError(
            f"`x` as a field has shape {tuple(x.shape)}, expected at least one sample and one "
            "channel: an empty batch has no energy."
        )
