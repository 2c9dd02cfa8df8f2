"""Bands: a partition of the frequencies, with known answers."""

import pickle

import pytest
import torch

from sdkd_plugin import Bands, GraphTransform, GridTransform, Spectrum

PARTITIONS = [
    Bands.split(0.25),
    Bands.split(0.25, transition=0.5),
    Bands.dyadic(5),
    Bands.dyadic(4, transition=0.1),
    Bands((0.3, 0.35, 0.4), transition=0.3),  # the smooth edges overlap
]


@pytest.mark.parametrize("bands", PARTITIONS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_weights_sum_to_one_at_every_frequency(
    bands: Bands, dtype: torch.dtype, device: torch.device
):
    frequencies = torch.cat([torch.linspace(0, 1, 1001), torch.tensor(bands.edges)])
    weights = bands(frequencies.to(device, dtype))
    assert weights.shape == (bands.n_bands, len(frequencies))
    assert (weights.dtype, weights.device.type) == (dtype, device.type)
    assert weights.min() >= 0
    assert weights.max() <= 1
    torch.testing.assert_close(weights.sum(0), torch.ones_like(weights[0]))


def test_weights_keep_the_shape_of_the_frequencies():
    assert Bands.dyadic(3)(torch.rand(2, 3, 4)).shape == (3, 2, 3, 4)


def test_hard_edges_belong_to_the_band_above():
    below, edge, above = Bands.split(0.25)(torch.tensor([0.2499, 0.25, 0.2501])).T
    assert below.tolist() == [1, 0]
    assert edge.tolist() == above.tolist() == [0, 1]


def test_round_off_does_not_move_a_frequency_across_a_hard_edge():
    around = torch.tensor([0.1 - 1e-15, 0.1, 0.1 + 1e-15], dtype=torch.float64)
    assert Bands.split(0.1)(around)[1].tolist() == [1, 1, 1]


def test_smooth_edges_are_raised_cosines():
    bands = Bands.split(0.5, transition=0.2)
    high = bands(torch.tensor([0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7], dtype=torch.float64))[1]
    quarter = (1 - 2**-0.5) / 2
    expected = torch.tensor([0, 0, quarter, 0.5, 1 - quarter, 1, 1], dtype=torch.float64)
    torch.testing.assert_close(high, expected)


def test_split_and_dyadic_have_known_edges():
    assert Bands.split(0.25).edges == (0.25,)
    assert Bands.split(0.25).n_bands == 2
    assert Bands.dyadic(2).edges == (0.5,)
    assert Bands.dyadic(4).edges == (0.125, 0.25, 0.5)
    assert Bands((0.1, 0.9), 0.2).transition == 0.2  # reaches 0 and 1 but for round-off


@pytest.mark.usefixtures("as_shipped")
def test_bands_are_values():
    bands = Bands([0.25, 0.5], 0.1)  # a list, as YAML gives it
    assert bands == Bands((0.25, 0.5), 0.1)
    assert hash(bands) == hash(Bands((0.25, 0.5), 0.1))
    assert pickle.loads(pickle.dumps(bands)) == bands  # noqa: S301
    with pytest.raises(AttributeError):
        bands.transition = 0.2


@pytest.mark.parametrize("n", [2, 3, 5])
def test_from_energy_gives_each_band_its_share(n: int):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 2, 64, 64, generator=generator) + 100  # the mean shall not count
    transform = GridTransform((64, 64))
    bands = Bands.from_energy(transform.spectrum(x), n)
    assert bands.n_bands == n
    energy = transform.band_energy(x - x.mean((-1, -2), keepdim=True), bands).sum((0, 1))
    torch.testing.assert_close(
        energy / energy.sum(), torch.full((n,), 1 / n), rtol=0, atol=0.01, check_dtype=False
    )


def test_from_energy_puts_edges_midway_between_frequencies():
    spectrum = Spectrum(torch.tensor([0.0, 0.2, 0.4, 1.0]), torch.tensor([9.0, 2.0, 1.0, 1.0]))
    assert Bands.from_energy(spectrum, 2).edges == pytest.approx((0.3,))
    shuffled = Spectrum(*(values[[2, 0, 3, 1]] for values in spectrum))
    assert Bands.from_energy(shuffled, 2).edges == pytest.approx((0.3,))


