"""Sensors that teacher and student do not share: matching by id, and what follows from it.

Here live the match, the teacher's wrapper and the transform for it. Batches whose samples have
graphs of their own are in `graphs`.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sdkd_plugin._checks import check_choice, check_positive, check_positive_int, check_shape
from sdkd_plugin.spectral import AbstractTransform, Bands, GraphTransform
from sdkd_plugin.teachers import accepted_inputs

Unknown = Literal["refuse", "ignore"]


class SensorMatch(NamedTuple):
    """Which sensors of a teacher and a student are the same.

    Attributes:
        teacher: places of the shared sensors in the teacher's order.
        student: places of the same sensors in the student's order, ascending.
    """

    teacher: Tensor
    student: Tensor


def match_sensors(
    teacher_ids: Sequence[object], student_ids: Sequence[object], *, unknown: Unknown = "refuse"
) -> SensorMatch:
    """Match sensors by id, as text: 400001 and "400001" are the same.

    Args:
        teacher_ids: of the teacher's nodes, in its order.
        student_ids: of the student's.
        unknown: whether sensors of the student that the teacher does not know are an error, or
            left out.

    Raises:
        ValueError: if an id is there twice, the teacher does not know a sensor and that was
            refused, or there is no shared sensor at all.

    Example:
        >>> match_sensors(["a", "b", "c"], ["c", "a"]).teacher
        tensor([2, 0])
    """
    check_choice("unknown", unknown, get_args(Unknown))
    mine, theirs = [str(i) for i in student_ids], [str(i) for i in teacher_ids]
    for argument, ids in (("teacher_ids", theirs), ("student_ids", mine)):
        if twice := [i for i, n in Counter(ids).items() if n > 1]:
            raise ValueError(f"`{argument}` has {twice[:5]} more than once, expected each id once.")
    place = {name: i for i, name in enumerate(theirs)}
    new = [i for i in mine if i not in place]
    if new and (unknown == "refuse" or len(new) == len(mine)):
        raise ValueError(
            f"`student_ids` has {len(new)} of {len(mine)} sensors that the teacher does not know, "
            f"such as {new[:5]}, expected ids among the teacher's: it can say nothing of these. "
            "Drop them, or leave them to the labels with unknown='ignore' and a SharedSensors "
            "transform."
        )
    shared = [i for i, name in enumerate(mine) if name in place]
    return SensorMatch(torch.tensor([place[mine[i]] for i in shared]), torch.tensor(shared))


class OnSensors(nn.Module):
    """A teacher asked on its own graph, and heard at the student's sensors.

    Where the student has all of the teacher's sensors, the teacher reads them from the student's
    window ``x``. Where it has dropped some, the teacher cannot do without them: the batch must hold
    the window of all the teacher's sensors as ``teacher_x`` (a tsl covariate of that name), in the
    teacher's order and in the student's scaled units. Covariates ``u`` must be shared by all
    sensors.

    Other sensors have another mean: the scalers of both are needed, to read and to answer in the
    student's units, ``(value - bias) / scale``.

    At sensors of the student that the teacher does not know the answer is 0 and means nothing:
    `DistillationPredictor` insists on a `SharedSensors` transform then.

    Args:
        teacher: a graph model in tsl's layout.
        match: of `match_sensors`.
        n_teacher: sensors of the teacher.
        n_student: sensors of the student.
        teacher_scaler: bias and scale that the teacher was trained with.
        student_scaler: bias and scale of the student's data.
        edge_index: the teacher's graph.
        edge_weight: its weights.

    Raises:
        ValueError: if the numbers do not fit the match, or a scale is not positive; in forward, if
            ``teacher_x`` is needed and missing, is of another number of sensors, or the covariates
            are not shared.

    Example:
        >>> from sdkd_plugin.models import GraphMixer
        >>> teacher = GraphMixer(horizon=6, window=12, n_nodes=3)
        >>> match = match_sensors("abc", "ca")
        >>> edges = torch.tensor([[0, 1], [1, 2]])
        >>> wrapped = OnSensors(teacher, match, 3, 2, (50.0, 10.0), (55.0, 8.0), edges)
        >>> x, teacher_x = torch.randn(4, 12, 2, 1), torch.randn(4, 12, 3, 1)
        >>> wrapped(x, teacher_x=teacher_x).shape
        torch.Size([4, 6, 2, 1])
    """

    edge_index: Tensor
    edge_weight: Tensor | None
    at_teacher: Tensor
    at_student: Tensor

    def __init__(
        self,
        teacher: nn.Module,
        match: SensorMatch,
        n_teacher: int,
        n_student: int,
        teacher_scaler: tuple[float, float],
        student_scaler: tuple[float, float],
        edge_index: Int[Tensor, "2 edges"],
        edge_weight: Float[Tensor, " edges"] | None = None,
    ) -> None:
        super().__init__()
        for argument, number, places in (
            ("n_teacher", n_teacher, match.teacher),
            ("n_student", n_student, match.student),
        ):
            check_positive_int(argument, number, minimum=int(places.max()) + 1)
        for argument, (_, scale) in (
            ("teacher_scaler", teacher_scaler),
            ("student_scaler", student_scaler),
        ):
            check_positive(f"{argument}[1]", scale)
        self.teacher = teacher
        self.teacher_scaler = teacher_scaler
        self.student_scaler = student_scaler
        self.n_teacher = n_teacher
        self.n_student = n_student
        self.register_buffer("edge_index", edge_index, persistent=False)
        self.register_buffer("edge_weight", edge_weight, persistent=False)
        self.register_buffer("at_teacher", match.teacher, persistent=False)
        self.register_buffer("at_student", match.student, persistent=False)

    def forward(
        self,
        x: Float[Tensor, "batch time sensors features"],
        teacher_x: Float[Tensor, "batch time teacher_sensors features"] | None = None,
        u: Float[Tensor, "..."] | None = None,
    ) -> Float[Tensor, "batch horizon sensors outputs"]:
        """The teacher's forecast at the student's sensors, 0 where it knows none."""
        if teacher_x is None:
            if len(self.at_teacher) < self.n_teacher:
                raise ValueError(
                    f"`teacher_x` is None, but the student's window has {len(self.at_teacher)} of "
                    f"the teacher's {self.n_teacher} sensors: add the window of all of them to the "
                    "data set as the covariate teacher_x, or ask the teacher beforehand."
                )
            order = torch.empty_like(self.at_student)
            order[self.at_teacher] = self.at_student
            teacher_x = x[:, :, order]
        check_shape(
            "sensors of teacher_x", teacher_x.shape[2:3], (self.n_teacher,), "the teacher's own"
        )
        if u is not None and u.ndim > 3:
            raise ValueError(
                f"`u` has shape {tuple(u.shape)}, expected (batch, time, features): covariates "
                "that all sensors share, for the teacher has other sensors."
            )
        inputs = {"edge_index": self.edge_index, "edge_weight": self.edge_weight, "u": u}
        inputs = {name: value for name, value in inputs.items() if value is not None}
        (bias, scale), (own_bias, own_scale) = self.student_scaler, self.teacher_scaler
        read = (teacher_x * scale + (bias - own_bias)) / own_scale
        forecast = self.teacher(read, **accepted_inputs(self.teacher, inputs))
        forecast = (forecast * own_scale + (own_bias - bias)) / scale
        out = forecast.new_zeros(*forecast.shape[:2], self.n_student, *forecast.shape[3:])
        return out.index_copy(2, self.at_student, forecast.index_select(2, self.at_teacher))


class SharedSensors(AbstractTransform):
    """The transform of some of the nodes, on fields that have more: the others do not count.

    For a student with sensors that its teacher does not know. Energies are scaled by nodes over
    shared nodes, so that losses are means over the shared ones.

    Args:
        transform: of the graph of the shared sensors, in the order of ``places``.
        places: of the shared sensors in the student's order, as ``match_sensors(...).student``.
        n_nodes: of the student.

    Raises:
        ValueError: if the transform has another number of nodes than ``places``, or a place is out
            of range.

    Example:
        >>> pair = GraphTransform.from_edges(torch.tensor([[0, 1], [1, 0]]), None, 2)
        >>> shared = SharedSensors(pair, torch.tensor([0, 2]), 3)
        >>> x = torch.tensor([[[1.0], [9.0], [1.0]]])
        >>> shared.sample_band_energy(x, Bands.split(0.5)).round(decimals=4)
        tensor([[3., 0.]])
    """

    places: Tensor

    def __init__(
        self, transform: GraphTransform, places: Int[Tensor, " shared"], n_nodes: int
    ) -> None:
        super().__init__()
        check_shape("transform", transform.domain_shape, tuple(places.shape), "one node a place")
        if len(places) == 0 or int(places.min()) < 0 or int(places.max()) >= n_nodes:
            raise ValueError(
                f"`places` is {places.tolist()}, expected nodes from 0 to {n_nodes - 1}."
            )
        self.transform = transform
        self.n_nodes = n_nodes
        self.register_buffer("places", places, persistent=False)

    @property
    def domain_shape(self) -> tuple[int, ...]:
        """The number of the student's nodes."""
        return (self.n_nodes,)

    @property
    def domain_axes(self) -> tuple[int, ...]:
        """The axis before the features."""
        return (-2,)

    @property
    def channel_axis(self) -> int:
        """The last axis."""
        return -1

    def resized(self, domain_shape: tuple[int, ...]) -> "SharedSensors":
        """The same transform: a graph has one size.

        Raises:
            ValueError: if another number of nodes is asked for.
        """
        check_shape("domain_shape", domain_shape, self.domain_shape, "the student's nodes")
        return self

    def sample_band_energy(
        self, x: Float[Tensor, "batch ..."], bands: Bands
    ) -> Float[Tensor, "batch n_bands"]:
        """See `AbstractTransform`; of the shared nodes, times nodes over shared nodes."""
        check_shape("nodes of a field", x.shape[-2:-1], self.domain_shape, "the student's")
        energy = self.transform.sample_band_energy(x.index_select(-2, self.places), bands)
        return energy * (self.n_nodes / len(self.places))

    def filter(
        self,
        x: Float[Tensor, "..."],
        response: Callable[[Tensor], Tensor] | Float[Tensor, "..."],
    ) -> Float[Tensor, "..."]:
        """See `AbstractTransform`; nodes that are not shared become 0."""
        check_shape("nodes of a field", x.shape[-2:-1], self.domain_shape, "the student's")
        filtered = self.transform.filter(x.index_select(-2, self.places), response)
        return torch.zeros_like(x).index_copy(-2, self.places, filtered)
