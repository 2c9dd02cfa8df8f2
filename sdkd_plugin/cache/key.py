"""What a cache was made from, as plain values that can be compared; its data are in its chunks."""

import functools
import hashlib
import inspect
import json
import re
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sdkd_plugin.augmentation import Augmentation, AugmentationName, make_augmentation
from sdkd_plugin.loss import DistillationLoss
from sdkd_plugin.teachers import FunctionTeacher, named_inputs

FORMAT = f"1 {sys.byteorder}"
"""Another number for another layout of the files: older caches are refused then."""


def cache_key(
    loss: DistillationLoss,
    *,
    storage: str = "float32",
    preprocessing: Mapping[str, Any] | None = None,
    augmentation: AugmentationName | Augmentation | None = None,
    views: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """What the outputs depend on besides the data; parameters as in `precompute`.

    A teacher is known by class, printed structure, parameters and buffers; a function by its
    bytecode and the modules, tensors and numbers that it captures, not by what these call.

    Raises:
        ValueError: if ``preprocessing`` holds values that JSON cannot hold.
    """
    try:
        plain = json.loads(json.dumps(preprocessing or {}, allow_nan=False, default=fingerprint))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`preprocessing` cannot be written as JSON ({error}), expected a dict of strings, "
            "finite numbers, tensors, and lists or dicts of these."
        ) from None
    teachers = []
    for number, teacher in enumerate(loss.teachers):
        kind, (names, any_name) = type(teacher), named_inputs(teacher)
        teachers.append(
            {
                "class": f"{kind.__module__}.{kind.__qualname__}",
                "weights": fingerprint(teacher),
                "taps": list(loss.teacher_taps[number]),
                "inputs": sorted(names),
                "any_input": any_name,
            }
        )
    return {
        "format": FORMAT,
        "teachers": teachers,
        "preprocessing": plain,
        "storage": storage,
        "views": views,
        "augmentation": fingerprint(make_augmentation(augmentation)) if augmentation else None,
        "seed": seed if views else None,
    }


def fingerprint(value: Any) -> str:
    """SHA-256 of all bytes of tensors, and of modules and functions as `cache_key` has it."""
    if isinstance(value, FunctionTeacher):
        value = value.function
    digest = hashlib.sha256(type(value).__qualname__.encode())
    parts: Mapping[str, Any] = {}
    if isinstance(value, Tensor):
        tensor = value.detach().cpu()
        tensor = (tensor if tensor.layout == torch.strided else tensor.to_dense()).contiguous()
        digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    elif isinstance(value, nn.Module):
        structure = f"{value!r}{getattr(value, 'code', '')}"
        digest.update(re.sub(r" at 0x[0-9a-f]+", "", structure).encode())
        parts = {**dict(value.named_parameters()), **dict(value.named_buffers())}
    elif isinstance(value, str | int | float | None):
        digest.update(repr(value).encode())
    elif isinstance(value, Mapping):
        parts = value
    elif isinstance(value, list | tuple):
        parts = {str(i): part for i, part in enumerate(value)}
    elif inspect.isfunction(value):
        seen, code = inspect.getclosurevars(value), value.__code__
        digest.update(code.co_code + re.sub(r" at 0x.*?>", "", f"{code.co_consts}").encode())
        parts = {**seen.globals, **seen.nonlocals, "default": value.__defaults__}
    elif inspect.ismethod(value):
        parts = {"function": value.__func__, "self": value.__self__}
    elif isinstance(value, functools.partial):
        parts = {"function": value.func, "args": value.args, **value.keywords}
    elif callable(value) and not isinstance(value, type):
        parts = getattr(value, "__dict__", {})
    for name in sorted(parts):
        digest.update(f"{name}:{fingerprint(parts[name])}".encode())
    return digest.hexdigest()


def differences(stored: Any, wanted: Any, name: str = "key") -> list[str]:
    """Where two keys differ, in words."""
    if isinstance(stored, list) and isinstance(wanted, list):
        stored, wanted = dict(enumerate(stored)), dict(enumerate(wanted))
    if isinstance(stored, Mapping) and isinstance(wanted, Mapping):
        names = dict.fromkeys((*stored, *wanted))
        found = [differences(stored.get(n), wanted.get(n), f"{name}.{n}") for n in names]
        return [text for texts in found for text in texts]
    if stored == wanted:
        return []
    return [f"`{name}` is {str(stored)[:40]!r} in the cache and {str(wanted)[:40]!r} here"]
