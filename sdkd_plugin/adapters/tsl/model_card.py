"""A trained forecaster in a folder: its weights, and a card of how it is built and for which data.

On data of other sensors or scales its numbers would be wrong without an error: they are refused.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tsl.data import SpatioTemporalDataset

from sdkd_plugin.adapters.tsl.registry import make_model
from sdkd_plugin.data.store import atomic_path

FORMAT = 1
CARD, WEIGHTS = "forecaster.yaml", "forecaster.safetensors"


@dataclass(frozen=True)
class DataCard:
    """The data that a forecaster fits.

    Args:
        window, horizon: steps to read and to forecast.
        node_ids: of the sensors, in order.
        scaler_bias, scaler_scale: what the scaler subtracts and divides by, flattened.
        step_minutes: between readings, None where the data have no times.
        covariates: features of ``u``, 0 for none.
        graph: checksum of the edges and their weights, "" for no graph.
    """

    window: int
    horizon: int
    node_ids: tuple[str, ...]
    scaler_bias: tuple[float, ...] = ()
    scaler_scale: tuple[float, ...] = ()
    step_minutes: float | None = None
    covariates: int = 0
    graph: str = ""

    @classmethod
    def of(cls, dataset: SpatioTemporalDataset, node_ids: Iterable[object]) -> "DataCard":
        """The card of a data set of windows, its scaler fitted by the data module's ``setup``."""
        scaler = dataset.scalers.get("target")
        given = {} if scaler is None else scaler.params()
        bias, scale = (np.asarray(given.get(name, ()), float) for name in ("bias", "scale"))
        index = dataset.index
        return cls(
            window=int(dataset.window),
            horizon=int(dataset.horizon),
            node_ids=tuple(map(str, node_ids)),
            scaler_bias=tuple(bias.ravel().tolist()),
            scaler_scale=tuple(scale.ravel().tolist()),
            step_minutes=None if index is None else (index[1] - index[0]).total_seconds() / 60,
            covariates=dataset.input_map.u.shape[-1] if "u" in dataset.input_map else 0,
            graph=_graph_checksum(dataset),
        )

    def check_fits(self, data: "DataCard", folder: str | os.PathLike[str]) -> None:
        """Refuse, by a ValueError, other data than those of this card of a forecaster's folder."""
        theirs = data._flat()
        for name, mine in self._flat().items():
            other: Any = theirs.get(name)
            numbers = isinstance(mine, float) and isinstance(other, float)  # scalers, fitted anew
            close = numbers and math.isclose(mine, other, rel_tol=1e-4, abs_tol=1e-6)
            if mine != other and not close:
                raise ValueError(
                    f"the forecaster in {folder} has {name} {mine!r}, the data {other!r}: train "
                    "another teacher for these data, or give the folder of one that fits."
                )

    def _flat(self) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, tuple):
                flat[f"len({name})"] = len(value)
                flat |= {f"{name}[{i}]": each for i, each in enumerate(value)}
            else:
                flat[name] = value
        return flat


@dataclass(frozen=True)
class ModelCard:
    """How to build a forecaster, and the data that it fits.

    Args:
        model: name, as in `get_model_class`.
        sizes, hparams: from the data, and from the configuration.
        data: which data it fits.
        notes: on the training, for the reader.
    """

    model: str
    sizes: Mapping[str, Any]
    hparams: Mapping[str, Any]
    data: DataCard
    notes: Mapping[str, Any] = field(default_factory=dict)

    def make(self) -> nn.Module:
        """A new model, untrained."""
        return make_model(self.model, self.sizes, self.hparams)


def save_forecaster(folder: str | os.PathLike[str], network: nn.Module, card: ModelCard) -> Path:
    """Write a trained model's weights as safetensors and its card as YAML.

    The folder is made if need be, and returned. The card is written last and holds the weights'
    checksum: an interrupted write leaves no forecaster rather than half of one.
    """
    folder = Path(folder)
    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    with atomic_path(folder / WEIGHTS) as path:
        save_file(state, path)
    values = {"format": FORMAT, "weights": _checksum(folder / WEIGHTS), **asdict(card)}
    plain = json.loads(json.dumps(values))  # YAML's safe writer knows no tuples
    with atomic_path(folder / CARD) as path:
        path.write_text(yaml.safe_dump(plain, sort_keys=False), encoding="utf-8")
    return folder


def has_forecaster(folder: str | os.PathLike[str]) -> bool:
    """Whether a forecaster was saved in a folder."""
    return (Path(folder) / CARD).is_file()


def load_forecaster(
    folder: str | os.PathLike[str], data: DataCard | None = None
) -> tuple[nn.Module, ModelCard]:
    """A saved model with its weights, in eval mode, and its card. Nothing is unpickled.

    Args:
        folder: as `save_forecaster` wrote it.
        data: the card of the data at hand, which it must fit; None skips the check.

    Raises:
        FileNotFoundError: if there is no forecaster.
        ValueError: if a file is damaged, the model is unknown, or it does not fit the data.
    """
    folder = Path(folder)
    if not has_forecaster(folder):
        expected = "expected what `save_forecaster` wrote."
        raise FileNotFoundError(f"{folder} holds no forecaster ({CARD}), {expected}")
    try:
        values = yaml.safe_load((folder / CARD).read_text(encoding="utf-8"))
        if values.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        if values.pop("weights") != _checksum(folder / WEIGHTS):
            raise ValueError(f"{WEIGHTS} does not belong to {CARD}")
        fitted: dict[str, Any] = values.pop("data")
        fitted |= {k: tuple(v) for k, v in fitted.items() if isinstance(v, list)}
        card = ModelCard(**values, data=DataCard(**fitted))
        network = card.make()
        network.load_state_dict(load_file(folder / WEIGHTS))
    except (
        *(OSError, yaml.YAMLError, SafetensorError, RuntimeError),
        *(AttributeError, KeyError, TypeError, ValueError),
    ) as error:
        raise ValueError(
            f"the forecaster in {folder} is damaged or of another version ({error}): train again."
        ) from error
    if data is not None:
        card.data.check_fits(data, folder)
    return network.eval(), card


def _graph_checksum(dataset: SpatioTemporalDataset) -> str:
    """Of the edges and their weights, whatever the order of the edges."""
    if not isinstance(dataset.edge_index, Tensor):
        return ""
    source, target = dataset.edge_index.cpu().long()
    weight = torch.ones(len(source)) if dataset.edge_weight is None else dataset.edge_weight.cpu()
    order = np.lexsort((target.numpy(), source.numpy()))
    parts = (part[order].numpy().tobytes() for part in (source, target, weight.float()))
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
