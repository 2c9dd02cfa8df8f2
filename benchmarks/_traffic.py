"""A week of traffic, split and scaled once for all forecasters; training and scoring them.

Here live the windows, the labels' share, training by Lightning and tsl's masked metrics. Which
forecasters are compared, and in which runs, is the benchmark's own.
"""

import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from sdkd_plugin import Bands, GraphTransform
from sdkd_plugin.adapters.tsl import load_traffic, number_windows, spatiotemporal_dataset

# After the adapter, which makes tsl importable where its compiled extensions are absent.
import pytorch_lightning as pl  # isort: skip
from pytorch_lightning.loggers.logger import DummyLogger  # isort: skip
from tsl.data import SpatioTemporalDataModule  # isort: skip
from tsl.data.datamodule.splitters import FixedIndicesSplitter, TemporalSplitter  # isort: skip
from tsl.data.preprocessing import StandardScaler  # isort: skip
from tsl.engines import Predictor  # isort: skip
from tsl.metrics.torch import MaskedMAE, MaskedMAPE, MaskedMSE  # isort: skip

WINDOW = HORIZON = 12
AT = {"15": 2, "30": 5, "60": 11}
BATCH_SIZE = 32
FIT: dict[str, Any] = {"metrics": {"mae": MaskedMAE()}, "scale_target": True}


class BestWeights(pl.Callback):
    """Keeps the weights with the least validation error, in memory."""

    def __init__(self) -> None:
        self.error = math.inf
        self.weights: dict[str, Tensor] = {}

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Compare after each validation."""
        error = float(trainer.callback_metrics["val_mae"])
        if error < self.error:
            self.error = error
            state = cast(nn.Module, module.model).state_dict()
            self.weights = {name: value.detach().clone() for name, value in state.items()}


class LinearForecaster(nn.Module):
    """One linear map from a sensor's window and the time of day to its forecast."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(WINDOW + 2, HORIZON)

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        """Forecast, added to the last reading: ``(batch, horizon, nodes, 1)``."""
        readings = (x - x[:, -1:]).squeeze(-1).transpose(1, 2)
        day = u[:, -1:].expand(-1, x.shape[2], -1)
        change = self.map(torch.cat([readings, day], dim=-1))
        return x[:, -1:] + change.transpose(1, 2)[..., None]


class TrafficWeek:
    """The windows of a data set: 70, 10 and 20 % of them in time, scaled by the first part.

    Args:
        folder: with traffic files, as `load_traffic` takes it.
        **csv: what it must be told of another csv pair than Los-loop.
    """

    def __init__(self, folder: str | Path, **csv: Any) -> None:
        self.data = load_traffic(folder, **csv)
        self.bands = Bands.split(0.25)
        # tsl takes the validation share of what the test leaves: 10 % of all.
        self.split = TemporalSplitter(val_len=0.125, test_len=0.2)
        self.scaler = StandardScaler(axis=(0, 1))
        module = SpatioTemporalDataModule(
            spatiotemporal_dataset(self.data, window=WINDOW, horizon=HORIZON),
            scalers={"target": self.scaler},
            splitter=self.split,
            batch_size=BATCH_SIZE,
        )
        module.setup()
        self.module = module
        self.dataset = module.torch_dataset
        batches = list(module.test_dataloader())
        self.truth = torch.cat([batch.y for batch in batches])
        self.mask = torch.cat([batch.mask for batch in batches])

    def transform(self) -> GraphTransform:
        """The graph's frequencies; each distiller moves one of its own."""
        data = self.data
        return GraphTransform.from_edges(data.edge_index, data.edge_weight, len(data.node_ids))

    def target_steps(self, windows: Any) -> np.ndarray:
        """Time steps of the targets of some windows, ``(windows, horizon)``."""
        return np.asarray(self.dataset.get_horizon_indices(windows))

    def lesson(self, share: float, *, only_labelled: bool) -> SpatioTemporalDataModule:
        """Training windows with labels for the first ``share`` of the training period.

        Readings without labels still are inputs. With ``only_labelled`` the windows that have no
        label at all are left out.
        """
        targets = self.target_steps(self.split.train_idxs)
        last = targets[round(share * len(targets)) - 1, -1]
        labelled = torch.ones_like(self.data.mask)
        labelled[last + 1 : self.target_steps(self.split.val_idxs)[0, 0]] = False
        dataset = spatiotemporal_dataset(
            self.data, window=WINDOW, horizon=HORIZON, labelled=labelled
        )
        number_windows(dataset)
        dataset.add_scaler("target", self.scaler)
        training = np.asarray(self.split.train_idxs)
        if only_labelled:
            training = training[targets[:, 0] <= last]
        module = SpatioTemporalDataModule(
            dataset,
            splitter=FixedIndicesSplitter(
                training.tolist(), self.split.val_idxs, self.split.test_idxs
            ),
            batch_size=BATCH_SIZE,
        )
        module.setup()
        return module

    def train(
        self, predictor: Predictor, lesson: SpatioTemporalDataModule, steps: int, seed: int
    ) -> float:
        """Train with Lightning, keep the weights with the least validation MAE, and say that."""
        best = BestWeights()
        trainer = pl.Trainer(
            max_steps=steps,
            max_epochs=math.ceil(steps / len(lesson.train_dataloader())),
            val_check_interval=max(1, steps // 15),
            check_val_every_n_epoch=None,
            accelerator="cpu",
            logger=DummyLogger(),
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            num_sanity_val_steps=0,
            gradient_clip_val=5.0,
            callbacks=[best],
        )
        torch.manual_seed(seed)
        trainer.fit(predictor, datamodule=lesson)
        predictor.model.load_state_dict(best.weights)
        predictor.eval()
        return best.error

    @torch.no_grad()
    def forecast(self, model: nn.Module) -> Tensor:
        """The forecast of all test windows, in miles an hour."""
        predictor = Predictor(model=model).eval()
        return torch.cat([predictor.predict_batch(b) for b in self.module.test_dataloader()])

    def persistence(self) -> Tensor:
        """Every step of the forecast is the last reading."""
        first = torch.from_numpy(self.target_steps(self.split.test_idxs)[:, 0])
        return self.data.filled()[first - 1][:, None, :, None].expand(-1, HORIZON, -1, -1)

    def historical_average(self) -> Tensor:
        """The sensor's mean at that time of the day over the training period."""
        end = int(self.target_steps(self.split.train_idxs).max()) + 1
        clock = np.asarray(self.data.index.hour * 60 + self.data.index.minute)
        seen = pd.DataFrame(self.data.speed.where(self.data.mask, torch.nan)[:end].numpy())
        means = seen.groupby(clock[:end]).mean().reindex(np.unique(clock))
        table = means.fillna(seen.mean()).fillna(seen.stack().mean())
        steps = self.target_steps(self.split.test_idxs)
        values = torch.from_numpy(table.loc[clock[steps.ravel()]].to_numpy())
        return values.float().reshape(*steps.shape, -1, 1)

    def scores(self, forecast: Tensor) -> dict[str, float]:
        """Masked errors on the test windows, in miles an hour and percent."""
        scores: dict[str, float] = {}
        for minutes, at in {"average": None, **AT}.items():
            for name, metric in {"mae": MaskedMAE, "mse": MaskedMSE, "mape": MaskedMAPE}.items():
                made = metric(at=at)
                made.update(forecast, self.truth, self.mask)
                scores[f"{name}_{minutes}"] = float(made.compute())
            scores[f"rmse_{minutes}"] = math.sqrt(scores.pop(f"mse_{minutes}"))
            scores[f"mape_{minutes}"] *= 100
        return scores
