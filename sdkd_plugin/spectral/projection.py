"""Two hard bands of a graph: the low one is a projection, the high one what it leaves.

The basis itself is in `graph_basis`; other bands need all of it.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from sdkd_plugin.spectral.bands import Bands
from sdkd_plugin.spectral.graph_basis import GraphBasis
from sdkd_plugin.spectral.quadratic import AbstractQuadraticTransform


class LowBandProjection(AbstractQuadraticTransform):
    """Energies of two hard bands, from the eigenvectors U of the low one alone.

    The bands' images are ``p = U U^T x`` and ``x - p``. The energies ``|p|^2`` and ``|x - p|^2``
    have the gradients ``2 p`` and ``2 (x - p)``, which need no further product with U.
    """

    domain_axes = (-2,)
    channel_axis = -1
    domain_shape: tuple[int, ...] = ()
    needs_field = True

    def __init__(self, basis: GraphBasis) -> None:
        super().__init__()
        self.basis, self.domain_shape = basis, basis.domain_shape
        self._known_savings: dict[Bands, bool] = {}

    def saves(self, bands: Bands) -> bool:
        """Whether bands are two hard ones of real eigenvectors, at most half of these low."""
        if bands not in self._known_savings:
            basis, two_hard = self.basis, bands.n_bands == 2 and bands.transition == 0
            share = bands(basis.frequencies)[0].sum() / self.domain_shape[0]
            real = not basis.eigenvectors.is_complex()
            self._known_savings[bands] = two_hard and real and bool(share <= 0.5)
        return self._known_savings[bands]

    def _tables(self, bands: Bands, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The low band's eigenvectors as rows."""
        low = bands(self.basis.frequencies)[0] > 0
        return self.basis.eigenvectors.mT[low].to(device, dtype)

    def _analyse(self, x: Tensor, tables: Tensor) -> Tensor:
        fields = x.mT.reshape(-1, x.shape[-2])
        return (fields @ tables.mT @ tables).reshape(x.mT.shape).mT

    def _bilinear(
        self, x: Tensor, a: Tensor, y: Tensor, b: Tensor, tables: Tensor
    ) -> Float[Tensor, "batch 2"]:
        if a is b:  # norms read each image once
            norms = [torch.linalg.vector_norm(p.flatten(1), dim=1) for p in (a, x - a)]
            return torch.stack(norms, 1).square()
        pairs = (a, b), (x - a, y - b)
        return torch.stack([(p * q).flatten(1).sum(1) for p, q in pairs], 1)

    def _combine(self, x: Tensor, a: Tensor, weights: Tensor, tables: Tensor) -> Tensor:
        low, high = weights.mT.reshape(2, -1, *[1] * (x.ndim - 1))
        return torch.addcmul(high * x, low - high, a)

    def _adjoint(self, a: Tensor, tables: Tensor) -> Tensor:
        return self._analyse(a, tables)

    def filter(
        self,
        x: Float[Tensor, "..."],
        response: Callable[[Tensor], Tensor] | Float[Tensor, "..."],
    ) -> Float[Tensor, "..."]:
        """See `AbstractTransform`."""
        return self.basis.filter(x, response)
