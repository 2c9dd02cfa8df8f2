"""Several processes: one that is stopped, and one without labels, do not hang the others."""

import os
import signal
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fault_parts import ended, forked

from sdkd_plugin import AdaptiveWeighting, Bands, GridTransform, distributed
from sdkd_plugin.losses.trust import TeacherTrust


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


def test_teachers_are_judged_by_the_labels_of_all_processes(tmp_path: Path):
    y, grid, bands = torch.randn(4, 1, 8, 8), GridTransform((8, 8)), Bands.split(0.25)
    fields = {"student": y + 0.1, "teacher": 0.9 * y}
    alone = TeacherTrust(2)
    alone.add(fields, y, None, grid, bands)

    def work(rank: int) -> None:
        rendezvous = f"file://{tmp_path}/rendezvous"
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
        trust = TeacherTrust(2)
        seen = torch.full((4, 1, 1, 1), rank == 1)  # the first has no labels
        trust.add(fields, y, seen, grid, bands)
        assert trust.measured
        torch.save(trust.update().weights, tmp_path / str(rank))
        assert not trust.measured

    processes = [forked(lambda rank=rank: work(rank)) for rank in range(2)]
    assert [ended(process) for process in processes] == [0, 0]
    expected = alone.update().weights
    assert float(expected.max()) > 0
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / str(rank)), expected)
