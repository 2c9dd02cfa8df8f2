"""A trained model in a folder: its weights as safetensors, and a card of what it is, as YAML.

Teachers and students of both hosts are kept like this. Nothing in a folder is executed, and a model
is built only after all of it has been checked. See `models.registry` for the models' names.
"""

import hashlib
import math
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import _TYPES, load_file, save
from torch import Tensor, nn

from sdkd_plugin._checks import check_type, shown
from sdkd_plugin._explained import explained
from sdkd_plugin._files import PathLike, atomic_path, check_writable, checksum, locked, remove_stale
from sdkd_plugin._plain import check_plain, plain_text, read_yaml
from sdkd_plugin._version import __version__
from sdkd_plugin.models.registry import Shapes, make_model, make_to_fit, shapes, tensors
from sdkd_plugin.spectral import AbstractTransform
from sdkd_plugin.teachers import accepted_inputs

FORMAT = 2
CARD = "card.yaml"
_WEIGHTS = "weights-{:.16}.safetensors"
_HEADER_BYTES = 16 << 20
_DTYPES: dict[str, torch.dtype] = {k: v for k, v in _TYPES.items() if v is not None}
_Values = Mapping[str, Any]


@explained
@dataclass(frozen=True)
class ModelCard:
    """What a saved model is: all values are numbers, strings, lists and mappings.

    Args:
        model: name, as in `model_class`.
        arguments: of its constructor.
        transform: the domain of its forecasts, see `describe_transform`.
        units: ``input`` and ``output``, each with ``scale`` and ``offset``: numbers, or lists that
            broadcast to a sample; physical values are ``scale * value + offset``. Also ``name``.
        data: which data it fits: name, fingerprint, shapes.
        training: settings, for the reader.
        metrics: scores, for the reader.
        versions: of the libraries that wrote it; `save_model` fills them in.

    Example:
        >>> ModelCard("UNet", {"in_channels": 2, "out_channels": 1}).model
        'UNet'
    """

    model: str
    arguments: _Values = field(default_factory=dict)
    transform: _Values = field(default_factory=dict)
    units: _Values = field(default_factory=dict)
    data: _Values = field(default_factory=dict)
    training: _Values = field(default_factory=dict)
    metrics: _Values = field(default_factory=dict)
    versions: _Values = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_type("model", self.model, str, "such as 'UNet'")
        for each in fields(self)[1:]:
            value = getattr(self, each.name)
            check_type(each.name, value, Mapping, "names and values")
            try:
                object.__setattr__(self, each.name, check_plain(dict(value), f"`{each.name}`"))
            except ValueError as error:
                raise ValueError(f"{error}, of which a card is made.") from error

    def make(self) -> nn.Module:
        """A new model, untrained."""
        return make_model(self.model, self.arguments)

    def check_fits(self, other: "ModelCard") -> None:
        """Refuse, by a ValueError, a card of other data or units; empty parts fit all."""
        for part in ("data", "units"):
            mine, theirs = (_flat(part, getattr(card, part)) for card in (self, other))
            for name in mine if theirs else ():
                if not _close(mine[name], theirs.get(name)):
                    raise ValueError(
                        f"the saved {self.model} has {name} {mine[name]!r}, the data "
                        f"{theirs.get(name)!r}: train one for these data, or give the folder of "
                        "one that fits."
                    )


def describe_transform(transform: AbstractTransform) -> dict[str, Any]:
    """A transform's class and sizes, for a card."""
    known = {name: getattr(transform, name, None) for name in ("boundary", "method")}
    return {
        "class": type(transform).__name__,
        "shape": list(transform.domain_shape),
        "axes": list(transform.domain_axes),
        **{name: value for name, value in known.items() if isinstance(value, str)},
    }


@explained
def save_model(folder: PathLike, model: nn.Module, card: ModelCard) -> Path:
    """Write a model's weights and its card; the folder is made if need be, and returned.

    The weights' file is named after its checksum, and the card, which is replaced last and as a
    whole, has that. A reader, also after an interruption, finds the old model or the new one.

    Raises:
        ValueError: if the card's arguments do not make a model with these weights.

    Example:
        >>> import tempfile
        >>> card = ModelCard("UNet", {"in_channels": 2, "out_channels": 1, "width": 2})
        >>> model, folder = card.make(), tempfile.mkdtemp()
        >>> again, card = load_model(save_model(folder, model, card))
        >>> card.versions["torch"] == torch.__version__
        True
    """
    folder = Path(folder)
    make_to_fit(card.model, card.arguments, shapes(model))
    # Copies, because models may share weights, which the file's format does not have.
    copies = {name: value.detach().cpu().clone() for name, value in tensors(model).items()}
    content = save({name: value.contiguous() for name, value in copies.items()})
    weights = hashlib.sha256(content).hexdigest()
    final = folder / _WEIGHTS.format(weights)
    versions = {
        "sdkd_plugin": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
    values = {"format": FORMAT, **asdict(replace(card, versions=versions)), "weights": weights}
    text = plain_text(values)
    check_writable(final)
    with locked(folder):  # another writer would remove the weights before their card is there
        with atomic_path(final) as path:
            path.write_bytes(content)
        with atomic_path(folder / CARD) as path:
            path.write_bytes(f"{text}checksum: {_sha256(text.encode())}\n".encode())
        # The old weights, and what an interrupted save left.
        remove_stale(folder, "weights-*")
        for other in folder.glob("weights-*.safetensors"):
            if other != final:
                other.unlink(missing_ok=True)
    return folder


def has_model(folder: PathLike) -> bool:
    """Whether a model was saved in a folder."""
    return (Path(folder) / CARD).is_file()


@explained
def load_model(folder: PathLike, fits: ModelCard | None = None) -> tuple[nn.Module, ModelCard]:
    """A saved model with its weights, in eval mode, and its card.

    Args:
        folder: as `save_model` wrote it.
        fits: a card with the data and units at hand, which must be those of the model.

    Raises:
        FileNotFoundError: if there is no model.
        ValueError: if a file is damaged or not what it should be, the model is unknown, its
            arguments do not make these weights, or it does not fit the data.
    """
    folder = _existing(folder)
    with locked(folder):
        card, weights = _read_card(folder)
        path = folder / _WEIGHTS.format(weights)
        try:
            declared = _declared(path)
            if checksum(path) != weights:
                raise ValueError("the checksum of the weights is not the card's")
            if fits is not None:
                card.check_fits(fits)
            model = make_to_fit(card.model, card.arguments, declared)
            model.load_state_dict(load_file(path))
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"the model in {folder} cannot be used: {error}") from error
    return model.eval(), card


