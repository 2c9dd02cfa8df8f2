"""Band energies as quadratic forms ``<x, g_i(L) x>``, with all their derivatives.

Here lives the one autograd function behind every spectral loss. How ``g_i(L)`` is applied is in
`basis` and `chebyshev`.
"""

from abc import abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sdkd_plugin.spectral.bands import Bands
from sdkd_plugin.spectral.transform import AbstractTransform, check_field, full_precision

CHUNK = 2**27
"""Elements of a field transformed at once: larger batches are split, to bound temporary memory."""


class AbstractQuadraticTransform(AbstractTransform):
    """A transform that analyses a field once and derives energies and gradients from that.

    The analysis is linear, so the energies are quadratic forms with the gradient
    ``2 sum_i de_i g_i(L) x`` and the second derivative ``2 g_i(L)``.
    """

    needs_field: bool = False
    """Whether the methods below need fields besides their analyses; else they may get anything."""

    def __init__(self) -> None:
        super().__init__()
        self._known_tables: dict[tuple[Bands, torch.device, torch.dtype], Tensor] = {}

    @abstractmethod
    def _tables(self, bands: Bands, device: torch.device, dtype: torch.dtype) -> Tensor:
        """What the methods below need of the bands, for fields of this device and dtype."""

    @abstractmethod
    def _analyse(self, x: Tensor, tables: Tensor) -> Tensor:
        """A linear map of fields, the batch axis first."""

    @abstractmethod
    def _bilinear(
        self, x: Tensor, a: Tensor, y: Tensor, b: Tensor, tables: Tensor
    ) -> Float[Tensor, "batch n_bands"]:
        """``<x, g_i(L) y>`` of fields with the analyses ``a`` and ``b``."""

    @abstractmethod
    def _combine(self, x: Tensor, a: Tensor, weights: Tensor, tables: Tensor) -> Tensor:
        """``sum_i weights[b, i] g_i(L) x`` of fields with the analysis ``a``."""

    @abstractmethod
    def _adjoint(self, a: Tensor, tables: Tensor) -> Tensor:
        """The adjoint of `_analyse`."""

    def sample_band_energy(
        self, x: Float[Tensor, "batch ..."], bands: Bands
    ) -> Float[Tensor, "batch n_bands"]:
        """See `AbstractTransform`."""
        check_field(self, x, batched=True)
        x = x if x.dtype == torch.float64 else x.float()
        key = bands, x.device, x.dtype
        if key not in self._known_tables:
            self._known_tables[key] = _plainly(lambda: self._tables(bands, x.device, x.dtype))
        tables = self._known_tables[key]
        # torch.compile traces no function with a forward-mode derivative.
        function = _BandEnergy if torch.compiler.is_compiling() else _ForwardBandEnergy
        samples = max(1, CHUNK * x.shape[0] // x.numel())
        if samples >= x.shape[0]:
            return function.apply(x, tables, self)[0]
        return torch.cat([function.apply(part, tables, self)[0] for part in x.split(samples)])

    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> "AbstractQuadraticTransform":
        """Follow to another device, but in full precision: `half` must not move frequencies."""
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self


def _plainly(compute: Callable[[], Tensor]) -> Tensor:
    """A tensor to keep, free of inference mode and of the `torch.func` transforms around us."""
    if torch.compiler.is_compiling():
        return compute()
    # All of these are states of a thread.
    with ThreadPoolExecutor(1) as pool:
        tensor = pool.submit(compute).result()
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return tensor


class _BandEnergy(torch.autograd.Function):
    """``e[b, i] = <x_b, g_i(L) x_b>``, and the analysis, so that it can be differentiated again."""

    @staticmethod
    def forward(
        x: Tensor, tables: Tensor, transform: AbstractQuadraticTransform
    ) -> tuple[Tensor, Tensor]:
        with full_precision(x):
            a = transform._analyse(x, tables)
            # What is left to the highest band can be negative by round-off.
            return transform._bilinear(x, a, x, a, tables).clamp(min=0), a

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        x, tables, ctx.transform = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(tables, output[1], *([x] if ctx.transform.needs_field else []))
        ctx.save_for_forward(x, tables, output[1])

    @staticmethod
    def backward(
        ctx: Any, of_energy: Tensor | None, of_analysis: Tensor | None
    ) -> tuple[Tensor | None, None, None]:
        tables, a, *field = ctx.saved_tensors
        gradient = None
        with full_precision(a):
            if of_energy is not None:
                gradient = ctx.transform._combine(
                    field[0] if field else a, a, 2 * of_energy, tables
                )
            if of_analysis is not None:
                more = ctx.transform._adjoint(of_analysis, tables)
                gradient = more if gradient is None else gradient + more
        return gradient, None, None


class _ForwardBandEnergy(_BandEnergy):
    """With forward mode and `torch.vmap`, which folds the new axis into the batch."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        x, tables, a = ctx.saved_tensors
        b = ctx.transform._analyse(tangent, tables)
        return 2 * ctx.transform._bilinear(tangent, b, x, a, tables), b

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple, x: Tensor, tables: Tensor, transform: AbstractQuadraticTransform
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        folded = x.movedim(in_dims[0], 0)
        energy, a = _ForwardBandEnergy.apply(folded.flatten(0, 1), tables, transform)
        shape = folded.shape[:2]
        return (energy.unflatten(0, shape), a.unflatten(0, shape)), (0, 0)