@pytest.mark.parametrize(
    ("energy", "n", "cuts"),
    [
        ((0.45, 0.4, 0.1, 0.05), 2, (1,)),  # 45 / 55 is nearer to halves than 85 / 15
        ((0.49, 0.51), 2, (1,)),
        ((0.51, 0.49), 2, (1,)),
        ((0.6, 0.3, 0.1), 3, (1, 2)),  # both thirds are nearest to one cut
        ((0.1, 0.0, 0.8, 0.1), 3, (1, 3)),
        ((0.2, 0.2, 0.2, 0.2, 0.2), 4, (1, 2, 4)),
    ],
)
def test_from_energy_takes_the_edges_nearest_to_equal_energy(energy: tuple, n: int, cuts: tuple):
    frequencies = torch.linspace(0, 1, len(energy) + 1, dtype=torch.float64)
    spectrum = Spectrum(frequencies, torch.tensor((5.0, *energy), dtype=torch.float64))
    expected = [(cut + 0.5) / len(energy) for cut in cuts]
    assert Bands.from_energy(spectrum, n).edges == pytest.approx(expected)


def test_from_energy_keeps_eigenspaces_whole():
    ring = torch.stack([torch.arange(16), (torch.arange(16) + 1) % 16])
    transform = GraphTransform.from_edges(ring, None, 16, dtype=torch.float64)
    x = torch.randn(64, 16, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    distinct = torch.sin(torch.pi * torch.arange(9, dtype=torch.float64) / 16) ** 2
    midways = (distinct[1:] + distinct[:-1]) / 2
    for n in (2, 3, 4):
        for edge in Bands.from_energy(transform.spectrum(x + 50), n).edges:
            assert (midways - edge).abs().min() < 1e-9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((),), "`edges` is empty, expected at least one edge"),
        (((0.0,),), r"`edges` is \(0.0,\), expected cutoffs inside \(0, 1\)"),
        (((0.5, 1.0),), r"`edges` is \(0.5, 1.0\), expected cutoffs inside \(0, 1\)"),
        (((float("nan"),),), r"`edges` is \(nan,\), expected cutoffs inside"),
        (((0.5, 0.25),), r"`edges` is \(0.5, 0.25\), expected ascending edges"),
        (((0.5, 0.5),), "expected ascending edges"),
        (((0.25,), -0.1), "`transition` is -0.1, expected a width of at least 0"),
        (((0.25,), 0.6), "`transition` is 0.6, expected a width .* keeps the edges"),
        (((0.9,), 0.3), "`transition` is 0.3"),
        (((0.25,), float("nan")), "`transition` is nan"),
    ],
)
def test_bands_refuse(arguments: tuple, message: str):
    with pytest.raises(ValueError, match=message):
        Bands(*arguments)


@pytest.mark.parametrize("cutoff", [0.0, 1.0, -0.5, 32.0])
def test_split_refuses_a_cutoff_that_is_no_frequency(cutoff: float):
    with pytest.raises(ValueError, match=r"expected cutoffs inside \(0, 1\)"):
        Bands.split(cutoff)


@pytest.mark.parametrize("n", [1, 0, 2.0, True])
@pytest.mark.usefixtures("as_shipped")
def test_numbers_of_bands_refuse(n: object):
    with pytest.raises(ValueError, match=f"`n` is {n}, expected an integer of at least 2"):
        Bands.dyadic(n)
    with pytest.raises(ValueError, match=f"`n` is {n}, expected an integer of at least 2"):
        Bands.from_energy(Spectrum(torch.tensor([0.0, 1.0]), torch.ones(2)), n)


def test_from_energy_refuses_what_cannot_be_split():
    frequencies = torch.linspace(0, 1, 5)
    for energy in ([3.0, 0, 0, 0, 0], [0.0] * 5, [1.0, 1e-14, 0, 0, 0], [1.0, torch.nan, 0, 0, 0]):
        with pytest.raises(ValueError, match=r"`spectrum` has energy .* well above 0"):
            Bands.from_energy(Spectrum(frequencies, torch.tensor(energy)), 2)
    one = Spectrum(frequencies, torch.tensor([0.0, 0, 1, 0, 0]))
    with pytest.raises(ValueError, match="`n` is 3, expected fewer bands"):
        Bands.from_energy(one, 3)
    at_the_end = Spectrum(frequencies, torch.tensor([0.0, 0, 0, 0, 1]))
    with pytest.raises(ValueError, match="`n` is 2, expected fewer bands"):
        Bands.from_energy(at_the_end, 2)
