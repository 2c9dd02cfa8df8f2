"""Navier-Stokes data from every source, through the host's loaders, normalisers and trainer."""

import h5py
import numpy as np
import pytest
import scipy.io
import torch
import torch.nn.functional as F
from torch import Tensor

from sdkd_plugin import DistillationLoss, GridTransform
from sdkd_plugin.adapters.neuralop import REGISTERED, TrainerLoss
from sdkd_plugin.adapters.neuralop.data import load_navier_stokes
from sdkd_plugin.data import navier_stokes

from neuralop import Trainer  # isort: skip
from neuralop.data.datasets.navier_stokes import NavierStokesDataset  # isort: skip

SIZES = {
    "n_train": 4,
    "n_tests": [2],
    "batch_size": 2,
    "test_batch_sizes": [2],
    "train_resolution": 8,
    "test_resolutions": [8],
}
FRAMES = {"frames_in": 3, "frames_out": 2}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def trajectories() -> Tensor:
    # Another deviation in every frame, and test samples unlike the training ones.
    fields = random(7, 6, 8, 8) * torch.arange(1, 7).reshape(-1, 1, 1)
    fields[5:] += 100
    return fields


def write_pairs(folder, resolution: int, n: int = 6, part: str = "train", seed: int = 0) -> None:
    """A file as neuraloperator's archive has it: one channel, whose axis is left out."""
    x, y = random(n, resolution, resolution, seed=seed), random(n, resolution, resolution, seed=9)
    torch.save({"x": x, "y": 3 * y + 1}, folder / f"nsforcing_{part}_{resolution}.pt")


@pytest.fixture
def folder(tmp_path):
    for part, seed in (("train", 0), ("test", 1)):
        write_pairs(tmp_path, 8, part=part, seed=seed)
    return tmp_path


def whole(loader) -> dict[str, Tensor]:
    """All samples, in the data set's order."""
    samples = [loader.dataset[i] for i in range(len(loader.dataset))]
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


@pytest.mark.parametrize("encoding", ["channel-wise", "pixel-wise"])
@pytest.mark.parametrize("encode", [(False, True), (True, False)])
def test_a_folder_gives_what_the_hosts_own_loader_gives(encoding, encode, tmp_path):
    # The host reads 128 and 1024 points alone.
    for part, seed in (("train", 0), ("test", 1)):
        write_pairs(tmp_path, 128, n=3, part=part, seed=seed)
    sizes = {**SIZES, "n_train": 2, "n_tests": [3], "test_batch_sizes": [1]}
    sizes |= {"train_resolution": 128, "test_resolutions": [128], "encoding": encoding}
    sizes |= {"encode_input": encode[0], "encode_output": encode[1]}
    train, tests, processor = load_navier_stokes(tmp_path, **sizes)
    host = NavierStokesDataset(tmp_path, download=False, **sizes)
    for ours, theirs in ((train.dataset, host.train_db), (tests[128].dataset, host.test_dbs[128])):
        assert torch.equal(ours.x, theirs.x)
        assert torch.equal(ours.y, theirs.y)
    for name in ("in_normalizer", "out_normalizer"):
        ours, theirs = getattr(processor, name), getattr(host.data_processor, name)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert torch.equal(ours.mean, theirs.mean)
            assert torch.equal(ours.std, theirs.std)
    assert [len(train), len(tests[128])] == [1, 3]


def test_files_and_tensors_of_the_same_trajectories_are_the_same_data(trajectories, tmp_path):
    last = trajectories.movedim(1, -1).numpy()
    scipy.io.savemat(tmp_path / "v5.mat", {"u": last})
    with h5py.File(tmp_path / "v73.mat", "w") as content:
        content["u"] = last.T  # MATLAB is column-major
    np.save(tmp_path / "u.npy", trajectories.numpy())
    torch.save(trajectories, tmp_path / "u.pt")
    for source in (*tmp_path.iterdir(), trajectories):
        train, tests, _ = load_navier_stokes(source, **SIZES, **FRAMES)
        assert torch.equal(whole(train)["x"], trajectories[:4, :3])
        assert torch.equal(whole(train)["y"], trajectories[:4, 3:5])
        assert torch.equal(whole(tests[8])["x"], trajectories[-2:, :3])
        assert torch.equal(whole(tests[8])["y"], trajectories[-2:, 3:5])


