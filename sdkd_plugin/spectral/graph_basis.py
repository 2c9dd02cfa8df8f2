"""Eigenvectors of a graph's Laplacian: all of them, or the lowest.

Here live the exact and the low-rank engine of `GraphTransform`, and the file that keeps a basis.
"""

import os
import secrets
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Float, Shaped
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from scipy.sparse.linalg import LinearOperator, eigsh, splu
from torch import Tensor

from sdkd_plugin._checks import check_not_negative, check_positive_int, check_shape
from sdkd_plugin.spectral.basis import AbstractBasisTransform
from sdkd_plugin.spectral.laplacian import Laplacian
from sdkd_plugin.spectral.transform import full_precision


class GraphBasis(AbstractBasisTransform):
    """The eigenvectors of a graph's Laplacian, real or complex, or the lowest of them.

    ``highest`` is the largest eigenvalue of all; by default of those given.
    """

    domain_axes = (-2,)
    channel_axis = -1
    domain_shape: tuple[int, ...] = ()
    _columns: Tensor

    def __init__(
        self,
        eigenvectors: Shaped[Tensor, "nodes kept"],
        eigenvalues: Float[Tensor, " kept"],
        highest: float | None = None,
    ) -> None:
        n, kept = len(eigenvectors), len(eigenvalues)
        shape = (kept if highest is None else n, kept)
        check_shape("eigenvectors", eigenvectors.shape, shape, "a column for each eigenvalue")
        check_not_negative("eigenvalues", eigenvalues, "a Laplacian has none")
        probe = _probe(kept).to(eigenvectors)
        with full_precision(probe):
            again = eigenvectors.mH @ (eigenvectors @ probe)
        if not torch.allclose(again, probe, atol=1e-4):
            raise ValueError("`eigenvectors` has columns that are not orthonormal.")
        top = float(eigenvalues.max()) if highest is None else highest
        # A graph without edges carries means only.
        frequencies = (eigenvalues.double() / (top or 1.0)).clamp(max=1)
        super().__init__(frequencies, torch.ones_like(frequencies))
        self._paired = eigenvectors.is_complex()
        reals = torch.view_as_real(eigenvectors) if self._paired else eigenvectors
        self.register_buffer("_columns", reals, persistent=False)
        self.needs_field = kept < n
        self.domain_shape = (n,)

    @property
    def eigenvectors(self) -> Shaped[Tensor, "nodes kept"]:
        """Orthonormal columns."""
        return torch.view_as_complex(self._columns) if self._paired else self._columns

    def _to_packed(self, x: Tensor) -> Tensor:
        return self._times_vectors(x, x.dtype, inverse=False)

    def _from_packed(self, c: Tensor) -> Tensor:
        x = self._times_vectors(c, c.real.dtype, inverse=True)
        return x.real if x.is_complex() else x

    def _times_vectors(self, x: Tensor, dtype: torch.dtype, *, inverse: bool) -> Tensor:
        vectors = self._columns.to(dtype)
        vectors = torch.view_as_complex(vectors) if self._paired else vectors
        rows = x.mT.to(vectors.dtype)
        # One product of two matrices: of more axes `matmul` makes a product for each field.
        product = rows.reshape(-1, rows.shape[-1]) @ (vectors.mT if inverse else vectors.conj())
        return product.reshape(*rows.shape[:-1], -1).mT


def graph_basis(
    laplacian: Laplacian, rank: int | None, dtype: torch.dtype, folder: Path | None
) -> GraphBasis:
    """All eigenvectors, or the ``rank`` lowest, computed in float64 or read from a folder."""

    def compute() -> dict[str, Tensor]:
        if rank is None:
            values, vectors = torch.linalg.eigh(torch.from_numpy(laplacian.dense()))
            highest = values[-1:]
        else:
            values, vectors = map(torch.from_numpy, _lowest(laplacian, rank))
            highest = torch.tensor([laplacian.highest()], dtype=torch.float64)
        # Round-off leaves eigenvalues of about 1e-17, of either sign, where the exact ones are 0.
        noise = len(vectors) * torch.finfo(values.dtype).eps * highest
        values = torch.where(values > noise, values, 0)
        reals = torch.view_as_real(vectors) if vectors.is_complex() else vectors
        return {"values": values, "vectors": reals.to(dtype), "highest": highest}

    def belongs(kept: dict[str, Tensor]) -> bool:
        """Whether ``L U v = U (lambda v)`` for a random v."""
        vectors, values = _complex(kept["vectors"], laplacian).numpy(), kept["values"].numpy()
        if vectors.shape != (laplacian.matrix.shape[0], len(values)):
            return False
        probe = _probe(len(values)).double().numpy()
        left, right = laplacian @ (vectors @ probe), vectors @ (values[:, None] * probe)
        return bool(np.abs(left - right).max() <= 1e-3 * max(float(kept["highest"]), 1e-30))

    digest = laplacian.digest(rank, dtype)
    kept = compute() if folder is None else _kept_in(folder, digest, compute, belongs)
    vectors = _complex(kept["vectors"], laplacian)
    return GraphBasis(vectors, kept["values"], float(kept["highest"]))


def _complex(reals: Tensor, laplacian: Laplacian) -> Tensor:
    return torch.view_as_complex(reals) if np.iscomplexobj(laplacian.matrix.data) else reals


def _probe(n: int) -> Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(0))


def _lowest(laplacian: Laplacian, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The ``rank`` lowest eigenvalues and their vectors, by Lanczos on the shifted inverse."""
    check_positive_int("rank", rank)
    means = laplacian.means
    n, count = means.shape
    if not count < rank < n - 1:
        raise ValueError(
            f"`rank` is {rank}, expected more than the graph's {count} components and fewer than "
            f"{n - 1}, its nodes but one."
        )
    shift = 1e-3 * laplacian.highest() / n
    shifted = laplacian.matrix + shift * scipy.sparse.eye_array(n)
    solve = splu(scipy.sparse.csc_array(shifted)).solve

    def inverse(x: np.ndarray) -> np.ndarray:
        y = solve(laplacian.without_means(x).astype(laplacian.matrix.dtype))
        return y - solved @ np.linalg.solve(gram, means.T @ y)

    columns = means.toarray().astype(laplacian.matrix.dtype)
    solved = solve(columns)
    gram = means.T @ solved
    operator = LinearOperator((n, n), matvec=inverse, dtype=laplacian.matrix.dtype)
    start = np.random.default_rng(0).normal(size=n)
    inverses, vectors = eigsh(operator, rank - count, which="LA", v0=start)
    ascending = np.argsort(-inverses)
    values = np.concatenate([np.zeros(count), 1 / inverses[ascending] - shift])
    return values, np.concatenate([columns, vectors[:, ascending]], 1)


def _kept_in(
    folder: Path,
    digest: str,
    compute: Callable[[], dict[str, Tensor]],
    belongs: Callable[[dict[str, Tensor]], bool],
) -> dict[str, Tensor]:
    """Tensors of a file named by a digest; computed and written where it is missing or broken."""
    path = folder / f"graph_basis_{digest}.safetensors"
    try:
        kept = load_file(path)
        if {"values", "vectors", "highest"} == set(kept) and belongs(kept):
            return kept
    except (FileNotFoundError, SafetensorError):
        pass
    kept = {name: tensor.contiguous() for name, tensor in compute().items()}
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{secrets.token_hex(8)}.tmp")
    try:
        save_file(kept, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return kept
