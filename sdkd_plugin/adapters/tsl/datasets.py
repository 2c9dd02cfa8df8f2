"""Data sets by their names, as tsl's own traffic experiment has them, and two more.

Here live the names and our traffic as a data set of tsl's, with a graph, a splitter and an encoded
time of the day as any other. Reading files is in `data`, simulating in `sdkd_plugin.data`.
"""

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from tsl.datasets import MetrLA, PemsBay
from tsl.datasets.pems_benchmarks import PeMS03, PeMS04, PeMS07, PeMS08
from tsl.datasets.prototypes import DatetimeDataset

from sdkd_plugin._checks import check_choice
from sdkd_plugin.adapters.tsl.data import load_traffic
from sdkd_plugin.data import TrafficData, simulate_traffic

_TSL = {
    "la": partial(MetrLA, impute_zeros=True),
    "bay": PemsBay,
    "pems3": PeMS03,
    "pems4": PeMS04,
    "pems7": PeMS07,
    "pems8": PeMS08,
}
DATASETS = (*_TSL, "csv", "simulator")


class TrafficDataset(DatetimeDataset):
    """Traffic as a data set of tsl's: ``get_connectivity``, ``get_splitter``, covariates of time.

    Gaps are filled in the readings (see `TrafficData.filled`) and masked out of the targets. The
    one similarity, ``adjacency``, is that of the edges, in their direction.

    Args:
        data: the traffic.

    Example:
        >>> from sdkd_plugin.data import simulate_traffic
        >>> dataset = TrafficDataset(simulate_traffic(n_sensors=12, days=1, progress=False))
        >>> dataset.n_nodes, dataset.get_connectivity(layout="dense").shape
        (12, (12, 12))
    """

    similarity_options = frozenset({"adjacency"})

    def __init__(self, data: TrafficData) -> None:
        self.traffic = data
        super().__init__(
            target=pd.DataFrame(
                data.filled().numpy(), index=data.index, columns=list(data.node_ids)
            ),
            mask=data.mask.numpy(),
            similarity_score="adjacency",
            temporal_aggregation="nearest",
            name=data.source,
        )

    def compute_similarity(self, method: str, **_: Any) -> np.ndarray:
        """The weights of the edges, ``(target, source)`` as tsl reads it; parallel ones add up."""
        nodes = len(self.traffic.node_ids)
        adjacency = np.zeros((nodes, nodes), dtype=np.float32)
        source, target = self.traffic.edge_index.numpy()
        np.add.at(adjacency, (target, source), self.traffic.edge_weight.numpy())
        return adjacency


def get_dataset(name: str, options: Mapping[str, Any] | None = None) -> DatetimeDataset:
    """The data set of a name.

    Args:
        name: ``la``, ``bay``, ``pems3``, ``pems4``, ``pems7`` or ``pems8``, which tsl downloads;
            ``csv``, a pair of files or the Los-loop week; ``simulator``.
        options: of the data set: for tsl's own, ``root``, the folder to keep it in; for ``csv``
            those of `load_traffic` with ``root`` for its source; for ``simulator`` those of
            `simulate_traffic`. What is None is left out.

    Raises:
        ValueError: if the name or an option is unknown, or files are damaged.
        FileNotFoundError: if there are no files, and none could be downloaded.

    Example:
        >>> get_dataset("simulator", {"n_sensors": 12, "days": 1, "progress": False}).n_nodes
        12
    """
    check_choice("dataset.name", name, DATASETS)
    given = {option: value for option, value in (options or {}).items() if value is not None}
    allowed = {
        "csv": ("root", "start", "missing", "freq"),
        "simulator": tuple(inspect.signature(simulate_traffic).parameters),
    }.get(name, ("root",))
    for option in given:
        check_choice(f"an option of the dataset {name}", option, allowed)
    if name == "simulator":
        return TrafficDataset(simulate_traffic(**given))
    if name == "csv":
        if "root" not in given:
            raise ValueError("`dataset.root` is missing, expected the folder of the csv files.")
        return TrafficDataset(load_traffic(given.pop("root"), **given))
    return _download(name, given.get("root"))


def _download(name: str, root: str | None) -> DatetimeDataset:
    try:
        return _TSL[name](root=root)
    except Exception as error:
        # Whatever the network, or the readers of HDF5, csv, npz and zip files, raise.
        reason = f"{type(error).__name__} {error}".strip()
        raise FileNotFoundError(
            f"the dataset {name} could not be downloaded or read by tsl ({reason}): give as "
            "`dataset.root` a folder that holds its files."
        ) from error
