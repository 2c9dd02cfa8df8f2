"""The classes that a configuration may name; any other is never made."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler
from tsl.nn import models

from sdkd_plugin._checks import check_choice
from sdkd_plugin.adapters.tsl.models import SDKDStudent, SDKDTeacher


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


def make_model(name: str, sizes: Mapping[str, Any], options: Mapping[str, Any]) -> nn.Module:
    """Make a model from the sizes of the data and the options of a configuration.

    Args:
        name: as in `get_model_class`.
        sizes: such as ``n_nodes`` and ``horizon``; those that the model does not take are left out.
        options: the configuration's ``hparams``; they override sizes of the same name.

    Raises:
        ValueError: if the model does not take an option, refuses its value, or lacks an argument.

    Example:
        >>> sizes = {"input_size": 1, "window": 12, "horizon": 12, "n_nodes": 5, "classes": 2}
        >>> type(make_model("sdkd_student", sizes, {"hidden_size": 8})).__name__
        'SDKDStudent'
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
    return network(**arguments)


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
