"""The card of a forecaster on tsl's data: the model, and which data and scales it fits."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tsl.data import SpatioTemporalDataset

from sdkd_plugin.adapters.tsl.registry import get_model_class, model_arguments
from sdkd_plugin.model_folder import ModelCard
from sdkd_plugin.models.registry import register_host

register_host("tsl", get_model_class)


def model_card(
    name: str,
    hparams: Mapping[str, Any],
    dataset: SpatioTemporalDataset,
    node_ids: Iterable[object],
) -> ModelCard:
    """The card of a model for a data set of windows, its scaler fitted by the module's ``setup``.

    On data of other sensors, another graph or other scales the model's numbers would be wrong
    without an error: `sdkd_plugin.model_folder.load_model` refuses it where the cards differ in
    these.

    Args:
        name: as in `get_model_class`.
        hparams: options of the model; sizes that it takes, such as ``n_nodes``, are the data's.
        dataset: the windows.
        node_ids: of the sensors, in order.

    Raises:
        ValueError: if the model does not take an option or lacks one.
    """
    ids, index = list(map(str, node_ids)), dataset.index
    covariates = dataset.input_map.u.shape[-1] if "u" in dataset.input_map else 0
    sizes = {"window": int(dataset.window), "horizon": int(dataset.horizon), "n_nodes": len(ids)}
    channels = int(dataset.n_channels)
    sizes |= {"input_size": channels, "output_size": channels, "exog_size": int(covariates)}
    scaler = dataset.scalers.get("target")
    # Without the axis of time, of which windows are parts.
    given = {} if scaler is None else scaler.params()
    units = {
        side: {
            "scale": np.asarray(given.get("scale", 1.0), float).tolist(),
            "offset": np.asarray(given.get("bias", 0.0), float).tolist(),
        }
        for side in ("input", "output")
    }
    return ModelCard(
        f"tsl.{name}",
        model_arguments(name, sizes, hparams),
        units=units,
        data={
            **sizes,
            "node_ids": ids,
            "step_minutes": None if index is None else (index[1] - index[0]).total_seconds() / 60,
            "graph": _graph_checksum(dataset),
        },
    )


def _graph_checksum(dataset: SpatioTemporalDataset) -> str:
    """Of the edges and their weights, whatever the order of the edges; "" without a graph."""
    if not isinstance(dataset.edge_index, Tensor):
        return ""
    source, target = dataset.edge_index.cpu().long()
    weight = torch.ones(len(source)) if dataset.edge_weight is None else dataset.edge_weight.cpu()
    order = np.lexsort((target.numpy(), source.numpy()))
    parts = (part[order].numpy().tobytes() for part in (source, target, weight.float()))
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]
