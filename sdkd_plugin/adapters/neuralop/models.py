"""The grid models, registered as neuraloperator models under names that begin with ``sdkd_``."""

import inspect
from collections.abc import Callable
from typing import Any, cast

from neuralop.models.base_model import BaseModel
from torch import Tensor, nn

from sdkd_plugin._checks import check_choice
from sdkd_plugin.models import MLPMixer, ResNet, SimVP, STAlterNet, UNet


def register(name: str, network: Callable[..., nn.Module]) -> type[BaseModel]:
    """Make a neuraloperator model of a grid model, for `get_model` and its checkpoints.

    The model takes the network's own keyword arguments. Its forward ignores whatever else is in
    a sample, as the host's ``Trainer`` passes all of it.

    Args:
        name: under which the host finds it, in lower case.
        network: makes the network from keyword arguments.

    Returns:
        the registered class.

    Raises:
        ValueError: if the name is taken.
    """
    if name.lower() in BaseModel._models:
        taken = BaseModel._models[name.lower()]
        raise ValueError(
            f"`name` is {name!r}, which neuraloperator has registered for "
            f"{taken.__module__}.{taken.__qualname__}: choose another."
        )
    allowed = list(inspect.signature(network).parameters)

    class Model(BaseModel, name=name):  # type: ignore[call-arg]  # untyped host
        def __init__(self, **options: Any) -> None:
            super().__init__()
            for option in options:
                check_choice(f"{name} option", option, allowed)
            self.network = network(**options)

        @property
        def taps(self) -> dict[str, str]:
            """Tap names and module paths, the network's own."""
            taps = cast(dict[str, str], self.network.taps)
            return {tap: f"network.{path}" for tap, path in taps.items()}

        def forward(self, x: Tensor, **sample: Any) -> Tensor:
            """Forecast, from ``x`` alone."""
            forecast: Tensor = self.network(x)
            return forecast

    Model.__name__ = Model.__qualname__ = f"SDKD{network.__name__}"
    Model.__doc__ = f"`{network.__name__}` as the neuraloperator model {name!r}."
    return Model


REGISTERED: dict[str, type[BaseModel]] = {
    name: register(name, network)
    for name, network in {
        "sdkd_stalternet": STAlterNet,
        "sdkd_simvp": SimVP,
        "sdkd_unet": UNet,
        "sdkd_resnet": ResNet,
        "sdkd_mlp_mixer": MLPMixer,
    }.items()
}
"""The registered classes by name."""
