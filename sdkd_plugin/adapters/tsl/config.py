"""The group ``sdkd/distill`` of a Hydra configuration, as a `DistillationLoss` on a graph."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from sdkd_plugin._checks import check_choice
from sdkd_plugin.loss import DistillationLoss
from sdkd_plugin.losses import LatentPair
from sdkd_plugin.spectral import Bands, GraphTransform
from sdkd_plugin.teachers import Teacher

_GRAPH = ("normalization", "symmetrization", "method")
_BANDS = ("cutoff", "transition")
_PARAMETERS = inspect.signature(DistillationLoss).parameters.values()
_LOSS = [each.name for each in _PARAMETERS if each.kind is each.KEYWORD_ONLY]


def loss_from_config(
    config: Mapping[str, Any],
    teacher: Teacher | Sequence[Teacher],
    edge_index: Int[Tensor, "2 edges"],
    edge_weight: Float[Tensor, " edges"] | None,
    n_nodes: int,
) -> DistillationLoss:
    """The distillation loss that a configuration describes, such as ``cfg.sdkd.distill``.

    Options are those of `DistillationLoss`, of `GraphTransform.from_edges` (``normalization``,
    ``symmetrization``), and of `Bands`: ``cutoff``, one edge or an ascending list of them, and
    ``transition``. ``latents`` is a list of mappings of the fields of `LatentPair`. ``teacher``,
    the folder of a trained teacher, is for the caller. A missing option has its default.

    Args:
        config: names and values; an OmegaConf configuration too.
        teacher: the model or models; any function, to check a configuration alone.
        edge_index: source and target of each edge.
        edge_weight: not negative; None is 1 for every edge.
        n_nodes: nodes of the graph.

    Raises:
        ValueError: if an option does not exist or does not take its value.

    Example:
        >>> import torch
        >>> ring = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])
        >>> options = {"cutoff": [0.2, 0.5], "kd_weight": 2}
        >>> loss = loss_from_config(options, torch.relu, ring, None, 4)
        >>> loss.bands.edges, loss.kd_weight
        ((0.2, 0.5), 2.0)
    """
    options = {str(name): _plain(value) for name, value in config.items()}
    for name in options:
        check_choice("an option of sdkd.distill", name, ["teacher", *_BANDS, *_GRAPH, *_LOSS])
    options.pop("teacher", None)
    graph = {name: options.pop(name) for name in _GRAPH if name in options}
    transform = GraphTransform.from_edges(edge_index, edge_weight, n_nodes, **graph)
    bands, transition = None, options.pop("transition", 0.0)
    if (cutoff := options.pop("cutoff", None)) is not None:
        edges = tuple(cutoff) if isinstance(cutoff, Sequence) else (cutoff,)
        bands = Bands(edges, transition)
    options["latents"] = [_pair(each) for each in options.get("latents", ())]
    return DistillationLoss(teacher, transform, bands, **options)


def _pair(options: Mapping[str, Any]) -> LatentPair:
    known = [field.name for field in fields(LatentPair) if field.name != "bands"]
    for name in options:
        check_choice("a field of sdkd.distill.latents", name, known)
    index = options.get("teacher_index")
    return LatentPair(**{**options, "teacher_index": None if index is None else int(index)})


def _plain(value: Any) -> Any:
    """Python's lists and mappings for OmegaConf's, and floats for the 1 that YAML reads as int."""
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(each) for each in value]
    return float(value) if type(value) is int else value
