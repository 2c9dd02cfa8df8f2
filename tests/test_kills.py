"""What is left of everything that is written when its writer is killed at any moment.

Small numbers of kills run in the normal gate, the full ones with ``make test-all``; each test
prints its counts.
"""

import shutil
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from cache_parts import X, batches, content, loss_of
from click.testing import CliRunner
from fault_parts import WRITTEN, counted, ended, forked, killed, same, states_of
from neuralop_parts import run as train_grid
from safetensors.torch import load_file

from sdkd_plugin import DistillationLoss, TeacherCache, precompute
from sdkd_plugin._files import check_files
from sdkd_plugin.cli import main


@counted(3, 50)
def test_a_killed_build_ends_as_an_uninterrupted_one(tmp_path: Path, n: int):
    folder, log = tmp_path / "cache", tmp_path / "log"

    def slow():
        for batch in batches(size=1):
            time.sleep(0.002)
            yield batch

    def build() -> None:
        outputs = DistillationLoss.teacher_outputs

        def logged(self, x, **inputs):
            with log.open("ab") as file:
                file.write(b".")
            return outputs(self, x, **inputs)

        DistillationLoss.teacher_outputs = logged
        precompute(loss_of(), slow(), folder)

    start = time.monotonic()
    whole = content(precompute(loss_of(), slow(), tmp_path / "whole").folder)
    longest = 1.2 * (time.monotonic() - start)
    kills = finished = again = 0

    def finish() -> None:
        nonlocal finished, again
        TeacherCache(folder).verify()
        precompute(loss_of(), batches(size=1), folder)
        assert content(folder) == whole
        finished, again = finished + 1, again + log.stat().st_size - len(X)
        shutil.rmtree(folder)
        log.unlink()

    for was_killed in killed(build, n, longest):
        kills += was_killed
        if (folder / "manifest.json").exists():
            finish()
    assert ended(forked(build)) == 0
    finish()
    print(f"{kills} kills, {finished} finished builds, {again} chunks computed again")
    # A kill loses the chunk that is being computed, no finished one.
    assert kills == n
    assert again <= kills


QUICK = ["training.seeds=3", "training.steps=8", "training.validations=2", "training.batch_size=4"]


@counted(3, 20)
def test_a_killed_training_ends_as_an_uninterrupted_one(tmp_path: Path, monkeypatch, n: int):
    monkeypatch.chdir(tmp_path)
    options = ["n_sensors=6", "days=2", "freeways=[1,1]"]
    found = CliRunner().invoke(main, ["simulate", "traffic", "data", *options])
    data = found.output.splitlines()[-1].removeprefix("Use it by ").split()

    def distill(out: str, resume: bool = True) -> None:
        words = ["distill", "traffic", *data, *QUICK, "teacher=null", f"out={out}"]
        done = CliRunner().invoke(main, [*words, *["--resume"] * resume])
        assert done.exit_code == 0, done.output + done.stderr

    start = time.monotonic()
    distill("whole", resume=False)
    longest = time.monotonic() - start

    def weights(out: str) -> list:
        files = sorted(tmp_path.glob(f"{out}/models/*")) + sorted(
            tmp_path.glob(f"{out}/student/*.safetensors")
        )
        return [(file.name, load_file(file)) for file in files]

    kills = finished = 0
    for was_killed in killed(partial(distill, "run"), n, longest):
        kills += was_killed
        if not was_killed or kills == n:
            distill("run")
            for (name, mine), (expected, theirs) in zip(
                weights("run"), weights("whole"), strict=True
            ):
                assert name == expected
                assert same(mine, theirs)
            finished += 1
            shutil.rmtree("run")
    print(f"{kills} kills, {finished} finished runs")
    assert kills == n
    assert finished


@counted(3, 20)
def test_a_killed_training_of_neuraloperator_ends_as_an_uninterrupted_one(tmp_path: Path, n: int):
    folder, whole = tmp_path / "run", train_grid(6)

    def on(count: list | None = None) -> None:
        there = (folder / "training.sha256").exists() or (folder / ".training.new").exists()
        resume = {"resume_from_dir": folder} if there else {}
        made = train_grid(6, save_every=1, save_dir=folder, **resume)
        if count is not None:
            count.append(made)

    start = time.monotonic()
    on()
    longest = time.monotonic() - start
    shutil.rmtree(folder)
    kills = finished = 0
    last = list[object]()
    for was_killed in killed(on, n, longest):
        kills += was_killed
        with suppress(FileNotFoundError):
            check_files(folder, "training")
        try:
            on(last)
        except ValueError as error:  # killed after its last checkpoint
            if "has finished 6 epochs" not in str(error):
                raise
            shutil.rmtree(folder)
            continue
        for name, value in whole.student.named_parameters():
            assert torch.equal(value, last[-1].student.get_parameter(name))
        finished += 1
        shutil.rmtree(folder)
    print(f"{kills} kills, {finished} finished runs")
    assert kills == n
    assert finished


@counted(2, 15)
@pytest.mark.parametrize("name", ["model folder", "array", "cache", "training of neuraloperator"])
def test_a_killed_writer_leaves_the_old_or_the_new(tmp_path: Path, name: str, n: int):
    kept, folder = WRITTEN[name], tmp_path / "it"
    states = states_of(name, tmp_path)
    kept.write(folder, 0)

    def for_ever() -> None:
        for version in range(1, 10**9):
            kept.write(folder, version % len(states))

    for _ in killed(for_ever, n, 0.3):
        read = kept.read(folder)
        assert any(same(read, state) for state in states)
        kept.write(folder, 0)
        assert not list(folder.glob(".*.tmp"))
    print(f"{n} kills of writers of the {name}")
