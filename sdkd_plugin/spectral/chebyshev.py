"""Band energies on large graphs by polynomials of the Laplacian: cost O(order x edges).

Here live the polynomials and the recursion. One recursion serves all bands, and the same fields
``p_i(L) x`` serve energies and gradients.

The power weights of the bands become polynomials p_i with Jackson's damping, which is a positive
kernel: ``0 <= p_i <= 1``, ``sum_i p_i = 1``, so energies are not negative and sum to ``sum(x^2)``.
It widens edges by a standard deviation of ``pi / order`` in the angle ``arccos(2 f - 1)``; a smooth
edge is narrowed first, so that its variance comes out right, and what leaks far beyond an edge is
taken out by stretching all p_i to reach 0 and 1. The order is the lowest at which
weights are within the tolerance of `Bands` at all frequencies; for hard edges, at all that are
farther than ``edge (1 - edge) / 4`` from an edge.

Source: Hammond et al. 2011, "Wavelets on graphs via spectral graph theory"; Weisse et al. 2006,
"The kernel polynomial method", for Jackson's kernel.
"""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.fft
import scipy.sparse
import torch
from jaxtyping import Float
from scipy.sparse.csgraph import reverse_cuthill_mckee
from torch import Tensor

from sdkd_plugin._checks import check_positive
from sdkd_plugin.spectral.bands import Bands
from sdkd_plugin.spectral.laplacian import Laplacian
from sdkd_plugin.spectral.quadratic import AbstractQuadraticTransform
from sdkd_plugin.spectral.transform import check_field, full_precision, working_dtype

MARGIN = 0.01
"""The polynomials' interval ends this much above the eigenvalue that Lanczos finds from below."""

FREQUENCY = (1 + MARGIN) * (1 + np.cos(np.pi * (np.arange(8192) + 0.5) / 8192)) / 2
"""Chebyshev's nodes in that interval, descending; a few are above 1."""

MAX_ORDER = 1000

CACHED = 2**19
"""Elements of one block of fields in the recursion on a CPU: its four blocks stay in the cache."""