def test_statistics_are_of_the_training_part_alone(trajectories):
    options = {**SIZES, **FRAMES, "encode_input": True}
    train, _, processor = load_navier_stokes(trajectories, **options)
    processor.train()
    sample = processor.preprocess(whole(train))
    for field in sample.values():
        torch.testing.assert_close(field.mean((0, 2, 3)), torch.zeros(field.shape[1]))
        torch.testing.assert_close(field.std((0, 2, 3)), torch.ones(field.shape[1]))
    spoiled = torch.cat([trajectories[:4], trajectories[4:] * 1e3])
    _, _, same = load_navier_stokes(spoiled, **options)
    assert torch.equal(same.in_normalizer.mean, processor.in_normalizer.mean)
    assert torch.equal(same.out_normalizer.std, processor.out_normalizer.std)


def test_sizes_may_be_numpys(trajectories, as_shipped):
    sizes = {name: np.array(value)[()] for name, value in {**SIZES, **FRAMES}.items()}
    train, tests, _ = load_navier_stokes(trajectories, **sizes)
    assert next(iter(train))["x"].shape == next(iter(tests[8]))["x"].shape == (2, 3, 8, 8)


def test_a_coarser_resolution_is_every_nth_point(trajectories, folder):
    sizes = {**SIZES, "n_tests": [2, 1, 2], "test_batch_sizes": [2, 1, 2]}
    sizes |= {"train_resolution": 4, "test_resolutions": [2, 8, 4]}
    train, tests, _ = load_navier_stokes(trajectories, **sizes, **FRAMES)
    assert torch.equal(whole(train)["x"], trajectories[:4, :3, ::2, ::2])
    assert torch.equal(whole(tests[2])["y"], trajectories[-2:, 3:5, ::4, ::4])
    assert torch.equal(whole(tests[8])["x"], trajectories[-1:, :3])
    write_pairs(folder, 4, part="test", seed=5)
    train, tests, _ = load_navier_stokes(folder, **sizes)
    assert torch.equal(whole(train)["x"], random(6, 8, 8)[:4, None, ::2, ::2])
    assert torch.equal(whole(tests[8])["x"], random(6, 8, 8, seed=1)[:1, None])
    # From the file of four points, not from that of eight.
    assert torch.equal(whole(tests[2])["x"], random(6, 4, 4, seed=5)[:2, None, ::2, ::2])


def test_the_seed_orders_the_training_samples(trajectories):
    def epochs(seed: int) -> list[list[float]]:
        train, _, _ = load_navier_stokes(trajectories, **SIZES, **FRAMES, seed=seed)
        return [[float(x) for batch in train for x in batch["x"][:, 0, 0, 0]] for _ in range(3)]

    first, again, other = epochs(0), epochs(0), epochs(1)
    assert first == again != other
    assert first[0] != first[1]
    assert sorted(first[0]) == sorted(other[2])


