"""What a configuration may name: classes, and no other is made, and the group ``sdkd/distill``."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim import lr_scheduler
from tsl.nn import models

from sdkd_plugin._checks import check_choice
from sdkd_plugin.adapters.tsl.models import SDKDStudent, SDKDTeacher
from sdkd_plugin.loss import DistillationLoss
from sdkd_plugin.losses import LatentPair
from sdkd_plugin.spectral import Bands, GraphTransform
from sdkd_plugin.teachers import Teacher

_GRAPH = ("normalization", "symmetrization", "method")
_BANDS = ("cutoff", "transition")
_PARAMETERS = inspect.signature(DistillationLoss).parameters.values()
_LOSS = [each.name for each in _PARAMETERS if each.kind is each.KEYWORD_ONLY]


def get_model_class(name: str) -> type[nn.Module]:
    """The model of a name.

    Args:
        name: ``sdkd_student`` or ``sdkd_teacher``; the name of a class in ``tsl.nn.models``, or its
            short form in tsl's examples, such as ``dcrnn`` for ``DCRNNModel``.

    Raises:
        ValueError: if there is none of that name, listing them.

    Example:
        >>> get_model_class("sdkd_student").__name__, get_model_class("gwnet").__name__
        ('SDKDStudent', 'GraphWaveNetModel')
    """
    full = {each: getattr(models, each) for each in models.classes if each != "BaseModel"}
    known = {"sdkd_student": SDKDStudent, "sdkd_teacher": SDKDTeacher}
    known |= {each.removesuffix("Model").lower(): kind for each, kind in full.items()}
    known |= {"gwnet": models.GraphWaveNetModel, "gatedgn": models.GatedGraphNetworkModel} | full
    check_choice("model.name", name, known)
    return known[name]


def model_arguments(
    name: str, sizes: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of a model: those sizes of the data that it takes, and a configuration's options.

    A ValueError if the model does not take an option, or lacks an argument. Options override sizes
    of the same name.
    """
    network = get_model_class(name)
    check_hparams(f"model.hparams of {name}", network, options)
    signature = inspect.signature(network)
    arguments = {size: value for size, value in sizes.items() if size in signature.parameters}
    arguments |= options
    try:
        signature.bind(**arguments)
    except TypeError as error:
        wrong = f"`model.hparams` of {name}: {error}; add it to the configuration."
        raise ValueError(wrong) from error
    return arguments


def make_model(name: str, sizes: Mapping[str, Any], options: Mapping[str, Any]) -> nn.Module:
    """The model of a name.

    Args:
        name: as in `get_model_class`.
        sizes: such as ``n_nodes`` and ``horizon``; those that the model does not take are left out.
        options: the configuration's ``hparams``; they override sizes of the same name.

    Raises:
        ValueError: if the model does not take an option, or lacks an argument.

    Example:
        >>> sizes = {"input_size": 1, "output_size": 1, "horizon": 3, "n_nodes": 5}
        >>> make_model("rnn", sizes, {"hidden_size": 8}).input_encoder[0]
        Linear(in_features=1, out_features=8, bias=True)
    """
    return get_model_class(name)(**model_arguments(name, sizes, options))


def get_optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The optimizer of a name in ``torch.optim``; a ValueError lists them if there is none."""
    return _subclass("optimizer.name", name, torch.optim, torch.optim.Optimizer)


def get_scheduler_class(name: str) -> type[lr_scheduler.LRScheduler]:
    """The scheduler of a name in ``torch.optim.lr_scheduler``; a ValueError lists them."""
    return _subclass("lr_scheduler.name", name, lr_scheduler, lr_scheduler.LRScheduler)


def _subclass(argument: str, name: str, module: Any, base: type) -> Any:
    classes = {name: each for name, each in vars(module).items() if isinstance(each, type)}
    public = sorted(each for each in classes if not each.startswith("_"))
    check_choice(argument, name, [n for n in public if base in classes[n].__mro__[1:]])
    return classes[name]


def check_hparams(argument: str, kind: type, options: Mapping[str, Any]) -> None:
    """Refuse options that a class does not take; ``argument`` is their name in the configuration.

    Raises:
        ValueError: at the first unknown option, listing the known ones.
    """
    for option in options:
        check_choice(argument, option, inspect.signature(kind).parameters)


def refuse_targets(config: Any, path: str = "config") -> None:
    """Refuse a configuration that names code to run, as Hydra's ``instantiate`` would.

    Hydra itself runs what its own section names (``hydra.callbacks``, ``hydra.job_logging``,
    launchers and sweepers) before a script can look at it: read foreign files before a run.

    Raises:
        ValueError: at the first ``_target_``, with its place below ``path``.
    """
    if isinstance(config, Mapping):
        for key, value in config.items():
            if key == "_target_":
                raise ValueError(
                    f"`{path}._target_` is {value!r}, expected none: models, optimizers and "
                    "schedulers are made by their `name`, from lists."
                )
            refuse_targets(value, f"{path}.{key}")
    elif isinstance(config, Sequence) and not isinstance(config, str):
        for i, value in enumerate(config):
            refuse_targets(value, f"{path}[{i}]")


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
