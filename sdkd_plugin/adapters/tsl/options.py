"""The options of distillation as a configuration has them, and what a predictor makes of them.

Here lives the group ``sdkd/distill`` in Python: its fields, their checks, and the way from strings
and numbers to `Bands`, transforms and weightings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_args

from jaxtyping import Float, Int
from torch import Tensor

from sdkd_plugin._checks import check_choice, check_positive
from sdkd_plugin.latents import LatentPair
from sdkd_plugin.losses import AggregationName, WeightingName, make_weighting
from sdkd_plugin.spectral import Bands, GraphTransform
from sdkd_plugin.spectral.graph import Normalization, Symmetrization


@dataclass(frozen=True)
class DistillOptions:
    """The group ``sdkd/distill`` of a Hydra configuration.

    Args:
        teacher: folder of a trained teacher, as `save_forecaster` wrote it; None where the run
            has one.
        kd_weight: what the teacher counts for against the labels.
        cutoff: where the low band ends, as a share of the graph's highest frequency; several, in
            ascending order, make several bands.
        transition: width of the bands' edges, as `Bands`.
        weighting: ``fixed``, ``relative``, ``adaptive`` or ``confidence``, or numbers, one a band
            from low to high.
        aggregation: of several teachers: ``mean``, ``aekd`` or ``camkd``.
        teacher_bound: a margin, as `SDKDDistiller`, in scaled units; None is no bound.
        latents: taps to distil, each a mapping of the fields of `LatentPair` that a configuration
            can have: ``student``, ``teacher``, ``weight``, ``loss``, ``of``.
        normalization: of the graph's Laplacian: ``symmetric`` or ``combinatorial``.
        symmetrization: what a directed graph becomes: ``mean``, ``max``, or refused (``refuse``).
        check_finite: whether every step looks for NaN and Inf.

    Raises:
        ValueError: if an option has a value that it does not take.

    Example:
        >>> DistillOptions(cutoff=[0.25, 0.5], weighting=[1.0, 1.0, 2.0]).bands.n_bands
        3
    """

    teacher: str | None = None
    kd_weight: float = 1.0
    cutoff: float | Sequence[float] = 0.25
    transition: float = 0.0
    weighting: WeightingName | Sequence[float] = "fixed"
    aggregation: AggregationName = "mean"
    teacher_bound: float | None = None
    latents: Sequence[Mapping[str, Any]] = ()
    normalization: Normalization = "symmetric"
    symmetrization: Symmetrization = "mean"
    check_finite: bool = True

    def __post_init__(self) -> None:
        check_positive("kd_weight", self.kd_weight, allow_zero=True)
        if self.teacher_bound is not None:
            check_positive("teacher_bound", self.teacher_bound, allow_zero=True)
        check_choice("aggregation", self.aggregation, get_args(AggregationName))
        check_choice("normalization", self.normalization, get_args(Normalization))
        check_choice("symmetrization", self.symmetrization, get_args(Symmetrization))
        # Made for their checks: a run shall not find out after an hour of training the teacher.
        make_weighting(self.weighting, self.bands.n_bands)
        _ = self.pairs

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "DistillOptions":
        """The options of a configuration, such as ``cfg.sdkd.distill``.

        Args:
            config: names and values, an OmegaConf configuration too; what it lacks has its default.

        Raises:
            ValueError: if it has an option that does not exist, and as the class.

        Example:
            >>> DistillOptions.from_config({"kd_weight": 2.0}).kd_weight
            2.0
        """
        known = [each.name for each in fields(cls)]
        for name in config:
            check_choice("an option of sdkd.distill", name, known)
        return cls(**{str(name): _plain(value) for name, value in config.items()})

    @property
    def bands(self) -> Bands:
        """The partition of the graph's frequencies."""
        cutoff = self.cutoff
        edges = (float(cutoff),) if isinstance(cutoff, int | float) else tuple(cutoff)
        return Bands(edges, self.transition)

    @property
    def pairs(self) -> tuple[LatentPair, ...]:
        """The pairs of taps."""
        known = ("student", "teacher", "weight", "loss", "of")
        for pair in self.latents:
            for name in pair:
                check_choice("a field of sdkd.distill.latents", name, known)
        return tuple(LatentPair(**_with_index(pair)) for pair in self.latents)

    def predictor_arguments(
        self,
        edge_index: Int[Tensor, "2 edges"],
        edge_weight: Float[Tensor, " edges"] | None,
        n_nodes: int,
    ) -> dict[str, Any]:
        """What `DistillationPredictor` takes besides the teacher, the student and tsl's own.

        Args:
            edge_index: of the graph; source and target of each edge.
            edge_weight: not negative; None weighs every edge 1.
            n_nodes: nodes of the graph.

        Raises:
            ValueError: as `GraphTransform.from_edges`.

        Example:
            >>> import torch
            >>> ring = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])
            >>> arguments = DistillOptions().predictor_arguments(ring, None, 4)
            >>> arguments["transform"].domain_shape, arguments["bands"].edges
            ((4,), (0.25,))
        """
        transform = GraphTransform.from_edges(
            edge_index,
            edge_weight,
            n_nodes,
            normalization=self.normalization,
            symmetrization=self.symmetrization,
        )
        return {
            "transform": transform,
            "bands": self.bands,
            "weighting": make_weighting(self.weighting, self.bands.n_bands),
            "kd_weight": self.kd_weight,
            "aggregation": self.aggregation,
            "teacher_bound": self.teacher_bound,
            "latents": self.pairs,
            "check_finite": self.check_finite,
        }


def _with_index(pair: Mapping[str, Any]) -> dict[str, Any]:
    """A pair's fields, its teacher's number an int again."""
    return {
        name: int(each) if name == "of" and each is not None else each
        for name, each in pair.items()
    }


def _plain(value: Any) -> Any:
    """Python's lists and mappings for OmegaConf's, and floats for the 1 that YAML reads as int."""
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(each) for each in value]
    return float(value) if type(value) is int else value
