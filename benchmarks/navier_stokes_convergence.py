"""The solver's large fourth-order step against the FNO recipe's small first-order one.

Writes ``results/navier_stokes_convergence.csv`` and exits with 1 when a bar is missed:

- orders: each scheme converges at its order to a float64 reference;
- recipe: the default step comes closer to it than the recipe's, in a twentieth of the time;
- horizon: in float32, at t = 20, the default step is within 1e-3 of it (relative L2).
"""

import argparse
import csv
import math
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdkd_plugin import __version__
from sdkd_plugin._files import atomic_path
from sdkd_plugin.data.navier_stokes import gaussian_random_field
from sdkd_plugin.data.vorticity import Scheme, scheme_times, solve

RESULTS = Path(__file__).parent / "results" / "navier_stokes_convergence.csv"
RESOLUTION, VISCOSITY, SAMPLES = 64, 1e-4, 4

# Each scheme's order and the steps a unit of time of its coarsest run.
ORDERS: dict[Scheme, tuple[int, int]]
ORDERS = {"etdrk4": (4, 32), "cn-heun": (2, 128), "cn-euler": (1, 256)}
ORDER_WINDOW = 0.15
RECIPE_DT, RECIPE_SPEEDUP, HORIZON_BAR = 1e-4, 20, 1e-3


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
        versions = (hardware, torch.__version__, platform.python_version(), __version__)
        names = ("hardware", "torch", "python", "sdkd_plugin")
        self.environment = dict(zip(names, versions, strict=True))
        self.rows: list[dict[str, Any]] = []

    def solve(
        self,
        study: str,
        duration: float,
        *,
        scheme: Scheme = "etdrk4",
        dt: float | None = None,
        dtype: torch.dtype = torch.float64,
        reference: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """The last fields, and the row that was kept of them."""
        flow: dict[str, Any] = {"duration": duration, "dt": dt, "scheme": scheme}
        start = time.perf_counter()
        last = solve(self.initial.to(dtype), viscosity=VISCOSITY, **flow)[:, -1].double()
        seconds = time.perf_counter() - start
        row = {
            "study": study,
            "scheme": scheme,
            "dt": scheme_times(scheme, RESOLUTION, duration, 1.0, dt).dt,
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


def relative_l2(got: Tensor, expected: Tensor) -> float:
    """Mean over samples of |got - expected| / |expected|."""
    return float(((got - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).mean())


def orders(record: Record) -> dict[str, bool]:
    """Each scheme at three steps."""
    reference, _ = record.solve("orders", 2.0, dt=1 / 512)
    kept = {}
    for scheme, (order, coarsest) in ORDERS.items():
        previous = math.nan
        for dt in (1 / coarsest, 0.5 / coarsest, 0.25 / coarsest):
            _, row = record.solve("orders", 2.0, scheme=scheme, dt=dt, reference=reference)
            if not math.isnan(previous):
                row["order"] = found = math.log2(previous / row["relative_l2"])
                kept[f"order {order} of {scheme}: {found:.3f}"] = abs(found - order) <= ORDER_WINDOW
            previous = row["relative_l2"]
    return kept


def main() -> int:
    """Run the three studies, write the rows, print the bars that are missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    # One thread, so that times compare between machines with other numbers of cores.
    torch.set_num_threads(1)
    record = Record(torch.device(arguments.device), arguments.seed)
    kept = orders(record)
    end, _ = record.solve("recipe", 2.0, dt=1 / 512)
    _, theirs = record.solve("recipe", 2.0, scheme="cn-euler", dt=RECIPE_DT, reference=end)
    _, ours = record.solve("recipe", 2.0, reference=end)
    kept["an error of at most the recipe's"] = ours["relative_l2"] <= theirs["relative_l2"]
    speedup = theirs["seconds"] / ours["seconds"]
    kept[f"{RECIPE_SPEEDUP} times the recipe's speed: {speedup:.1f}"] = speedup >= RECIPE_SPEEDUP
    end, _ = record.solve("horizon", 20.0, dt=1 / 256)
    record.solve("horizon", 20.0, dt=2 / RESOLUTION, dtype=torch.float32, reference=end)
    _, row = record.solve("horizon", 20.0, dtype=torch.float32, reference=end)
    error = row["relative_l2"]
    kept[f"error of {HORIZON_BAR} at t = 20: {error:.2e}"] = error <= HORIZON_BAR
    with atomic_path(RESULTS) as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(record.rows[0]))
        writer.writeheader()
        writer.writerows(record.rows)
    missed = [f"missed: {bar}" for bar, well in kept.items() if not well]
    print(f"{len(record.rows)} rows in {RESULTS}; {len(missed)} bars missed", *missed, sep="\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