class ChebyshevGraph(AbstractQuadraticTransform):
    """Bands of a graph's frequencies, without eigenvectors; ``tolerance`` is that of above."""

    domain_axes = (-2,)
    channel_axis = -1
    domain_shape: tuple[int, ...] = ()
    needs_field = True
    _rows: Tensor
    _columns: Tensor
    _values: Tensor
    _order: Tensor
    _place: Tensor
    _component: Tensor
    _members: Tensor

    def __init__(self, laplacian: Laplacian, tolerance: float, dtype: torch.dtype) -> None:
        check_positive("tolerance", tolerance)
        super().__init__()
        n = laplacian.matrix.shape[0]
        self.domain_shape, self.tolerance = (n,), tolerance
        # Neighbours side by side: the products then read memory in order.
        order = reverse_cuthill_mckee(laplacian.matrix, symmetric_mode=True)
        top = (1 + MARGIN) * (laplacian.highest() or 1.0)
        # T_(k+1) = (2 A) T_k - T_(k-1), with the spectrum of A in [-1, 1].
        doubled = 4 / top * laplacian.matrix - 2 * scipy.sparse.eye_array(n)
        doubled = scipy.sparse.csr_array(doubled)[order][:, order]
        component = laplacian.means.indices[order]
        if laplacian.projected:
            doubled = _bordered(doubled, component)
        # What is kept of the recursion: the nodes, and means to take out.
        self.kept = doubled.shape[0]
        if np.iscomplexobj(doubled.data):
            # Products with complex sparse matrices are slow: real and imaginary parts of fields
            # become rows of their own.
            re, im = doubled.real, doubled.imag
            doubled = scipy.sparse.block_array([[re, -im], [im, re]], format="csr")
            # Round-off of quarter turns.
            doubled.data[np.abs(doubled.data) < 1e-15] = 0
            doubled.eliminate_zeros()
        self.size = doubled.shape[0]
        for name, tensor in {
            "_rows": torch.from_numpy(doubled.indptr.astype(np.int32)),
            "_columns": torch.from_numpy(doubled.indices.astype(np.int32)),
            "_values": torch.from_numpy(doubled.data).to(dtype),
            "_order": torch.from_numpy(order.astype(np.int64)),
            "_place": torch.from_numpy(np.argsort(order)),
            "_component": torch.from_numpy(component.astype(np.int64)),
            "_members": torch.from_numpy(np.bincount(component).astype(np.float64)),
        }.items():
            self.register_buffer(name, tensor, persistent=False)

    def _tables(self, bands: Bands, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Of all bands but the highest: the weight of the mean, and the polynomial's coefficients.

        The highest band is what the others leave.
        """
        at_zero = bands(torch.zeros(1, dtype=torch.float64))[:-1]
        tables = torch.cat([at_zero, band_polynomials(bands, self.tolerance)], 1)
        return tables.to(device, dtype)

    def _analyse(self, x: Tensor, tables: Tensor) -> Tensor:
        images: Tensor = _Images.apply(x, tables, self)
        return images

    def images(self, x: Tensor, tables: Tensor) -> Tensor:
        """``p_i(L) x`` along a new last axis."""
        fields = x.mT.reshape(-1, self.domain_shape[0])
        size = len(fields) if x.is_cuda else max(16, CACHED // self.domain_shape[0])
        out = fields.new_empty(len(tables), *fields.shape)
        matrix = self._matrix(x.dtype)
        for start in range(0, len(fields), size):
            stop = start + size
            self._recursion(fields[start:stop], matrix, tables, out[:, start:stop])
        return out.unflatten(1, x.mT.shape[:-1]).movedim(0, -1).transpose(-2, -3)

    def _recursion(self, fields: Tensor, matrix: Tensor, tables: Tensor, out: Tensor) -> None:
        # All in place: of large fields a new tensor costs as much as a pass over three.
        n, order = self.domain_shape[0], tables.shape[1] - 1
        pair = fields.new_empty(2, self.size, len(fields))
        before, now = pair
        spare, x = now[:n], before[:n]
        torch.index_select(spare.copy_(fields.mT), 0, self._order, out=x)
        means = self._means(x)
        x.sub_(self._of_nodes(means, spare))
        before[n:] = 0
        now.addmm_(matrix, before, beta=0, alpha=0.5)
        flat = pair[:, : self.kept].flatten(1)
        images = tables[:, 1:3] @ flat
        for k in range(2, order, 2):
            before.addmm_(matrix, now, beta=-1)
            if k + 1 < order:
                now.addmm_(matrix, before, beta=-1)
            images.addmm_(tables[:, k + 1 : k + 3], flat[: order - k])
        images = images.unflatten(1, (self.kept, -1))
        for image, weight, target in zip(images, tables[:, 0], out, strict=True):
            rest = weight * means
            if self.kept > n:
                rest -= image[n:]
            image[:n].add_(self._of_nodes(rest, spare))
            target.copy_(torch.index_select(image[:n], 0, self._place, out=spare).mT)

    def _means(self, x: Tensor) -> Tensor:
        """Of components."""
        if len(self._members) == 1:
            return x.mean(0, keepdim=True)
        sums = x.new_zeros(len(self._members), x.shape[1]).index_add_(0, self._component, x)
        return sums.div_(self._members[:, None].to(x))

    def _of_nodes(self, values: Tensor, out: Tensor) -> Tensor:
        """Values of components as values of their nodes."""
        if len(values) == 1:
            return values
        return torch.index_select(values, 0, self._component, out=out)

    def _matrix(self, dtype: torch.dtype) -> Tensor:
        values, shape = self._values.to(dtype), (self.size, self.size)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            return torch.sparse_csr_tensor(
                self._rows, self._columns, values, shape, check_invariants=False
            )

    def _bilinear(
        self, x: Tensor, a: Tensor, y: Tensor, b: Tensor, tables: Tensor
    ) -> Float[Tensor, "batch n_bands"]:
        x, low = x.flatten(1), [image.flatten(1) for image in b.unbind(-1)]
        rest = sum((-image for image in low[1:]), y.flatten(1) - low[0])
        return torch.stack([torch.einsum("bk,bk->b", x, image) for image in (*low, rest)], 1)

    def _combine(self, x: Tensor, a: Tensor, weights: Tensor, tables: Tensor) -> Tensor:
        each = weights.reshape(-1, *[1] * (x.ndim - 1), weights.shape[1])
        top = each[..., -1]
        total = top * x
        for i, image in enumerate(a.unbind(-1)):
            total = torch.addcmul(total, each[..., i] - top, image)
        return total

    def _adjoint(self, a: Tensor, tables: Tensor) -> Tensor:
        parts = [_Images.apply(a[..., i], c[None], self) for i, c in enumerate(tables)]
        return torch.stack(parts).sum(0)[..., 0]

    def filter(
        self,
        x: Float[Tensor, "..."],
        response: Callable[[Tensor], Tensor] | Float[Tensor, "..."],
    ) -> Float[Tensor, "..."]:
        """See `AbstractTransform`; the response is a smooth function of the frequencies."""
        check_field(self, x)
        if not callable(response):
            raise ValueError(
                "`response` is a tensor, expected a function: this graph's frequencies are not "
                "known. from_edges(..., method='exact') computes them."
            )
        at_zero = response(torch.zeros(1, dtype=torch.float64)).double()
        working = x.to(working_dtype(x))
        table = torch.cat([at_zero, _polynomial(response, self.tolerance)])[None].to(working)
        batched = working if x.ndim > 2 else working[None]
        with full_precision(x):
            image = _Images.apply(batched, table, self)[..., 0]
        return image.reshape(x.shape).to(x.dtype)


class _Images(torch.autograd.Function):
    """`ChebyshevGraph.images`, linear; differentiable any number of times."""

    @staticmethod
    def forward(x: Tensor, tables: Tensor, graph: ChebyshevGraph) -> Tensor:
        return graph.images(x, tables)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, ctx.tables, ctx.graph = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.graph._adjoint(grad, ctx.tables), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return _Images.apply(tangent, ctx.tables, ctx.graph)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple, x: Tensor, tables: Tensor, graph: ChebyshevGraph
    ) -> tuple[Tensor, int]:
        folded = x.movedim(in_dims[0], 0)
        images = _Images.apply(folded.flatten(0, 1), tables, graph)
        return images.unflatten(0, folded.shape[:2]), 0


def _bordered(doubled: scipy.sparse.csr_array, component: np.ndarray) -> scipy.sparse.csr_array:
    """A sparse matrix for the recursion of ``P M P``, the means taken out.

    With t = s - C b, C the components' indicators and K = C / size their means, ``P M t - t'`` is
    ``(M s - M C b - s') - C (K^T M s - K^T M C b - b')``: the recursion of (s, b) under
    ``[[M, -M C], [K^T M, -K^T M C]]``.
    """
    nodes, weight = np.arange(len(component)), 1 / np.bincount(component)
    indicator = scipy.sparse.csr_array((np.ones(len(nodes)), (nodes, component)))
    means = scipy.sparse.csr_array((weight[component], (component, nodes)))
    right = -doubled @ indicator
    return scipy.sparse.block_array(
        [[doubled, right], [means @ doubled, means @ right]], format="csr"
    )


def band_polynomials(bands: Bands, tolerance: float) -> Float[Tensor, "bands_but_one order"]:
    """Chebyshev coefficients of all bands but the highest, of the lowest order that is enough.

    Raises:
        ValueError: if an edge is so sharp that the order would exceed `MAX_ORDER`.
    """
    exact = bands(torch.from_numpy(FREQUENCY)).numpy()
    counted = FREQUENCY <= 1
    for edge in bands.edges if bands.transition == 0 else ():
        counted &= np.abs(FREQUENCY - edge) >= edge * (1 - edge) / 4
    order = 8
    while order <= MAX_ORDER:
        # Below each edge 1, above it 0: differences of neighbours are the bands.
        below = np.stack([_narrowed(edge, bands.transition, order) for edge in bands.edges])
        below = np.minimum.accumulate(below[::-1])[::-1]
        n, k = order + 2, np.arange(order + 1)
        angle = np.pi * k / n
        jackson = ((n - k) * np.cos(angle) + np.sin(angle) / np.tan(np.pi / n)) / n
        damped = _coefficients(below, order) * jackson
        # Damping leaks far beyond an edge; one stretch for all brings the ends back to 0 and 1.
        reached = _values(damped)
        damped[:, 0] -= reached.min()
        each = np.diff(damped / np.ptp(reached), axis=0, prepend=0)
        got = _values(each)
        got = np.concatenate([got, 1 - got.sum(0, keepdims=True)])
        if np.abs(got - exact)[:, counted].max() <= tolerance:
            return torch.from_numpy(each)
        order += max(1, order // 16)
    raise ValueError(
        f"`bands` is {bands}, expected wider edges: within {tolerance} of them no polynomial of "
        f"order {MAX_ORDER} comes. Set a transition, or raise `tolerance`."
    )


def _polynomial(response: Callable[[Tensor], Tensor], tolerance: float) -> Float[Tensor, " order"]:
    """Coefficients of the lowest order within ``tolerance`` times the largest response."""
    exact = response(torch.from_numpy(FREQUENCY).clamp(max=1)).double().numpy()
    order = 8
    while order <= MAX_ORDER:
        c = _coefficients(exact, order)
        if np.abs(_values(c) - exact).max() <= tolerance * np.abs(exact).max():
            return torch.from_numpy(c)
        order += max(1, order // 8)
    raise ValueError(
        "`response` is too steep for a polynomial, expected a smooth function of the frequency; "
        "from_edges(..., method='exact') takes any."
    )


def _coefficients(samples: np.ndarray, order: int) -> np.ndarray:
    """Of the polynomial nearest to samples at `FREQUENCY`."""
    c = scipy.fft.dct(samples)[..., : order + 1] / len(FREQUENCY)
    c[..., 0] /= 2
    return c


def _values(coefficients: np.ndarray) -> np.ndarray:
    """A polynomial at `FREQUENCY`."""
    c = coefficients * len(FREQUENCY)
    c[..., 0] *= 2
    return scipy.fft.idct(c, n=len(FREQUENCY))


def _narrowed(edge: float, transition: float, order: int) -> np.ndarray:
    """1 below an edge and 0 above, so narrow that Jackson's damping gives it the right width."""
    # The variance of a raised cosine of width w is w^2 (1/4 - 2 / pi^2), Jackson's is in the angle.
    damping = edge * (1 + MARGIN - edge) * (np.pi / (order + 2)) ** 2
    width = max(1e-9, transition**2 - damping / (0.25 - 2 / np.pi**2)) ** 0.5
    return (1 - np.sin(np.pi * np.clip((FREQUENCY - edge) / width, -0.5, 0.5))) / 2
