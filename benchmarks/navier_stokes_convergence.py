"""The solver's large fourth-order step against the FNO recipe's small first-order one.

Writes ``results/navier_stokes_convergence.csv`` beside this file and exits with 1 when a bar is
missed:

- orders: each scheme converges at its order to a float64 reference;
- recipe: the default step comes closer to the reference than the recipe's 1e-4, at most a
  twentieth of its time;
- horizon: in float32, at t = 20 and viscosity 1e-4, the default step is within 1e-3 of the
  reference (relative L2).

Run it with ``python benchmarks/navier_stokes_convergence.py``: about half a minute on one core.
"""

import argparse
import csv
import math
import platform
import sys
import time
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from sdkd_plugin import __version__
from sdkd_plugin.data.navier_stokes import Scheme, gaussian_random_field, solve
from sdkd_plugin.data.store import atomic_path
from sdkd_plugin.data.vorticity import check_times

RESULTS = Path(__file__).parent / "results" / "navier_stokes_convergence.csv"
RESOLUTION = 64
VISCOSITY = 1e-4
SAMPLES = 4

ORDERS = {"etdrk4": 4, "cn-heun": 2, "cn-euler": 1}
ORDER_WINDOW = 0.15
COARSEST = {"etdrk4": 32, "cn-heun": 128, "cn-euler": 256}
RECIPE_DT = 1e-4
RECIPE_SPEEDUP = 20
HORIZON_BAR = 1e-3

Row = dict[str, Any]


class Record:
    """Solves, compares with a reference, and keeps a row of each."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.seed = seed
        self.initial = gaussian_random_field(SAMPLES, RESOLUTION, generator=seed).to(device)
        hardware = (
            torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, 1 thread"
        )
        self.environment: Row = {
            "hardware": hardware,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "sdkd_plugin": __version__,
        }
        self.rows: list[Row] = []

    def solve(
        self,
        study: str,
        duration: float,
        *,
        scheme: Scheme = "etdrk4",
        dt: float | None = None,
        dtype: torch.dtype = torch.float64,
        reference: Tensor | None = None,
    ) -> tuple[Tensor, Row]:
        """The last fields, and the row that was kept of them."""
        _, steps = check_times(
            duration=duration, record_interval=1.0, dt=dt, scheme=scheme, points=RESOLUTION
        )
        start = time.perf_counter()
        last = solve(
            self.initial.to(dtype), viscosity=VISCOSITY, duration=duration, dt=dt, scheme=scheme
        )[:, -1].double()
        seconds = time.perf_counter() - start
        row: Row = {
            "study": study,
            "scheme": scheme,
            "dt": 1 / steps,
            "default_dt": dt is None,
            "dtype": str(dtype).removeprefix("torch."),
            "resolution": RESOLUTION,
            "viscosity": VISCOSITY,
            "duration": duration,
            "samples": SAMPLES,
            "seed": self.seed,
            "relative_l2": "" if reference is None else relative_l2(last, reference),
            "order": "",
            "seconds": seconds,
            **self.environment,
        }
        self.rows.append(row)
        return last, row

    def write(self) -> None:
        """All rows into the CSV file."""
        with atomic_path(RESULTS) as path, path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)


def relative_l2(got: Tensor, expected: Tensor) -> float:
    """Mean over samples of |got - expected| / |expected|."""
    return float(((got - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).mean())


def orders(record: Record) -> list[str]:
    """Each scheme at three steps; what misses the window."""
    reference, _ = record.solve("orders", 2.0, dt=1 / 512)
    missed = []
    for scheme in get_args(Scheme):
        previous = math.nan
        for halvings in range(3):
            dt = 1 / (COARSEST[scheme] * 2**halvings)
            _, row = record.solve("orders", 2.0, scheme=scheme, dt=dt, reference=reference)
            error = row["relative_l2"]
            if halvings:
                row["order"] = order = math.log2(previous / error)
                if not abs(order - ORDERS[scheme]) <= ORDER_WINDOW:
                    missed.append(f"order of {scheme} is {order:.3f}, not {ORDERS[scheme]}")
            previous = error
    return missed


def recipe(record: Record) -> list[str]:
    """The recipe's scheme and step against the default; what is worse than promised."""
    reference, _ = record.solve("recipe", 2.0, dt=1 / 512)
    _, theirs = record.solve("recipe", 2.0, scheme="cn-euler", dt=RECIPE_DT, reference=reference)
    _, ours = record.solve("recipe", 2.0, reference=reference)
    their_error, our_error = (row["relative_l2"] for row in (theirs, ours))
    speedup = theirs["seconds"] / ours["seconds"]
    missed = []
    if our_error > their_error:
        missed.append(
            f"default step's error {our_error:.2e} is above the recipe's {their_error:.2e}"
        )
    if speedup < RECIPE_SPEEDUP:
        missed.append(f"default step is {speedup:.1f} times faster, not {RECIPE_SPEEDUP}")
    return missed


def horizon(record: Record) -> list[str]:
    """The default step and twice it in float32 at t = 20; what is too far off."""
    reference, _ = record.solve("horizon", 20.0, dt=1 / 256)
    single = torch.float32
    record.solve("horizon", 20.0, dt=2 / RESOLUTION, dtype=single, reference=reference)
    _, row = record.solve("horizon", 20.0, dtype=single, reference=reference)
    error = row["relative_l2"]
    return [f"error at t = 20 is {error:.2e}"] if error > HORIZON_BAR else []


def main() -> int:
    """Run the three studies, write the rows, say what was missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    # One thread, so that times compare between machines with other numbers of cores.
    torch.set_num_threads(1)
    record = Record(torch.device(arguments.device), arguments.seed)
    missed = [*orders(record), *recipe(record), *horizon(record)]
    record.write()
    for row in record.rows:
        tqdm.write(
            "{study:8} {scheme:8} dt={dt:<10.6g} {dtype} error={relative_l2} order={order} "
            "{seconds:.2f} s".format(**row)
        )
    for miss in missed:
        print(f"missed: {miss}", file=sys.stderr)
    print(f"{len(record.rows)} rows in {RESULTS}; {len(missed)} bars missed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
