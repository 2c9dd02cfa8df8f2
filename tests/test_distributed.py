"""Several processes: one that is stopped is named by the others, and does not hang them."""

import os
import signal
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from fault_parts import ended, forked

from sdkd_plugin import AdaptiveWeighting, distributed


def test_a_stopped_process_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(distributed, "PATIENCE", timedelta(seconds=3))

    def work(rank: int) -> None:
        rendezvous = f"file://{tmp_path}/rendezvous"
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
        weighting = AdaptiveWeighting(2)
        distributed.average_measurements(weighting)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        try:
            distributed.average_measurements(weighting)
        except RuntimeError as error:
            (tmp_path / "said").write_text(str(error))

    waits, stopped = (forked(lambda rank=rank: work(rank)) for rank in range(2))
    assert ended(waits) == 0
    os.kill(stopped, signal.SIGKILL)
    assert ended(stopped) == -signal.SIGKILL
    assert "Rank 1 failed to pass monitoredBarrier in 3000 ms" in (tmp_path / "said").read_text()
