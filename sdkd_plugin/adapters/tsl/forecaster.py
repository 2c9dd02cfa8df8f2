"""A trained forecaster in a folder: its weights, and a card that says which data it fits.

Here live writing, finding and checking. A forecaster reads and writes scaled values of certain
sensors; in front of other data its numbers would be wrong without a word, so these are refused.
"""

import hashlib
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
    """What a forecaster must know of its data.

    Args:
        window: steps to read.
        horizon: steps to forecast.
        node_ids: of the sensors, in order.
        scaler_bias: what the scaler subtracts, flattened.
        scaler_scale: what the scaler divides by, flattened.
        step_minutes: between readings, None where the data do not say.
        covariates: features of ``u``, 0 for none.
        graph: of the edges and their weights, a checksum.
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
        """The card of a data set of windows, its scaler fitted.

        Args:
            dataset: after the data module's ``setup``.
            node_ids: of its nodes, in order.
        """
        scaler = dataset.scalers.get("target")
        parameters = {} if scaler is None else scaler.params()
        bias, scale = (
            tuple(np.asarray(parameters[name], dtype=float).ravel().tolist())
            if name in parameters
            else ()
            for name in ("bias", "scale")
        )
        index = dataset.index
        minutes = None if index is None else (index[1] - index[0]).total_seconds() / 60
        return cls(
            int(dataset.window),
            int(dataset.horizon),
            tuple(str(each) for each in node_ids),
            bias,
            scale,
            minutes,
            dataset.input_map.u.shape[-1] if "u" in dataset.input_map else 0,
            _graph_checksum(dataset),
        )

    def check_fits(self, data: "DataCard", folder: str | os.PathLike[str]) -> None:
        """Refuse data that a forecaster of this card was not trained for.

        Args:
            data: the card of the data at hand.
            folder: of the forecaster, for the message.

        Raises:
            ValueError: naming what differs, both values, and what to do.
        """
        remedy = "train another teacher for these data, or give the folder of one that fits."
        for name in ("window", "horizon", "step_minutes", "covariates"):
            mine, theirs = getattr(self, name), getattr(data, name)
            if mine != theirs:
                raise ValueError(
                    f"the forecaster in {folder} has {name} {mine}, the data {theirs}: {remedy}"
                )
        if len(self.node_ids) != len(data.node_ids):
            raise ValueError(
                f"the forecaster in {folder} is for {len(self.node_ids)} sensors, the data have "
                f"{len(data.node_ids)}: {remedy}"
            )
        pairs = zip(self.node_ids, data.node_ids, strict=True)
        differing = [(i, *pair) for i, pair in enumerate(pairs) if pair[0] != pair[1]]
        if differing:
            i, mine, theirs = differing[0]
            raise ValueError(
                f"the forecaster in {folder} is for other sensors: {len(differing)} of "
                f"{len(self.node_ids)} differ, first number {i}, {mine!r} there and {theirs!r} in "
                f"the data: {remedy}"
            )
        if self.graph != data.graph:
            raise ValueError(
                f"the forecaster in {folder} was trained on other edges or weights between the "
                f"same sensors: {remedy}"
            )
        for name in ("scaler_bias", "scaler_scale"):
            mine, theirs = getattr(self, name), getattr(data, name)
            if len(mine) != len(theirs) or not np.allclose(mine, theirs, rtol=1e-4, atol=1e-6):
                raise ValueError(
                    f"the forecaster in {folder} was trained with a {name} of "
                    f"{_short(mine)}, the data have {_short(theirs)}, so that its values mean "
                    f"something else: {remedy}"
                )


@dataclass(frozen=True)
class Forecaster:
    """How to make a model again, and what it fits.

    Args:
        model: name, as `get_model_class` takes it.
        sizes: that the data gave.
        hparams: that the configuration gave.
        data: which data it fits.
        notes: of the training, for the reader.
    """

    model: str
    sizes: Mapping[str, Any]
    hparams: Mapping[str, Any]
    data: DataCard
    notes: Mapping[str, Any] = field(default_factory=dict)

    def make(self) -> nn.Module:
        """A new model, untrained."""
        return make_model(self.model, self.sizes, self.hparams)


def save_forecaster(
    folder: str | os.PathLike[str], network: nn.Module, forecaster: Forecaster
) -> Path:
    """Write a trained model's weights as safetensors and its card as YAML.

    The card is written last and knows the weights' checksum, so that an interrupted write leaves
    no forecaster rather than half of one.

    Args:
        folder: made if need be.
        network: the model.
        forecaster: its card.

    Returns:
        the folder.
    """
    folder = Path(folder)
    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    with atomic_path(folder / WEIGHTS) as path:
        save_file(state, path)
    card = {"format": FORMAT, "weights": _checksum(folder / WEIGHTS), **asdict(forecaster)}
    # Through plain lists: YAML's safe writer knows no tuples.
    card["data"] = {k: list(v) if isinstance(v, tuple) else v for k, v in card["data"].items()}
    with atomic_path(folder / CARD) as path:
        path.write_text(yaml.safe_dump(card, sort_keys=False), encoding="utf-8")
    return folder


def has_forecaster(folder: str | os.PathLike[str]) -> bool:
    """Whether a forecaster was saved there, whatever it fits."""
    return (Path(folder) / CARD).is_file()


def load_forecaster(
    folder: str | os.PathLike[str], data: DataCard | None = None
) -> tuple[nn.Module, Forecaster]:
    """A saved model with its weights, in eval mode, and its card. Nothing is unpickled.

    Args:
        folder: as `save_forecaster` wrote it.
        data: the card of the data at hand, which it must fit; None does not look.

    Raises:
        FileNotFoundError: if there is no forecaster.
        ValueError: if a file is damaged or does not belong to the other, if the model is unknown,
            or if it does not fit the data.
    """
    folder = Path(folder)
    if not has_forecaster(folder):
        raise FileNotFoundError(
            f"{folder} holds no forecaster: there is no {CARD}; expected a folder that the stage "
            "`teacher` wrote."
        )
    try:
        card = yaml.safe_load((folder / CARD).read_text(encoding="utf-8"))
        if card.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        checksum = card.pop("weights")
        values: Any = {
            k: tuple(v) if isinstance(v, list) else v for k, v in card.pop("data").items()
        }
        forecaster = Forecaster(**card, data=DataCard(**values))
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / CARD} is damaged or of another version ({error}): train again."
        ) from error
    if data is not None:
        forecaster.data.check_fits(data, folder)
    network = forecaster.make()
    try:
        if _checksum(folder / WEIGHTS) != checksum:
            raise ValueError("its checksum is not the one that the card has")
        network.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{folder / WEIGHTS} does not belong to {CARD} beside it ({error}): train again."
        ) from error
    return network.eval(), forecaster


def _graph_checksum(dataset: SpatioTemporalDataset) -> str:
    """Of the edges in order and their weights; empty where there are none."""
    if not isinstance(dataset.edge_index, Tensor):
        return ""
    source, target = dataset.edge_index.cpu()
    weight = dataset.edge_weight
    weight = torch.ones(len(source)) if weight is None else weight.cpu().float()
    order = np.lexsort((target.numpy(), source.numpy()))
    parts = (source[order].long(), target[order].long(), weight[order])
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()[:16]


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _short(values: tuple[float, ...]) -> str:
    shown = ", ".join(f"{value:.4g}" for value in values[:3])
    return f"({shown}{', ...' if len(values) > 3 else ''})"
