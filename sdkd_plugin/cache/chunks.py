"""What is kept of a batch: the teachers' outputs for all its views, as rows of raw numbers."""

import base64
import functools
import hashlib
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sdkd_plugin._checks import check_finite, check_shape
from sdkd_plugin.augmentation import Augmentation
from sdkd_plugin.cache.files import DTYPES
from sdkd_plugin.loss import DistillationLoss
from sdkd_plugin.spectral.transform import working_dtype
from sdkd_plugin.teachers import TeacherOutput

_SAME = 1e-6
"""How far sums of the same inputs on two devices may differ, of the sum of magnitudes."""


def run(loss: DistillationLoss, inputs: Mapping[str, Any]) -> list[TeacherOutput]:
    """The teachers' outputs for a batch, on the CPU."""
    device = next((p.device for each in loss.teachers for p in each.parameters()), None)
    moved = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in inputs.items()}
    return [output.to("cpu") for output in loss.teacher_outputs(**moved)]


def chunk_of(
    loss: DistillationLoss,
    inputs: Mapping[str, Any],
    numbers: Tensor,
    augmentation: Augmentation | None,
    *,
    storage: str,
    views: int,
    seed: int,
) -> tuple[dict[str, Any], list[Any], Tensor]:
    """What the table keeps of a batch, the columns of a row, and the rows."""
    xs, outputs = [inputs["x"]], []
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        for view in range(views):
            text = f"{seed} {view} {numbers.tolist()}".encode()
            torch.manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:7], "big"))
            augmented = cast(Augmentation, augmentation)(xs[0])
            check_shape("augmentation(x)", augmented.shape, xs[0].shape, "it keeps the shape")
            # As a reader gets them, so that the teachers run on what the student does.
            stored, scale = _encoded(augmented.cpu().flatten(1), storage)
            xs.append(decoded(stored, scale).reshape(augmented.shape).to(augmented))
        for x in xs:
            torch.manual_seed(seed)  # for a teacher that draws
            outputs.append(run(loss, {**inputs, "x": x}))
    of_views = {"x": [x.cpu() for x in xs]} if views else {}
    for i, of_teacher in enumerate(zip(*outputs, strict=True)):
        of_views[f"{i}.forecast"] = [output.forecast for output in of_teacher]
        for tap in of_teacher[0].latents:
            of_views[f"{i}.latent.{tap}"] = [output.latents[tap] for output in of_teacher]
    columns, blocks, scales = [], [], []
    errors: dict[str, list[float]] = {}
    for name, values in of_views.items():
        check_shape(name, values[0].shape[:1], numbers.shape, "one row for each sample of x")
        exact = torch.stack(values, 1).flatten(0, 1)
        dtype = str(exact.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise ValueError(f"{name} is of {exact.dtype}, expected floating-point numbers.")
        columns.append([name, list(exact.shape[1:]), dtype])
        exact = exact.reshape(len(exact), -1)
        stored, scale = _encoded(exact, storage)
        check_finite(name, stored.float())
        error = decoded(stored, scale).double() - exact.double()
        errors[name] = [float(each.square().sum()) for each in (error, exact.double())]
        blocks.append(stored)
        scales += [] if scale is None else [scale]
    small = {
        "index": numbers,
        "sums": torch.stack([input_sums(x).cpu() for x in xs], 1),
        "scales": torch.stack(scales, 1) if scales else torch.zeros(0),
    }
    record = {n: base64.b64encode(v.numpy().tobytes()).decode() for n, v in small.items()}
    return {"errors": errors, **record}, columns, torch.cat(blocks, 1)


def _encoded(rows: Tensor, storage: str) -> tuple[Tensor, Tensor | None]:
    """Rows as they are stored, and the scale of each."""
    if storage != "float16":
        return rows.to(DTYPES[storage]), None
    # Powers of 2 that bring the largest magnitude below 2^15: they round nothing themselves.
    exponent = torch.frexp(rows.float().abs().amax(1)).exponent
    scale = torch.ldexp(torch.ones(len(rows)), exponent - 15)
    return (rows.float() / scale[:, None]).half(), scale


def decoded(stored: Tensor, scale: Tensor | None) -> Tensor:
    """Rows of stored numbers in their own magnitude."""
    if scale is None:
        return stored
    return stored.float() * scale.reshape(-1, *[1] * (stored.ndim - 1))


def input_sums(x: Tensor) -> Float[Tensor, "batch 2"]:
    """A sum of each sample with unequal weights, which notice another order; and its magnitude."""
    flat = x.detach().flatten(1).double()
    return torch.stack([_weighted_sums(x), flat.norm(dim=1) * flat.shape[1] ** 0.5], 1)


def same_inputs(x: Tensor, known: Float[np.ndarray, "batch 2"]) -> Bool[np.ndarray, " batch"]:
    """Which samples have the `input_sums` that are known."""
    differences = np.abs(_weighted_sums(x).cpu().numpy() - known[:, 0])
    return np.asarray(differences <= _SAME * known[:, 1])


def _weighted_sums(x: Tensor) -> Float[Tensor, " batch"]:
    flat = x.detach().reshape(len(x), -1).to(working_dtype(x))
    # A sum adds in pairs, in any layout; a product may add in sequence, or in fewer digits.
    return (flat * _weights(flat.shape[1], flat.device, flat.dtype)).sum(1)


@functools.lru_cache(maxsize=8)
def _weights(n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.linspace(1, 2, n, dtype=torch.float64, device=device).to(dtype)
