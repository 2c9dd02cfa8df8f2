"""The sphere, where torch-harmonics is installed (the extra ``sphere``)."""

import pytest
import torch
from torch import Tensor
from transform_contract import TIGHT, TransformContract

from sdkd_plugin import Bands
from sdkd_plugin.spectral import SphereTransform

GRIDS = [(12, 24, "legendre-gauss"), (16, 15, "equiangular"), (9, 16, "lobatto")]


def test_the_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "torch_harmonics", None)
    with pytest.raises(ImportError, match=r"pip install 'sdkd_plugin\[sphere\]'"):
        SphereTransform(8, 16)


class TestSphereTransform(TransformContract):
    @pytest.fixture(params=GRIDS, ids=str)
    def transform(self, request: pytest.FixtureRequest, device: torch.device) -> SphereTransform:
        pytest.importorskip("torch_harmonics", reason="the extra `sphere` is not installed")
        return SphereTransform(*request.param).to(device)

    @pytest.fixture(autouse=True)
    def areas(self, transform: SphereTransform) -> None:
        self.of_rows = transform._areas

    def weights(self, x: Tensor) -> Tensor:
        return self.of_rows.expand_as(x)

    def test_a_harmonic_has_its_degree_and_rotations_leave_it_there(
        self, transform: SphereTransform, device: torch.device
    ):
        degrees = len(transform.frequencies)
        bands = Bands(tuple((i + 0.5) / (degrees - 1) for i in range(degrees - 1)))
        unit = torch.zeros(degrees, 1, degrees, degrees, dtype=torch.complex128, device=device)
        for degree in range(degrees):
            unit[degree, 0, degree, degree // 2] = 1
        fields = transform.inverse(unit)
        torch.testing.assert_close(transform(fields), unit, **TIGHT)
        energy = transform.sample_band_energy(fields, bands)
        expected = torch.tensor([1.0 if d < 2 else 2.0 for d in range(degrees)]).diag()
        expected = expected.to(energy)
        torch.testing.assert_close(energy, expected, **TIGHT)
        # Three axes: x y z and powers of them, rotated; energies depend on no axis.
        point = transform.inverse(_coordinates(transform, device))
        turn, _ = torch.linalg.qr(
            torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        )
        turned = torch.einsum("ij,jlm->ilm", turn.to(device), point[:, 0])
        before, after = (
            transform.sample_band_energy((p[0] + 2 * p[0] ** 2 - p[0] ** 3)[None, None], bands)
            for p in (point[:, 0], turned)
        )
        torch.testing.assert_close(after, before, **TIGHT)


def _coordinates(transform: SphereTransform, device: torch.device) -> Tensor:
    """Coefficients of x, y and z, each of the same norm."""
    degrees = len(transform.frequencies)
    c = torch.zeros(3, 1, degrees, degrees, dtype=torch.complex128, device=device)
    c[0, 0, 1, 1], c[1, 0, 1, 1], c[2, 0, 1, 0] = 2**-0.5, 1j * 2**-0.5, 1
    return c
