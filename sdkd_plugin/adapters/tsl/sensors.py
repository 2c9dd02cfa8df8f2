"""Sensors that teacher and student do not share: matched by id, and a teacher read out at them."""

from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sdkd_plugin._checks import check_choice, check_positive, check_positive_int, check_shape
from sdkd_plugin.teachers import accepted_inputs

Unknown = Literal["refuse", "ignore"]


class SensorMatch(NamedTuple):
    """Places of the shared sensors: in the teacher's order, and in the student's (ascending)."""

    teacher: Tensor
    student: Tensor


def match_sensors(
    teacher_ids: Sequence[object], student_ids: Sequence[object], *, unknown: Unknown = "refuse"
) -> SensorMatch:
    """Match sensors by id, as text: 400001 and "400001" are the same.

    Args:
        teacher_ids: of the teacher's nodes, in its order.
        student_ids: of the student's nodes, in its order.
        unknown: whether student sensors that the teacher does not know are refused or left out.

    Raises:
        ValueError: if an id is there twice, a sensor is refused, or no sensor is shared.

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
            f"such as {new[:5]}, expected ids among the teacher's: drop them, or train them on "
            "labels alone with unknown='ignore' and a SharedSensors transform."
        )
    shared = [i for i, name in enumerate(mine) if name in place]
    return SensorMatch(torch.tensor([place[mine[i]] for i in shared]), torch.tensor(shared))


class OnSensors(nn.Module):
    """A teacher that forecasts on its own graph, read out at the student's sensors.

    The teacher reads the student's window ``x`` where that has all of its sensors. Otherwise the
    batch must hold the window of all the teacher's sensors as ``teacher_x`` (a tsl covariate of
    that name), in the teacher's order and in the student's scaled units. Readings are converted
    from the student's units, ``(value - bias) / scale``, to the teacher's, and forecasts back.
    Covariates ``u`` must be shared by all sensors. At sensors that the teacher does not know the
    forecast is 0 and has no meaning: `DistillationPredictor` demands a `SharedSensors` transform.

    Args:
        teacher: a graph model in tsl's layout.
        match: from `match_sensors`.
        n_teacher, n_student: numbers of their sensors.
        teacher_scaler, student_scaler: bias and scale of the data that each is trained on.
        edge_index, edge_weight: the teacher's graph.

    Raises:
        ValueError: if a number does not fit the match, or a scale is not positive; in forward, if
            ``teacher_x`` is missing or of other sensors, or the covariates are not shared.

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
        check_positive_int("n_teacher", n_teacher, minimum=int(match.teacher.max()) + 1)
        check_positive_int("n_student", n_student, minimum=int(match.student.max()) + 1)
        check_positive("teacher_scaler[1]", teacher_scaler[1])
        check_positive("student_scaler[1]", student_scaler[1])
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
                    f"the teacher's {self.n_teacher} sensors: add the window of all to the data "
                    "set as the covariate teacher_x."
                )
            order = torch.empty_like(self.at_student)
            order[self.at_teacher] = self.at_student
            teacher_x = x[:, :, order]
        check_shape("sensors of teacher_x", teacher_x.shape[2:3], (self.n_teacher,))
        if u is not None and u.ndim > 3:
            raise ValueError(
                f"`u` has shape {tuple(u.shape)}, expected (batch, time, features): covariates "
                "that all sensors share."
            )
        graph = {"edge_index": self.edge_index, "edge_weight": self.edge_weight, "u": u}
        inputs = {name: value for name, value in graph.items() if value is not None}
        (bias, scale), (own_bias, own_scale) = self.student_scaler, self.teacher_scaler
        read = (teacher_x * scale + (bias - own_bias)) / own_scale
        forecast = self.teacher(read, **accepted_inputs(self.teacher, inputs))
        forecast = (forecast * own_scale + (own_bias - bias)) / scale
        out = forecast.new_zeros(*forecast.shape[:2], self.n_student, *forecast.shape[3:])
        return out.index_copy(2, self.at_student, forecast.index_select(2, self.at_teacher))
