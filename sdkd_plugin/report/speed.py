"""How fast models and their exported files forecast, and what that takes: operations, memory.

Times are of this machine at this moment: compare those of one run only.
"""

import ctypes
import math
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer, set_torch_threads
from torch.utils.flop_counter import FlopCounterMode

from sdkd_plugin._checks import check_choice, check_positive, check_positive_int
from sdkd_plugin.export import OnnxModel, export_model, quantize_onnx
from sdkd_plugin.report.metrics import parameter_count
from sdkd_plugin.report.records import environment
from sdkd_plugin.report.tables import format_table
from sdkd_plugin.teachers import accepted_inputs

Form = Literal["eager", "compiled", "onnx", "int8"]
Forecast = Callable[..., Tensor]
Batches = Mapping[int, Mapping[str, Tensor]]
ROUNDS, LEAST_CALLS, MOST_CALLS = 10, 30, 300


class Speeds(NamedTuple):
    """What `measure_speed` found.

    Attributes:
        rows: one for each model, form and batch size.
        left_out: why a form of a model is missing, by ``"model, form"``.
    """

    rows: pd.DataFrame
    left_out: dict[str, str]

    def report(self, measure: str | None = None) -> str:
        """Protocol, table and what was left out, in markdown; ``measure`` is a column of scores."""
        first = self.rows.iloc[0]
        columns = {"p50_ms": ("p50 ms", ".3g"), "p95_ms": ("p95 ms", ".3g")}
        columns |= {"samples_per_second": ("samples/s", ",.0f")}
        columns |= {"times_faster": (f"times faster than {first.model}, eager", ".1f")}
        columns |= {"memory_mb": ("memory MB", ",.1f"), "parameters": ("parameters", ",.0f")}
        columns |= {"flops": ("FLOPs a sample", ",.3g")}
        columns |= {measure: (measure, ".4g")} if measure else {}
        table = format_table(self.rows, index=["model", "form", "batch_size"], columns=columns)
        missing = "".join(f"\nLeft out: {form}: {why}\n" for form, why in self.left_out.items())
        return (
            f"{first.threads} thread(s), {first.hardware}; torch {first.torch}; all in turns, 30 "
            "to 300 calls each. Times of one table can be compared, those of two cannot.\n\n"
            f"{table}\n{missing}"
        )

    def points(self, measure: str, references: Collection[str] = ()) -> pd.DataFrame:
        """Errors and latencies at the least batch size, for ``accuracy_latency``.

        Args:
            measure: a column of scores.
            references: names of models, such as teachers, of which the eager form alone is taken.
        """
        rows = self.rows[self.rows.batch_size == self.rows.batch_size.min()]
        rows = rows.assign(reference=rows.model.isin(references), deviation=0.0)
        rows = rows[~rows.reference | (rows.form == "eager")]
        rows["series"] = rows.model.where(rows.reference, rows.form)
        return rows.rename(columns={"p50_ms": "milliseconds", measure: "error"})


