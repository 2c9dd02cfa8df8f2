"""A trained model as a file that runs without this package: ONNX, int8, ``torch.export``."""

from sdkd_plugin.export.files import OnnxModel, export_model, portable
from sdkd_plugin.export.fourier import RealSpectralConv
from sdkd_plugin.export.int8 import Quantized, quantize_onnx

__all__ = [
    "OnnxModel",
    "Quantized",
    "RealSpectralConv",
    "export_model",
    "portable",
    "quantize_onnx",
]
