"""Traffic data as tsl data sets: from files, from tsl's own METR-LA, or simulated."""

from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor
from tsl.data import SpatioTemporalDataset
from tsl.datasets import MetrLA

from sdkd_plugin.data import TrafficData, find_traffic, read_csv_pair, read_los_loop
from sdkd_plugin.data.traffic import Missing


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
        start: the first time of a csv pair, which its files do not say, such as ``2012-03-01``. It,
            ``missing`` and ``freq`` are known of the Los-loop week.
        missing: what a csv pair has where nothing was measured, as `read_csv_pair`.
        freq: the step between rows of a csv pair, as pandas writes it, such as ``5min``.

    Raises:
        ValueError: if files are damaged or do not fit together, or it is not said of a csv pair
            when it starts, how far apart its rows are, and what marks a missing reading.
        FileNotFoundError: if there is no such folder, nothing known in it, or METR-LA could not be
            downloaded.
    """
    if str(source) == "metr_la" and not Path(source).exists():
        return _metr_la(None)
    files = find_traffic(source)
    if files.kind == "metr_la":
        return _metr_la(files.folder)
    if files.kind == "los_loop":
        return read_los_loop(files.folder)
    said = {"start": start, "missing": missing, "freq": freq}
    if unsaid := [name for name, value in said.items() if value is None]:
        raise ValueError(
            f"{files.speed} does not say when its readings were taken, how far apart, or what "
            f"marks a missing one: give {unsaid}, such as start=2012-03-01, freq=5min and "
            "missing=zeros, nan or none (in a configuration dataset.options.start and so on)."
        )
    return read_csv_pair(
        files.speed,
        cast(Path, files.adjacency),
        locations=files.locations,
        start=cast(str, start),
        missing=cast(Missing, missing),
        freq=cast(str, freq),
    )


def _metr_la(root: Path | None) -> TrafficData:
    try:
        data = MetrLA(root=root)
    except Exception as error:
        # Whatever the readers of HDF5, csv and zip files raise for a damaged one.
        reason = f"{type(error).__name__} {error}".strip()
        if root is None:
            raise FileNotFoundError(
                f"METR-LA could not be downloaded by tsl ({reason}): give a folder that holds it."
            ) from error
        raise ValueError(f"{root} cannot be read as METR-LA by tsl: {reason}.") from error
    edge_index, edge_weight = data.get_connectivity(
        threshold=0.1, include_self=False, layout="edge_index"
    )
    frame = data.dataframe()
    return TrafficData(
        speed=torch.tensor(frame.to_numpy(), dtype=torch.float32),
        mask=torch.from_numpy(np.asarray(data.mask)[..., 0].astype(bool)),
        edge_index=torch.as_tensor(edge_index, dtype=torch.int64),
        edge_weight=torch.as_tensor(edge_weight, dtype=torch.float32),
        node_ids=tuple(str(node) for node in data.nodes),
        index=pd.DatetimeIndex(frame.index),
        source="METR-LA, as tsl reads it",
    )


def spatiotemporal_dataset(
    data: TrafficData,
    *,
    window: int = 12,
    horizon: int = 12,
    labelled: Bool[Tensor, "time nodes"] | None = None,
) -> SpatioTemporalDataset:
    """A tsl data set of windows, with the time of day (sine and cosine) as covariate ``u``.

    Gaps are filled in the readings (see `TrafficData.filled`) and masked out of the targets.

    Args:
        data: the traffic.
        window: steps to read.
        horizon: steps to forecast.
        labelled: where False, an observed reading still is an input but no target.

    Raises:
        ValueError: if ``labelled`` has another shape than the readings.
    """
    filled = pd.DataFrame(data.filled().numpy(), index=data.index, columns=list(data.node_ids))
    mask = data.mask
    if labelled is not None:
        if labelled.shape != mask.shape:
            raise ValueError(
                f"`labelled` has shape {tuple(labelled.shape)}, expected {tuple(mask.shape)} as "
                "the readings."
            )
        mask = mask & labelled
    # tsl's own `datetime_encoded` needs a data set of tsl's, with a node similarity.
    angle = 2 * np.pi * np.asarray((data.index - data.index.normalize()) / pd.Timedelta(days=1))
    day = torch.from_numpy(np.stack([np.sin(angle), np.cos(angle)], axis=1)).float()
    return SpatioTemporalDataset(
        target=filled,
        index=data.index,
        mask=mask.numpy()[..., None],
        connectivity=(data.edge_index, data.edge_weight),
        covariates={"u": day},
        window=window,
        horizon=horizon,
        name=data.source,
    )