@torch.no_grad()
def measure_speed(
    models: Mapping[str, nn.Module],
    inputs: Callable[[int], Mapping[str, Tensor]],
    *,
    batch_sizes: Sequence[int] = (1, 8, 32),
    forms: Iterable[Form] = ("eager", "onnx"),
    threads: int | None = None,
    seconds: float = 1.0,
    scores: Callable[[Forecast], Mapping[str, float]] | None = None,
) -> Speeds:
    """Latency and throughput of models by batch size, eager and in other forms.

    All forms of all models take turns, ten times each; each call is timed by
    ``torch.utils.benchmark`` after two calls that are not. Columns of the rows:

    - ``p50_ms``, ``p95_ms``: median and 95th percentile of a call; ``calls``: of how many,
    - ``samples_per_second``: the batch size over the median,
    - ``times_faster``: the median of the first model, eager, over that of the row, same batch,
    - ``parameters``; ``flops``: of the eager forecast of one sample, a multiplication and an
      addition being two, as ``torch.utils.flop_counter`` counts (matrix products and convolutions),
    - ``memory_mb``: the most that a first forecast of up to that batch size takes beyond the loaded
      model, in MB: of the GPU, or resident memory of the process; on a CPU missing outside Linux.

    Args:
        models: by name, the reference first; they are put in eval mode.
        inputs: for a batch size, ``x`` and all other inputs by name, on the models' device. A
            model is given those that it accepts. Int8 is calibrated on the largest batch.
        batch_sizes: of the calls.
        forms: ``"compiled"`` by ``torch.compile``, ``"onnx"`` by `export_model`, ``"int8"`` by
            `quantize_onnx`; the last two run on a CPU alone. The eager form is always measured.
        threads: of the CPU, by default torch's.
        seconds: roughly, for each form and batch size; 30 to 300 calls are timed.
        scores: further columns, from a function that forecasts from named inputs.

    Raises:
        ValueError: if an option is wrong. A form that cannot be made is left out.

    Example:
        >>> models = {"large": nn.Linear(64, 64), "small": nn.Linear(64, 1)}
        >>> batch = lambda n: {"x": torch.zeros(n, 64)}
        >>> found = measure_speed(models, batch, batch_sizes=[4], forms=["eager"], seconds=0.1)
        >>> found.rows[["model", "parameters", "flops"]].values.tolist()
        [['large', 4160, 8192.0], ['small', 65, 128.0]]
    """
    threads = threads or torch.get_num_threads()
    check_positive_int("threads", threads)
    check_positive("seconds", seconds)
    for form in (forms := list(dict.fromkeys(["eager", *forms]))):
        check_choice("forms", form, get_args(Form))
    for size in batch_sizes:
        check_positive_int("batch_sizes", size)
    batches = {size: inputs(size) for size in sorted(batch_sizes)}
    made, left_out = dict[tuple[str, str], Forecast](), dict[str, str]()
    peaks = dict[tuple[str, str], list[float]]()
    rows, device = list[dict[str, Any]](), next(iter(batches[min(batches)].values())).device
    with set_torch_threads(threads), tempfile.TemporaryDirectory() as folder:
        for i, (name, model) in enumerate(models.items()):
            for form in forms:
                file = Path(folder, f"{i}.{form}.onnx")
                try:
                    made[name, form] = run = _made(model.eval(), form, batches, file, threads)
                except Exception as error:  # compilers and exporters raise errors of many classes
                    reason = str(error).strip().splitlines() or [type(error).__name__]
                    left_out[f"{name}, {form}"] = reason[0]
                else:
                    peaks[name, form] = _memory(run, batches, device)
        costs = {
            name: _costs(model, made[name, "eager"], batches) for name, model in models.items()
        }
        found = {key: dict(scores(run)) if scores else {} for key, run in made.items()}
        for i, (size, batch) in enumerate(batches.items()):
            runs = {key: partial(run, **batch) for key, run in made.items()}
            times = _times(runs, threads, seconds)
            reference = float(np.median(next(iter(times.values()))))
            for key, each in times.items():
                p50, p95 = np.quantile(each, [0.5, 0.95]).tolist()
                row = {"model": key[0], "form": key[1], "batch_size": size, "calls": len(each)}
                row |= {"p50_ms": 1e3 * p50, "p95_ms": 1e3 * p95, "samples_per_second": size / p50}
                row |= {"times_faster": reference / p50, "memory_mb": peaks[key][i]}
                rows.append({**row, **costs[key[0]], **found[key]})
        here = environment(device)
    return Speeds(pd.DataFrame(rows).assign(**here), left_out)


def _made(model: nn.Module, form: str, batches: Batches, file: Path, threads: int) -> Forecast:
    """A model in a form; what is wrong with it shows here."""
    largest = batches[max(batches)]
    more = list(accepted_inputs(model, {n: v for n, v in largest.items() if n != "x"}))

    def eager(x: Tensor, **inputs: Tensor) -> Tensor:
        return model(x, **{name: inputs[name] for name in more})

    if form == "eager":
        return eager
    if form == "compiled":
        compiled = torch.compile(eager)
        for batch in batches.values():
            compiled(**batch)
        return compiled
    if largest["x"].device.type != "cpu":
        raise ValueError("ONNX files are timed on the CPU, where the models are not")
    export_model(model, largest, file)
    if form == "int8":
        quantize_onnx(file, file := file.with_suffix(".int8.onnx"), [largest], [largest])
    return OnnxModel(file, threads)


def _costs(model: nn.Module, run: Forecast, batches: Batches) -> dict[str, Any]:
    size = min(batches)
    with FlopCounterMode(display=False) as counter:
        run(**batches[size])
    return {"parameters": parameter_count(model), "flops": counter.get_total_flops() / size}


def _times(
    runs: Mapping[Any, Callable[[], Any]], threads: int, seconds: float
) -> dict[Any, list[float]]:
    """Seconds of each call; all take turns, so that a busy moment of the machine meets all."""
    timers = {
        key: Timer("run()", globals={"run": run}, num_threads=threads) for key, run in runs.items()
    }
    times: dict[Any, list[float]] = {key: [] for key in timers}
    # Each reading takes three calls: torch's timer makes two before the one that it times.
    calls = {key: seconds / (3 * timer.timeit(1).median) for key, timer in timers.items()}
    for _ in range(ROUNDS):
        for key, timer in timers.items():
            turn = round(min(max(calls[key], LEAST_CALLS), MOST_CALLS) / ROUNDS)
            times[key] += [timer.timeit(1).median for _ in range(turn)]
    return times


def _memory(run: Forecast, batches: Batches, device: torch.device) -> list[float]:
    """Megabytes beyond the loaded model up to each batch size; NaN where they are not known."""
    reset = Path("/proc/self/clear_refs")
    peak: Callable[[], int]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        peak = partial(torch.cuda.max_memory_allocated, device)
        before = torch.cuda.memory_allocated(device)
    elif reset.exists():
        # What the C library keeps of memory freed before would hide what is taken now.
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
        reset.write_text("5")
        peak, before = partial(_resident, "VmHWM"), _resident("VmRSS")
    else:
        return [math.nan] * len(batches)
    peaks = list[float]()
    for batch in batches.values():
        run(**batch)
        peaks.append((peak() - before) / 1e6)
    return peaks


def _resident(name: str) -> int:
    """A line of the process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kibibytes,) = (line.split()[1] for line in lines if line.startswith(name))
    return 1024 * int(kibibytes)
