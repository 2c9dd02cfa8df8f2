"""Names that a configuration may use, and the classes they stand for.

Here live the allowlists: what is not in them is not made. Nothing here reads a ``_target_``, and
`refuse_targets` says so to a configuration that has one.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler
from tsl.nn import models

from sdkd_plugin._checks import check_choice
from sdkd_plugin.adapters.tsl.models import SDKDStudent, SDKDTeacher

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

# As the ladder of tsl's examples has them.
_SHORT_NAMES = {
    "dcrnn": "DCRNNModel",
    "gwnet": "GraphWaveNetModel",
    "evolvegcn": "EvolveGCNModel",
    "agcrn": "AGCRNModel",
    "grugcn": "GRUGCNModel",
    "gatedgn": "GatedGraphNetworkModel",
    "stcn": "STCNModel",
    "transformer": "TransformerModel",
    "ar": "ARModel",
    "var": "VARModel",
    "rnn": "RNNModel",
    "fcrnn": "FCRNNModel",
    "tcn": "TCNModel",
}


def _models() -> dict[str, type[nn.Module]]:
    ours: dict[str, type[nn.Module]] = {"sdkd_student": SDKDStudent, "sdkd_teacher": SDKDTeacher}
    short = {name: getattr(models, full) for name, full in _SHORT_NAMES.items()}
    # By class name all that tsl exports: this grows with tsl.
    full = {name: getattr(models, name) for name in models.classes if name != "BaseModel"}
    return ours | short | full


def get_model_class(name: str) -> type[nn.Module]:
    """The model of a name, in place of the ladder that tsl's example scripts have.

    Args:
        name: ``sdkd_student`` or ``sdkd_teacher``; a name of tsl's examples, such as ``gwnet``; or
            the name of a class in ``tsl.nn.models``.

    Raises:
        ValueError: if there is none of that name; the message lists them.

    Example:
        >>> get_model_class("sdkd_student").__name__, get_model_class("gwnet").__name__
        ('SDKDStudent', 'GraphWaveNetModel')
    """
    known = _models()
    check_choice("model.name", name, known)
    return known[name]


def make_model(name: str, sizes: Mapping[str, Any], options: Mapping[str, Any]) -> nn.Module:
    """A model of a name, with the sizes that the data give and the options of a configuration.

    Args:
        name: as `get_model_class` takes it.
        sizes: such as ``n_nodes`` and ``horizon``; a model gets those that it takes.
        options: of the configuration, its ``hparams``; all go to the model, before the sizes.

    Raises:
        ValueError: if the model does not take an option or refuses its value, or lacks one.

    Example:
        >>> sizes = {"input_size": 1, "window": 12, "horizon": 12, "n_nodes": 5, "unheard_of": 1}
        >>> type(make_model("sdkd_student", sizes, {"hidden_size": 8})).__name__
        'SDKDStudent'
    """
    network = get_model_class(name)
    taken = inspect.signature(network).parameters
    for option in options:
        check_choice(f"model.hparams of {name}", option, taken)
    arguments = {size: value for size, value in sizes.items() if size in taken} | dict(options)
    lacking = [
        each.name
        for each in taken.values()
        if each.default is each.empty and each.name not in arguments and each.kind not in _VARIADIC
    ]
    if lacking:
        raise ValueError(
            f"`model.hparams` of {name} lacks {lacking}, expected values for all that the model "
            "has no default for; add them to the configuration."
        )
    return network(**arguments)


def get_optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The optimizer of ``torch.optim`` of a name.

    Raises:
        ValueError: if there is none of that name; the message lists them.

    Example:
        >>> get_optimizer_class("AdamW").__name__
        'AdamW'
    """
    known = _subclasses(torch.optim, torch.optim.Optimizer)
    check_choice("optimizer.name", name, known)
    return known[name]


def get_scheduler_class(name: str) -> type[lr_scheduler.LRScheduler]:
    """The learning-rate scheduler of ``torch.optim.lr_scheduler`` of a name.

    Raises:
        ValueError: if there is none of that name; the message lists them.

    Example:
        >>> get_scheduler_class("MultiStepLR").__name__
        'MultiStepLR'
    """
    known = _subclasses(lr_scheduler, lr_scheduler.LRScheduler)
    check_choice("lr_scheduler.name", name, known)
    return known[name]


def check_hparams(argument: str, kind: type, options: Mapping[str, Any]) -> None:
    """Refuse options that a class does not take.

    Args:
        argument: how the configuration calls them.
        kind: whose constructor they are for.
        options: by name.

    Raises:
        ValueError: at the first unknown one, listing those there are.

    Example:
        >>> check_hparams("optimizer.hparams", torch.optim.Adam, {"lr": 1e-3})
    """
    for option in options:
        check_choice(argument, option, inspect.signature(kind).parameters)


def _subclasses(module: Any, base: type) -> dict[str, Any]:
    """The public proper subclasses of a class in a module, by name."""
    return {
        name: value
        for name, value in sorted(vars(module).items())
        if isinstance(value, type) and issubclass(value, base) and value is not base
        if not name.startswith("_")
    }


def refuse_targets(config: Any, path: str = "config") -> None:
    """Refuse a configuration that names code to run, as Hydra's ``instantiate`` would.

    Models, optimizers, schedulers and loggers are made by their ``name`` here, from lists; a
    ``_target_`` would do nothing, and whoever wrote it expects something.

    Args:
        config: mappings and sequences, an OmegaConf configuration too.
        path: where it lies, for the message.

    Raises:
        ValueError: at the first ``_target_``, naming it and where it is.

    Example:
        >>> refuse_targets({"model": {"name": "gwnet"}})
    """
    if isinstance(config, Mapping):
        if "_target_" in config:
            raise ValueError(
                f"`{path}._target_` is {config['_target_']!r}, expected none: nothing that a "
                "configuration names is run; give a `name` of those that are known."
            )
        for key, value in config.items():
            refuse_targets(value, f"{path}.{key}")
    elif isinstance(config, Sequence) and not isinstance(config, str):
        for i, value in enumerate(config):
            refuse_targets(value, f"{path}[{i}]")
