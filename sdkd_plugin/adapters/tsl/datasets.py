"""Traffic as data sets of tsl's: tsl's own by their names, files, and simulated traffic."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
import tsl
from jaxtyping import Bool
from torch import Tensor
from tsl.data import SpatioTemporalDataset
from tsl.datasets import MetrLA, PemsBay
from tsl.datasets.pems_benchmarks import PeMS03, PeMS04, PeMS07, PeMS08
from tsl.datasets.prototypes import DatetimeDataset

from sdkd_plugin._checks import check_choice, check_shape
from sdkd_plugin.adapters.tsl._hdf5 import refuse_pickles
from sdkd_plugin.data import TrafficData, find_traffic, read_csv_pair, simulate_traffic
from sdkd_plugin.data.traffic import Missing, read_los_loop

_TSL = {"la": MetrLA, "bay": PemsBay, "pems3": PeMS03, "pems4": PeMS04, "pems7": PeMS07}
_TSL |= {"pems8": PeMS08}
DATASETS = (*_TSL, "csv", "simulator")


class TrafficDataset(DatetimeDataset):
    """Traffic as a data set of tsl's, with its connectivity, splitters and covariates of time.

    Gaps are filled in the readings (see `TrafficData.filled`) and masked out of the targets.

    Example:
        >>> dataset = TrafficDataset(simulate_traffic(n_sensors=12, days=1, progress=False))
        >>> dataset.n_nodes, dataset.get_connectivity(layout="dense").shape
        (12, (12, 12))
    """

    similarity_options = frozenset({"adjacency"})

    def __init__(self, data: TrafficData) -> None:
        self.traffic = data
        super().__init__(
            target=pd.DataFrame(data.filled().numpy(), data.index, list(data.node_ids)),
            mask=data.mask.numpy(),
            similarity_score="adjacency",
            temporal_aggregation="nearest",
            name=data.source,
        )

    def compute_similarity(self, method: str, **_: Any) -> np.ndarray:
        """The weights, ``(target, source)`` as in tsl; parallel edges add up."""
        adjacency = np.zeros((self.n_nodes, self.n_nodes), dtype=np.float32)
        source, target = self.traffic.edge_index.numpy()
        np.add.at(adjacency, (target, source), self.traffic.edge_weight.numpy())
        return adjacency


def spatiotemporal_dataset(
    data: TrafficData,
    *,
    window: int = 12,
    horizon: int = 12,
    labelled: Bool[Tensor, "time nodes"] | None = None,
) -> SpatioTemporalDataset:
    """The windows of a `TrafficDataset`, with the time of day (sine and cosine) as covariate ``u``.

    Args:
        data: the traffic.
        window: steps to read.
        horizon: steps to forecast.
        labelled: where it is False, an observed reading is an input but no target.

    Raises:
        ValueError: if ``labelled`` has another shape than the readings.
    """
    dataset = TrafficDataset(data)
    mask = data.mask
    if labelled is not None:
        check_shape("labelled", labelled.shape, mask.shape, "as the readings")
        mask = mask & labelled
    return SpatioTemporalDataset(
        target=dataset.dataframe(),
        mask=mask.numpy()[..., None],
        connectivity=(data.edge_index, data.edge_weight),
        covariates={"u": dataset.datetime_encoded("day").values},
        window=window,
        horizon=horizon,
        name=data.source,
    )


def get_dataset(name: str, options: Mapping[str, Any] | None = None) -> DatetimeDataset:
    """The data set of a name.

    Args:
        name: ``la``, ``bay``, ``pems3``, ``pems4``, ``pems7`` or ``pems8``, which tsl downloads;
            ``csv``, a pair of files or the Los-loop week; ``simulator``.
        options: for tsl's own ``root``, the folder to keep it in; for ``csv`` those of
            `load_traffic`, ``root`` being its source; for ``simulator`` those of
            `simulate_traffic`. What is None is left out.

    Raises:
        ValueError: if the name or an option is unknown, or files are damaged or hold code.
        FileNotFoundError: if there are no files, and none could be downloaded.

    Example:
        >>> get_dataset("simulator", {"n_sensors": 12, "days": 1, "progress": False}).n_nodes
        12
    """
    check_choice("dataset.name", name, DATASETS)
    given = {option: value for option, value in (options or {}).items() if value is not None}
    csv, simulated = ("root", "start", "missing", "freq"), inspect.signature(simulate_traffic)
    allowed = {"csv": csv, "simulator": simulated.parameters}.get(name, ("root",))
    for option in given:
        check_choice(f"an option of the dataset {name}", option, allowed)
    if name == "simulator":
        return TrafficDataset(simulate_traffic(**given))
    root = given.pop("root", None)
    if name != "csv":
        return _of_tsl(name, root)
    if root is None:
        raise ValueError("`dataset.root` is missing, expected the folder of the csv files.")
    return TrafficDataset(load_traffic(root, **given))


def load_traffic(
    source: str | Path,
    *,
    start: str | None = None,
    missing: Missing | None = None,
    freq: str | None = None,
) -> TrafficData:
    """Measured traffic from a folder, or METR-LA from where tsl finds or downloads it.

    Args:
        source: a folder with T-GCN's csv pair (the Los-loop week or another) or with tsl's METR-LA
            files; or ``metr_la``, which tsl downloads where there is a network.
        start: the first time of a csv pair, such as ``2012-03-01``; known for the Los-loop week,
            as are the next two.
        missing: what a csv pair has where nothing was measured: see `read_csv_pair`.
        freq: the step between rows of a csv pair, as pandas writes it, such as ``5min``.

    Raises:
        ValueError: if files are damaged, hold code or do not fit together, or an argument lacks.
        FileNotFoundError: if there is no such folder, nothing known in it, or no download.
    """
    if str(source) == "metr_la" and not Path(source).exists():
        return _metr_la(None)
    files = find_traffic(source)
    if files.kind == "metr_la":
        return _metr_la(files.folder)
    if files.kind == "los_loop":
        return read_los_loop(files.folder)
    given = {"start": start, "missing": missing, "freq": freq}
    if lacking := [name for name, value in given.items() if value is None]:
        raise ValueError(
            f"{files.speed} has no times of its readings, nor what marks a missing one: "
            f"give {lacking} (in a configuration as dataset.options), such as "
            "start=2012-03-01, freq=5min and missing=zeros, nan or none."
        )
    adjacency = cast(Path, files.adjacency)
    return read_csv_pair(files.speed, adjacency, **cast(Any, given))


def _metr_la(root: Path | None) -> TrafficData:
    data = _of_tsl("la", root)
    edges, weights = data.get_connectivity(threshold=0.1, include_self=False, layout="edge_index")
    frame = data.dataframe()
    speed = torch.tensor(frame.to_numpy(), dtype=torch.float32)
    return TrafficData(
        speed=speed,
        # tsl's mask is True at rows that the file lacks, which are NaN.
        mask=torch.from_numpy(np.asarray(data.mask)[..., 0].astype(bool)) & ~speed.isnan(),
        edge_index=torch.as_tensor(edges, dtype=torch.int64),
        edge_weight=torch.as_tensor(weights, dtype=torch.float32),
        node_ids=tuple(map(str, data.nodes)),
        index=pd.DatetimeIndex(frame.index),
        source="METR-LA, as tsl reads it",
    )


def _of_tsl(name: str, root: str | Path | None) -> DatetimeDataset:
    folder = Path(root or Path(tsl.config.data_dir, _TSL[name].__name__)).expanduser()
    try:
        for file in folder.glob("*.h5"):
            refuse_pickles(file)
        return _TSL[name](root=str(folder))
    except Exception as error:
        # Whatever the network, or the readers of HDF5, csv, npz and zip files, raise.
        reason = f"{type(error).__name__} {error}".strip()
        raise (FileNotFoundError if isinstance(error, OSError) else ValueError)(
            f"the dataset {name} could not be downloaded or read by tsl ({reason}): give as "
            "`dataset.root` a folder that holds its files."
        ) from error
