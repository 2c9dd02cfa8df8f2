"""Flows of APEBench, simulated once by its own solvers and kept as files.

Source: Koehler et al., NeurIPS 2024, arXiv 2411.00180. Later runs need the files alone.
"""

import os
import re
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sdkd_plugin._checks import check_finite, check_type, shown
from sdkd_plugin._explained import explained
from sdkd_plugin.data.store import load_or_compute


@explained
def apebench_trajectories(
    scenario: str, *, folder: str | os.PathLike[str] | None = None, **options: Any
) -> tuple[Float[Tensor, "samples time channels ..."], Float[Tensor, "tests times channels ..."]]:
    """Trajectories of a scenario of APEBench for training and for the test, initial states first.

    They are what the scenario's ``get_train_data()`` and ``get_test_data()`` return. The first call
    needs ``pip install 'sdkd_plugin[apebench]'``; files that are there are read without it. They
    are kept by scenario and options, not by APEBench's version.

    Args:
        scenario: dimensions and APEBench's name, such as ``1d_phy_ks_cons``, ``1d_phy_burgers`` and
            ``2d_phy_kolm_flow``.
        folder: where the files are kept; None is ``sdkd_plugin.data.store.default_folder``.
        **options: of the scenario, such as ``num_points``, ``dt``, ``num_train_samples`` or
            ``test_temporal_horizon``; its own defaults else.

    Raises:
        ValueError: if there is no such scenario or option, or a trajectory has diverged.
        ImportError: if files are missing and APEBench is not installed.

    Example:
        >>> burgers = apebench_trajectories("1d_phy_burgers", num_points=64)  # doctest: +SKIP
    """
    check_type("scenario", scenario, str, "such as '1d_phy_burgers'")
    found = re.fullmatch(r"([123])d_(\w+)", scenario)
    if not found:
        raise ValueError(
            f"`scenario` is {shown(scenario)}, expected dimensions and a name, '1d_phy_burgers'."
        )
    settings = {"num_spatial_dims": int(found[1]), **options}

    def simulate(part: str) -> Tensor:
        simulated = getattr(_scenario(found[2], settings), f"get_{part}_data")()
        fields = torch.from_numpy(np.array(simulated, dtype=np.float32))
        check_finite(f"{part} data of {scenario}", fields)
        return fields

    def kept(part: str) -> Tensor:
        parameters = {"scenario": found[2], "part": part, **settings}
        stem = f"apebench-{scenario}-{part}"
        return load_or_compute(stem, lambda: simulate(part), parameters=parameters, folder=folder)

    return kept("train"), kept("test")


def _scenario(name: str, settings: dict[str, Any]) -> Any:
    try:
        from apebench.scenarios import scenario_dict
    except ImportError as error:
        raise ImportError(
            "these trajectories are not in the folder yet, and APEBench simulates them: "
            "`pip install 'sdkd_plugin[apebench]'`, or give the folder that has them."
        ) from error
    if name not in scenario_dict:
        raise ValueError(
            f"`scenario` is {shown(name)}, expected one of APEBench's: {sorted(scenario_dict)}."
        )
    try:
        return scenario_dict[name](**settings)
    except TypeError as error:
        raise ValueError(f"`options`: {error}; expected those of {scenario_dict[name]}.") from error
