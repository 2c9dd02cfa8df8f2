"""Writing a model to a file, and comparing the file with the model before it takes its name.

Layers that the exporter does not know are replaced in a copy of the model; an adapter registers
with `portable` how its host's layers are.
"""

import copy
import functools
import importlib
import inspect
import logging
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdkd_plugin._checks import check_choice, check_positive, check_positive_int
from sdkd_plugin._files import PathLike, atomic_path
from sdkd_plugin.model_folder import PhysicalUnits
from sdkd_plugin.teachers import accepted_inputs

SHARED = ("edge_index", "edge_weight")
"""Inputs that all samples of a batch share; their last axis counts the edges."""

Units = tuple[float | Tensor, float | Tensor]
"""Scale and offset, ``physical = scale * value + offset``; tensors broadcast against the field."""


class OnnxModel:
    """An ONNX file as a function of tensors, on the CPU.

    Args:
        path: the file.
        threads: of ONNX Runtime; by default as many as torch has.

    Raises:
        ImportError: if ONNX Runtime is not installed.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "model.onnx")
        >>> error = export_model(nn.Conv2d(1, 1, 3), torch.randn(2, 1, 8, 8), path)
        >>> OnnxModel(path)(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 1, 6, 6])
    """

    def __init__(self, path: PathLike, threads: int | None = None) -> None:
        runtime = needed("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3  # warnings tell of optimisations that were not made
        providers = ["CPUExecutionProvider"]
        self.session = runtime.InferenceSession(os.fspath(path), options, providers=providers)
        self.names = [each.name for each in self.session.get_inputs()]

    def __call__(self, x: Tensor, **inputs: Tensor) -> Tensor:
        """The forecast; inputs that the graph does not have are left out."""
        return torch.from_numpy(self.session.run(None, self.feed({"x": x, **inputs}))[0])

    def feed(self, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """The graph's inputs as arrays."""
        return {name: inputs[name].detach().cpu().numpy() for name in self.names}


@functools.singledispatch
def portable(layer: nn.Module, x: Tensor) -> nn.Module:
    """A layer that computes what ``layer`` does, of operations that every exporter knows.

    Adapters register their host's layers: ``portable.register(Layer, function)``.

    Args:
        layer: of a copy of the model.
        x: the first argument of its call on the example.
    """
    return layer


def export_model(
    model: nn.Module,
    example: Tensor | Mapping[str, Tensor],
    path: PathLike,
    *,
    x_units: Units = (1.0, 0.0),
    y_units: Units = (1.0, 0.0),
    shared: Collection[str] = SHARED,
    samples: int = 100,
    tolerance: float = 1e-4,
) -> float:
    """Write a model as a file for any batch size and, on a graph, any number of edges.

    The file computes ``a_y model((x - b_x) / a_x, **inputs) + b_y``, with scale a and offset b of
    the units. It is compared with the model on fresh inputs: batches of one, two and more samples,
    each input drawn from a normal distribution with the example's mean and deviation. Inputs that
    are no floats are drawn from the example's rows, and shared ones are the example's. Layers are
    replaced as registered with `portable`. The model is not changed.

    Args:
        model: its copy is exported in eval mode, on the CPU.
        example: ``x`` in physical units, or all inputs by the names of the model's forward; those
            that it does not take are left out. All but the shared ones begin with the batch.
        path: the file, ``.onnx`` or ``.pt2``, the format of ``torch.export.load``.
        x_units: of ``x``: scale and offset of its normalisation.
        y_units: of the forecast.
        shared: names of inputs without a batch axis, whose last axis may vary.
        samples: on which file and model are compared.
        tolerance: of the error.

    Returns:
        The largest relative L2 error of a sample, ``||file - model|| / ||model||``.

    Raises:
        ImportError: if ONNX is not installed.
        ValueError: if an option is wrong, the exporter refuses the model, or the error is above the
            tolerance. A file of that name that was there before is left.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "model.pt2")
        >>> export_model(nn.Conv2d(1, 1, 3), torch.randn(2, 1, 8, 8), path) < 1e-4
        True
    """
    check_choice("path's suffix", Path(path).suffix, (".onnx", ".pt2"))
    check_positive_int("samples", samples)
    check_positive("tolerance", tolerance)
    given = {"x": example} if isinstance(example, Tensor) else dict(example)
    if "x" not in given:
        raise ValueError(f"`example` has the inputs {list(given)}, expected one named 'x'.")
    given = {name: value.detach().cpu() for name, value in given.items()}
    given = {"x": given.pop("x")} | accepted_inputs(model, given)
    pairs = {"input": x_units, "output": y_units}
    units = {side: {"scale": scale, "offset": offset} for side, (scale, offset) in pairs.items()}
    reference = PhysicalUnits(copy.deepcopy(model), units).cpu().eval().requires_grad_(False)
    batched = {name: value for name, value in given.items() if name not in shared}
    # Axes shorter than 2 in the example would be taken for constants.
    two = {name: torch.cat([value, value])[: max(2, len(value))] for name, value in batched.items()}
    for name in given.keys() - two.keys():
        more = given[name].new_zeros(*given[name].shape[:-1], max(0, 2 - given[name].shape[-1]))
        two[name] = torch.cat([given[name], more], dim=-1)
    traced = _traced(reference, given | two, shared)
    with atomic_path(path) as temporary:
        if temporary.suffix == ".onnx":
            with quiet():
                needed("onnxscript")
                exporter: Any = torch.onnx.export(
                    traced, dynamo=True, external_data=False, verbose=False
                )
                exporter.save(temporary)
            written: Any = OnnxModel(temporary)
        else:
            torch.export.save(traced, temporary)
            written = torch.export.load(temporary).module()
        error = 0.0
        for inputs in _fresh(given, batched, samples):
            error = max(error, relative_error(written(**inputs), reference(**inputs)))
        if not error <= tolerance:  # NaN is refused too
            raise ValueError(
                f"the exported file differs from the model by {error:.2g} (relative L2), expected "
                f"at most `tolerance={tolerance:g}`; it is removed. A model that draws random "
                "numbers in eval mode, or branches on its inputs' values, cannot be exported."
            )
    return error


def _traced(
    reference: PhysicalUnits, example: Mapping[str, Tensor], shared: Collection[str]
) -> torch.export.ExportedProgram:
    """The program of a model, with the registered layers replaced in a copy of it."""
    changed: nn.Module = copy.deepcopy(reference)
    plain, kinds = portable.dispatch(nn.Module), list[Any]()
    for name, layer in list(changed.named_modules()):
        if portable.dispatch(type(layer)) is not plain:
            kinds.append((name, layer, layer.register_forward_pre_hook(_remember)))
    if kinds:
        with torch.no_grad():
            changed(**example)
    for name, layer, hook in kinds:
        hook.remove()
        changed.set_submodule(name, portable(layer, layer._seen))

    def forward(*values: Tensor, **named: Tensor) -> Tensor:
        return inner(**dict(zip(example, values, strict=False)), **named)

    # torch.export names a program's inputs by the signature.
    inner, changed.forward = changed.forward, forward
    usual = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, usual) for name in example]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    batch, edges = (torch.export.Dim(name, min=1) for name in ("batch", "edges"))
    dynamic = {
        name: {value.ndim - 1: edges} if name in shared else {0: batch}
        for name, value in example.items()
    }
    try:
        with quiet():
            return torch.export.export(changed, (), dict(example), dynamic_shapes=dynamic)
    except Exception as error:  # the exporter raises errors of many classes
        raise ValueError(
            f"torch.export refuses this {type(reference.model).__name__}: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error


def _remember(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
    layer._seen = args[0]


def _fresh(
    given: Mapping[str, Tensor], batched: Collection[str], samples: int
) -> Iterator[dict[str, Tensor]]:
    """Random inputs in batches of 1, 2 and then 8 samples."""
    generator, done = torch.Generator().manual_seed(0), 0
    for size in (1, 2, *[8] * samples):
        if (size := min(size, samples - done)) == 0:
            return
        done += size
        inputs = dict(given)
        for name in batched:
            value = given[name]
            if value.is_floating_point():
                noise = torch.randn(size, *value.shape[1:], generator=generator)
                inputs[name] = (value.mean() + value.std() * noise).to(value.dtype)
            else:
                inputs[name] = value[torch.randint(len(value), (size,), generator=generator)]
        yield inputs


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest ``||got - expected|| / ||expected||`` of a sample, in float64."""
    got, expected = (each.flatten(1).double() for each in (got, expected))
    return float(((got - expected).norm(dim=1) / expected.norm(dim=1)).max())


def needed(module: str) -> Any:
    """A module of the extra ``export``."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        remedy = "pip install 'sdkd_plugin[export]'"
        raise ImportError(f"{module} is needed for ONNX files: {remedy}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' deprecation warnings and their notes on optional packages."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
