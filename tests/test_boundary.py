"""What lies beyond a grid's edges must be the same for the student and for the transform."""

import warnings

import pytest
import torch
from torch import nn

from sdkd_plugin import DistillationLoss, GraphTransform, GridTransform, ProductTransform
from sdkd_plugin import SDKDDistiller as Distiller
from sdkd_plugin.adapters.neuralop import TrainerLoss
from sdkd_plugin.models import MLPMixer, ResNet, SimVP, STAlterNet, UNet

FRAMES = {"in_channels": 2, "out_channels": 2, "width": 8}
GRID = (16, 16)
MODELS = {
    "UNet": lambda padding: UNet(**FRAMES, padding=padding),
    "ResNet": lambda padding: ResNet(**FRAMES, padding=padding),
    "MLPMixer": lambda padding: MLPMixer(**FRAMES, shape=GRID, padding=padding),
    "SimVP": lambda padding: SimVP(**FRAMES, padding=padding),
    "STAlterNet": lambda padding: STAlterNet(**FRAMES, padding=padding),
    "torch": lambda padding: nn.Conv2d(
        2, 2, 3, padding=1, padding_mode="circular" if padding == "periodic" else "replicate"
    ),
}
TEACHER = nn.Conv2d(2, 2, 1)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("boundary", ["periodic", "reflect"])
def test_a_student_with_another_boundary_than_the_transform_is_a_warning(model, boundary):
    transform = GridTransform(GRID, boundary)
    Distiller(TEACHER, MODELS[model](boundary), transform)  # a warning would be an error
    other = MODELS[model]({"periodic": "reflect", "reflect": "periodic"}[boundary])
    message = rf"`student` .* the edges of the grid and `transform` has boundary='{boundary}'"
    with pytest.warns(UserWarning, match=message) as caught:
        Distiller(TEACHER, other, transform)
    assert [each.filename for each in caught] == [__file__]
    with pytest.warns(UserWarning, match=message):
        TrainerLoss(DistillationLoss(TEACHER, transform), other)
    with pytest.warns(UserWarning, match=message):
        Distiller(TEACHER, other, ProductTransform(transform, 2))


def test_a_script_that_makes_many_distillers_is_warned_once():
    student = MODELS["UNet"]("periodic")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            Distiller(TEACHER, student, GridTransform(GRID, "reflect"))
    assert len(caught) == 1


def test_what_says_nothing_of_the_edges_is_no_warning():
    both = nn.Sequential(MODELS["torch"]("periodic"), MODELS["torch"]("reflect"))  # an axis each
    for student in (
        MODELS["UNet"]("zeros"),
        nn.Conv2d(2, 2, 3, padding=1),
        nn.Linear(16, 16),
        both,
    ):
        for boundary in ("periodic", "reflect"):
            Distiller(TEACHER, student, GridTransform(GRID, boundary))
    edges = torch.tensor([[0, 1], [1, 0]])
    ring = GraphTransform.from_edges(edges, torch.ones(2), 2)
    Distiller(TEACHER, MODELS["UNet"]("periodic"), ring)


@pytest.mark.usefixtures("as_shipped")
def test_a_mask_does_not_help_a_missing_input():
    x, y = torch.randn(2, 3, 2, *GRID)
    x[0, 0, 0, 0] = torch.nan
    distiller = Distiller(TEACHER, nn.Conv2d(2, 2, 1), GridTransform(GRID))
    with pytest.raises(ValueError, match=r"`x` has 1 .* fill them, since a mask covers labels"):
        distiller.step(x, y, ~x.isnan())
    y[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"`y` has 1 .* or mask them out"):
        distiller.step(x.nan_to_num(), y)
    assert distiller.step(x.nan_to_num(), y, ~y.isnan()).total.isfinite()