def test_the_solvers_fields_train_and_are_evaluated_at_two_resolutions():
    fields = navier_stokes(
        12, resolution=16, solver_resolution=32, duration=4.0, cache=False, progress=False
    )
    sizes = {"n_train": 8, "n_tests": [4, 4], "batch_size": 4, "test_batch_sizes": [4, 4]}
    sizes |= {"train_resolution": 16, "test_resolutions": [8, 16], "encode_input": True}
    train, tests, processor = load_navier_stokes(fields, frames_in=2, frames_out=2, **sizes)
    torch.manual_seed(0)
    teacher, student = (
        REGISTERED["sdkd_unet"](in_channels=2, out_channels=2, width=w, depth=1) for w in (8, 4)
    )
    loss = DistillationLoss(teacher, GridTransform((16, 16)))
    optimizer = torch.optim.Adam(student.parameters(), 1e-2)

    def in_physical_units(out: Tensor, y: Tensor, **sample: object) -> Tensor:
        assert torch.equal(y, tests[y.shape[-1]].dataset.y)
        return F.mse_loss(out, y) * len(y)

    metrics = Trainer(model=student, n_epochs=2, data_processor=processor).train(
        train,
        tests,
        optimizer,
        torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
        training_loss=TrainerLoss(loss, student),
        eval_losses={"mse": in_physical_units},
    )
    scale = fields.square().mean()
    assert {"8_mse", "16_mse"} <= set(metrics)
    assert all(0 < float(metrics[name]) < 10 * scale for name in ("8_mse", "16_mse"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_train": 0}, r"`n_train` is 0, expected an integer of at least 1"),
        ({"n_tests": 2}, r"are 2, \[2\], \[8\], expected an entry for every test resolution"),
        ({"test_resolutions": 8}, r"are \[2\], \[2\], 8, expected an entry for every test res"),
        ({"n_tests": [2, 2]}, r"are \[2, 2\], \[2\], \[8\], expected an entry for every"),
        ({"test_batch_sizes": [0]}, r"`test_batch_sizes` is 0, expected an integer of at least 1"),
        ({"encoding": "pixelwise"}, r"`encoding` is 'pixelwise'.*Did you mean 'pixel-wise'"),
        ({"n_train": 6}, r"has 7 trajectories of 6 frames, expected 8 or more \(`n_train` and"),
        ({"frames_in": 5}, r"of 6 frames, expected 6 or more .* of 7 or more \(`frames_in` and"),
        ({"train_resolution": 3}, r"the resolution is 3, expected a divisor of 8"),
        ({"seed": -1}, r"`seed` is -1, expected an integer of at least 0"),
        (
            {"n_tests": [2, 2], "test_batch_sizes": [2, 2], "test_resolutions": [8, 8]},
            r"`test_resolutions` is \[8, 8\], expected each of them once",
        ),
        (
            {"encoding": "pixel-wise", "test_resolutions": [4]},
            r"`encoding` is 'pixel-wise', .*`test_resolutions` \[4\]: take 'channel-wise'",
        ),
        ({"encoding": "pixel-wise", "n_train": 1}, r"two training samples .*`n_train` is 1"),
    ],
)
def test_what_does_not_fit_is_said(change, message, trajectories, as_shipped):
    with pytest.raises(ValueError, match=message):
        load_navier_stokes(trajectories, **{**SIZES, **FRAMES, **change})


def test_fields_that_cannot_be_used_are_refused(trajectories, tmp_path, as_shipped):
    with pytest.raises(ValueError, match=r"`source` has shape \(6, 8, 8\), expected \(samples, ti"):
        load_navier_stokes(trajectories[0], **SIZES, **FRAMES)
    with pytest.raises(ValueError, match=r"`source` has shape \(7, 6, 8, 6\), expected"):
        load_navier_stokes(trajectories[..., :6], **SIZES, **FRAMES)
    with pytest.raises(ValueError, match=r"none\.mat is no file"):
        load_navier_stokes(tmp_path / "none.mat", **SIZES, **FRAMES)
    trajectories[0, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"`source` has 1 of 2688 values that are NaN or Inf"):
        load_navier_stokes(trajectories, **SIZES, **FRAMES)


def test_files_of_another_layout_are_named(folder):
    file = folder / "nsforcing_train_8.pt"
    with pytest.raises(ValueError, match=r"_test_8.pt holds .*, expected .* \(7 or more, 8, 8\)"):
        load_navier_stokes(folder, **{**SIZES, "n_tests": [7]})
    with pytest.raises(
        ValueError, match=r"\['nsforcing_train_8.pt'\], expected nsforcing_train_16"
    ):
        load_navier_stokes(folder, **{**SIZES, "train_resolution": 16})
    x = random(6, 8, 8)
    for content, message in [
        ([x, x], r"holds a list with .*, expected a dict with 'x' and 'y' of shape"),
        ({"x": x, "z": x}, r"holds a dict with tensors of shape \{'x': \(6, 8, 8\)\}, expected a"),
        ({"x": x[0, 0, 0], "y": x}, r"\{'x': \(\), 'y': \(6, 8, 8\)\}, expected a dict"),
        ({"x": x, "y": x[1:]}, r"'y': \(5, 8, 8\)\}, expected a dict"),
        ({"x": x[..., :4], "y": x[..., :4]}, r"'y': \(6, 8, 4\)\}, expected a dict"),
        ({"x": x, "y": x.log()}, r"`y of .*_8.pt` has \d+ of 256 values that are NaN"),
    ]:
        torch.save(content, file)
        with pytest.raises(ValueError, match=message):
            load_navier_stokes(folder, **SIZES)


def test_damaged_files_are_named(folder):
    file = folder / "nsforcing_train_8.pt"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"nsforcing_train_8.pt cannot be read"):
        load_navier_stokes(folder, **SIZES)
