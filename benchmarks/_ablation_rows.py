"""The rows of the ablation: what each student learns from.

Here lives each row as data; the systems are in `_ablation_systems`, the training in
`_ablation_training`. A row changes one thing against plain-MSE distillation, or against its base in
`BASES`, so that the change against it is what that part is worth; only the last row puts parts
together. Hyper-parameters were chosen once, before any row was scored, the same for all rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sdkd_plugin import LatentPair
from sdkd_plugin.losses import AggregationName, WeightingName

QUARTER = "a quarter of the labels"
ALL = "all labels"
SETTINGS = {QUARTER: 0.25, ALL: 1.0}
"""Which share of the training inputs has labels; the teachers answer to all of them."""

EQUAL = (1.0, 1.0)
LATENT_WEIGHT = 0.1
LOW, HIGH = (1.0, 0.0), (0.0, 1.0)


@dataclass(frozen=True)
class Row:
    """One way to train a student.

    Attributes:
        name: as the table calls it.
        kd_weight: how many times the system's own weight the teacher counts; 0 is no teacher.
        weighting: of the bands.
        latents: pairs of taps.
        n_teachers: how many of the system's teachers teach.
        aggregation: of several.
        teacher_bound: as `SDKDDistiller` has it.
        function_matching: whether the inputs that are distilled on are mixed up.
        settings: of `SETTINGS`, in which this row is run.
    """

    name: str
    kd_weight: float = 1.0
    weighting: WeightingName | Sequence[float] = EQUAL
    latents: tuple[LatentPair, ...] = ()
    n_teachers: int = 1
    aggregation: AggregationName = "mean"
    teacher_bound: float | None = None
    function_matching: bool = False
    settings: tuple[str, ...] = (QUARTER,)


BOTH = (QUARTER, ALL)
ALONE, PLAIN = "alone", "plain"

ROWS: dict[str, Row] = {
    ALONE: Row("student alone", kd_weight=0.0, settings=BOTH),
    PLAIN: Row("plain-MSE distillation", settings=BOTH),
    # A weighting also changes how much the teacher counts for in total: this row tells them apart.
    "twice": Row("plain-MSE, teacher counts twice", kd_weight=2.0),
    "fixed": Row("weighting: fixed (1, 2)", weighting="fixed", settings=BOTH),
    "relative": Row("weighting: relative", weighting="relative"),
    "adaptive": Row("weighting: adaptive", weighting="adaptive"),
    "confidence": Row("weighting: confidence", weighting="confidence"),
    "latent": Row("latent: frequency-aligned", latents=(LatentPair(weight=LATENT_WEIGHT),)),
    "latent_bands": Row(
        "latent: high and low branch guide their bands",
        latents=(
            LatentPair("latent", "latent_high", LATENT_WEIGHT, weighting=HIGH),
            LatentPair("latent", "latent_low", LATENT_WEIGHT, weighting=LOW),
        ),
    ),
    "fitnets": Row("latent: FitNets", latents=(LatentPair(weight=LATENT_WEIGHT, loss="fitnets"),)),
    "attention": Row(
        "latent: attention transfer",
        latents=(LatentPair(weight=LATENT_WEIGHT, loss="attention"),),
    ),
    "boundary": Row(
        "latent: activation boundaries",
        latents=(LatentPair(weight=LATENT_WEIGHT, loss="boundary"),),
    ),
    "mean": Row("two teachers: mean (AVER-MKD)", n_teachers=2, aggregation="mean"),
    "aekd": Row("two teachers: AEKD", n_teachers=2, aggregation="aekd"),
    "camkd": Row("two teachers: CAMKD", n_teachers=2, aggregation="camkd"),
    # It touches labelled samples only, so it is run where all are.
    "bounded": Row("teacher-bounded, margin 0", teacher_bound=0.0, settings=BOTH),
    "matching": Row("function matching: mixup", function_matching=True),
    "sdkd": Row(
        "SDKD: fixed (1, 2), latent frequency-aligned",
        weighting="fixed",
        latents=(LatentPair(weight=LATENT_WEIGHT),),
    ),
}
"""By the name that ``--rows`` takes, in the order of the table."""

BASES = {"aekd": "mean", "camkd": "mean", "latent_bands": "latent"}
"""Rows that change one thing against another row than plain-MSE distillation."""
