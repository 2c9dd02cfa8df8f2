"""An ONNX file with 8-bit weights and activations, and what that costs in accuracy."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from sdkd_plugin._files import PathLike, atomic_path
from sdkd_plugin.export.files import OnnxModel, needed, quiet


class Quantized(NamedTuple):
    """What int8 costs and saves."""

    error: float
    """Relative L2 of the int8 forecasts to the float ones, over all test samples."""
    bytes_before: int
    bytes_after: int


def quantize_onnx(
    source: PathLike,
    path: PathLike,
    calibration: Iterable[Mapping[str, Tensor]],
    test: Iterable[Mapping[str, Tensor]],
) -> Quantized:
    """Write the static int8 form of an ONNX file (QDQ) whose convolutions hold its weights.

    Weights of convolutions are quantised by channel; their inputs by the range that they take on
    the calibration batches. All else stays in float32.

    Args:
        source: an ONNX file, as of `export_model`.
        path: the int8 file.
        calibration: batches of inputs by name, of the training samples.
        test: other batches, on which both files are compared.

    Raises:
        ImportError: if ONNX Runtime is not installed.
        ValueError: if there are no batches, or the int8 file is not smaller: it is removed.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from torch import nn
        >>> from sdkd_plugin.export import export_model
        >>> folder, x = Path(tempfile.mkdtemp()), torch.randn(4, 32, 8, 8)
        >>> files, batches = [folder / name for name in ("float.onnx", "int8.onnx")], [{"x": x}]
        >>> error = export_model(nn.Conv2d(32, 64, 3), x, files[0])
        >>> found = quantize_onnx(*files, batches, batches)
        >>> found.error < 0.02, found.bytes_before > 3 * found.bytes_after
        (True, True)
    """
    quantization = needed("onnxruntime.quantization")
    preprocess = needed("onnxruntime.quantization.shape_inference").quant_pre_process
    before = OnnxModel(source)
    with atomic_path(path) as temporary:
        prepared = temporary.with_suffix(".prepared.onnx")
        try:
            with quiet():
                preprocess(os.fspath(source), os.fspath(prepared), skip_symbolic_shape=True)
                quantization.quantize_static(
                    prepared,
                    temporary,
                    _Reader(before, calibration),
                    op_types_to_quantize=["Conv", "ConvTranspose"],
                    per_channel=True,
                )
        finally:
            prepared.unlink(missing_ok=True)
        sizes = Path(source).stat().st_size, temporary.stat().st_size
        if sizes[1] >= sizes[0]:
            raise ValueError(
                f"{source} has {sizes[0]} bytes and its int8 form {sizes[1]}, expected fewer: int8 "
                "pays where convolutions hold most weights; ship the float file."
            )
        after, wrong, norm = OnnxModel(temporary), 0.0, 0.0
        for inputs in test:
            expected = before(**inputs).double()
            wrong += float((after(**inputs).double() - expected).square().sum())
            norm += float(expected.square().sum())
    return Quantized((wrong / norm) ** 0.5, *sizes)


class _Reader:
    """Batches as ONNX Runtime's calibration reads them."""

    def __init__(self, model: OnnxModel, batches: Iterable[Mapping[str, Tensor]]) -> None:
        self.feeds = (model.feed(batch) for batch in batches)

    def get_next(self) -> Any:
        """The next batch, None at the end."""
        return next(self.feeds, None)
