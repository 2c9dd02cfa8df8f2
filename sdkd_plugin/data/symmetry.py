"""Exact symmetries of equations: labelled samples and inputs that follow from those one has."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

Map = Callable[[Tensor], Tensor]
LARGEST = 4096  # elements of a group


class Symmetry:
    """A finite group under which solutions stay solutions; each sample gets a random element.

    If x leads to y, then g(x) leads to g(y) for every g of the group, at no cost. Called with ``x``
    alone it is an ``augmentation`` of `SDKDDistiller`; `together` gives all tensors of a sample the
    same element.

    Args:
        name: of the equation or of its group.
        generators: functions of fields ``(..., *grid)`` that move the values of the grid's points
            and may change their signs; the group is all their products. A sign is that of the
            models' units: normalised fields must have the mean 0.
        axes: of the grid, the last ones.
        generator: of the random numbers, on the CPU; torch's global one by default.

    Raises:
        ValueError: in a call, if a function does something else, or the group is too large.

    Example:
        >>> mirror = Symmetry("even", [lambda x: x.flip(-1)], axes=1)
        >>> mirror.elements((3,)).tolist()
        [[1, 2, 3], [3, 2, 1]]
    """

    def __init__(
        self,
        name: str,
        generators: Sequence[Map],
        *,
        axes: int = 2,
        generator: torch.Generator | None = None,
    ) -> None:
        self.name, self.generators, self.axes = name, tuple(generators), axes
        self.generator = generator
        self._tables: dict[tuple[int, ...], Tensor] = {}

    def __repr__(self) -> str:
        return f"Symmetry({self.name!r}, {list(self.generators)})"

    def elements(self, grid: Sequence[int]) -> Tensor:
        """The group on a grid, ``(elements, points)``.

        An element puts the value of point ``abs(entry) - 1`` at the entry's place, with the
        entry's sign.
        """
        if (shape := tuple(grid)) not in self._tables:
            self._tables[shape] = _closed([_moved(g, shape) for g in self.generators])
        return self._tables[shape]

    def together(self, *values: Tensor) -> list[Tensor]:
        """The values with one random element a sample; flags are moved and keep their sign.

        Args:
            *values: of shape ``(batch, ..., *grid)``. One whose grid has a single point is left.
        """
        grids = {tuple(value.shape[-self.axes :]) for value in values}
        single = {(1,) * self.axes}
        (grid,) = grids - single or single
        group = self.elements(grid)
        drawn = group[torch.randint(len(group), (len(values[0]),), generator=self.generator)]
        return [_applied(drawn, value, self.axes) for value in values]

    def __call__(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """The batch with one random element a sample."""
        return self.together(x)[0]


def navier_stokes_symmetry(generator: torch.Generator | None = None) -> Symmetry:
    """The symmetries that the FNO recipe's forcing leaves to the vorticity equation on a torus.

    Translations by (d, -d); the turn by 180 degrees with a shift of x + y by a quarter; and
    -w(y, x) with a shift by a half. On a grid of n x n points they are 4 n elements; n must be a
    multiple of 4. The vorticity's mean is 0, so that normalised fields have them too.

    Example:
        >>> len(navier_stokes_symmetry().elements((16, 16)))
        64
    """
    generators = [_along_the_forcing, _half_turn, _mirrored]
    return Symmetry("forced Navier-Stokes", generators, generator=generator)


def _along_the_forcing(w: Tensor) -> Tensor:
    return w.roll((1, -1), (-2, -1))


def _half_turn(w: Tensor) -> Tensor:
    # Point i goes to -i, which is place n - 1 - i after a flip and one step.
    return w.flip(-2, -1).roll((1 + _part(w, 4), 1), (-2, -1))


def _mirrored(w: Tensor) -> Tensor:
    return -w.mT.roll(_part(w, 2), -2)


def _part(w: Tensor, of: int) -> int:
    if w.shape[-1] != w.shape[-2] or w.shape[-1] % 4:
        raise ValueError(
            f"the grid has {tuple(w.shape[-2:])} points, expected n x n with n a multiple of 4, on "
            "which the symmetries of the forcing move points to points."
        )
    return w.shape[-1] // of


def _moved(generator: Map, grid: tuple[int, ...]) -> Tensor:
    places = torch.arange(1, 1 + torch.Size(grid).numel())
    moved = generator(places.double().reshape(grid))
    table = moved.round().int().flatten()
    if moved.shape != grid or not torch.equal(table.abs().sort().values, places.int()):
        raise ValueError(
            f"`generators` has {generator!r}, which does more on a grid of {grid} than to move "
            "points and change signs, expected a function such as `lambda x: x.flip(-1)`."
        )
    return table


def _closed(generators: list[Tensor]) -> Tensor:
    """All products of the generators."""
    identity = torch.arange(1, 1 + len(generators[0])).int()
    found = {tuple(identity.tolist()): identity}
    new = [identity]
    while new:
        products = [_product(g, element) for element in new for g in generators]
        new = [
            found.setdefault(key, p) for p in products if (key := tuple(p.tolist())) not in found
        ]
        if len(found) > LARGEST:
            raise ValueError(f"`generators` make more than {LARGEST} elements, expected fewer.")
    return torch.stack(list(found.values()))


def _product(first: Tensor, then: Tensor) -> Tensor:
    return first[then.abs().long() - 1] * then.sign()


def _applied(elements: Tensor, value: Tensor, axes: int) -> Tensor:
    if value.shape[-axes:].numel() == 1:
        return value
    flat = value.flatten(-axes)
    table = elements.to(value.device).reshape(len(value), *[1] * (flat.ndim - 2), -1)
    moved = flat.gather(-1, (table.abs().long() - 1).expand(flat.shape))
    if value.dtype != torch.bool:
        moved = moved * table.sign().to(moved.dtype)
    return moved.reshape(value.shape)