@explained
def load_card(folder: PathLike) -> ModelCard:
    """The card of a saved model alone; raises as `load_model`."""
    return _read_card(_existing(folder))[0]


class PhysicalUnits(nn.Module):
    """A model that reads and forecasts physical values.

    Formula: ``output.scale * model((x - input.offset) / input.scale) + output.offset``

    Args:
        model: of normalised values; its taps keep their names.
        units: as in `ModelCard`, or with tensors; a missing part is 1 and 0.

    Raises:
        ValueError: if the input's scale is 0.

    Example:
        >>> units = {"input": {"scale": 2.0, "offset": 1.0}, "output": {"scale": 3.0}}
        >>> PhysicalUnits(nn.ReLU(), units)(torch.tensor([5.0]))
        tensor([6.])
    """

    in_scale: Tensor
    in_offset: Tensor
    out_scale: Tensor
    out_offset: Tensor

    def __init__(self, model: nn.Module, units: _Values) -> None:
        super().__init__()
        self.model = model
        self.taps = {tap: f"model.{path}" for tap, path in getattr(model, "taps", {}).items()}
        for side, values in (("in", "input"), ("out", "output")):
            given = units.get(values, {})
            for name, default in (("scale", 1.0), ("offset", 0.0)):
                number = torch.as_tensor(given.get(name, default), dtype=torch.float32)
                self.register_buffer(f"{side}_{name}", number, persistent=False)
        if not bool((self.in_scale != 0).all()):
            raise ValueError(f"`units` has the input scale {shown(self.in_scale)}, expected no 0.")

    def forward(self, x: Tensor, *args: Any, **inputs: Any) -> Tensor:
        """Forecast; of further inputs those that the model accepts are passed on as they are."""
        accepted = accepted_inputs(self.model, inputs)
        forecast = self.model((x - self.in_offset) / self.in_scale, *args, **accepted)
        return self.out_scale * forecast + self.out_offset


def _existing(folder: PathLike) -> Path:
    if not has_model(folder):
        raise FileNotFoundError(f"{folder} holds no {CARD}, expected what `save_model` wrote.")
    return Path(folder)


def _read_card(folder: Path) -> tuple[ModelCard, str]:
    path = folder / CARD
    values = read_yaml(path)
    weights = values.get("weights")
    values.pop("checksum", None)
    known = {"format", "weights", *(each.name for each in fields(ModelCard))}
    if values.get("format") != FORMAT or values.keys() != known:
        raise ValueError(
            f"{path} has format {shown(values.get('format'))} and {shown(sorted(values))}, "
            f"expected format {FORMAT} and {sorted(known)}: save the model with this version."
        )
    text, _, last = path.read_bytes().rpartition(b"checksum: ")
    if last != f"{_sha256(text)}\n".encode():
        raise ValueError(f"{path} was changed: its last line is not the checksum of what is above.")
    if not isinstance(weights, str) or not re.fullmatch("[0-9a-f]{64}", weights):
        raise ValueError(f"{path} has weights {shown(weights)}, expected their SHA-256.")
    return ModelCard(**{each.name: values[each.name] for each in fields(ModelCard)}), weights


def _declared(path: Path) -> Shapes:
    """Types and shapes of the tensors in a file, from its header."""
    if not path.is_file():
        raise ValueError(f"{path.name} is missing")
    with path.open("rb") as file:
        if (size := int.from_bytes(file.read(8), "little")) > _HEADER_BYTES:
            raise ValueError(f"{path.name} has a header of {size} bytes")
    with safe_open(path, "pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        return {k: (_DTYPES[s.get_dtype()], tuple(s.get_shape())) for k, s in slices.items()}


def _sha256(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def _flat(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        parts = {f"{name}.{key}": each for key, each in value.items()}
    elif isinstance(value, list):
        parts = {f"len({name})": len(value)}
        parts |= {f"{name}[{i}]": each for i, each in enumerate(value)}
    else:
        return {name: value}
    return {key: leaf for part, each in parts.items() for key, leaf in _flat(part, each).items()}


def _close(mine: Any, other: Any) -> bool:
    if isinstance(mine, float) and isinstance(other, float):  # normalisations, fitted anew
        return math.isclose(mine, other, rel_tol=1e-4, abs_tol=1e-6)
    return bool(mine == other)
