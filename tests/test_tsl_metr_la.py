"""tsl's METR-LA from a local file, and files that would run code when they are read."""

import os
import pickle
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

from sdkd_plugin.adapters.tsl import get_dataset, load_traffic

pytestmark = [
    # pandas 2, of what tsl asks it for.
    pytest.mark.filterwarnings("ignore:'T' is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The 'method' keyword in DataFrame.replace:FutureWarning"),
    # pandas, of columns that it pickles.
    pytest.mark.filterwarnings("ignore::pandas.errors.PerformanceWarning"),
]
STEPS = 30


def write_metr_la(folder: Path, change=lambda frame: frame, attribute: object = None) -> Path:
    """Three sensors, in the files that tsl keeps in its folder."""
    rng = np.random.default_rng(0)
    index = pd.date_range("2012-03-01", periods=STEPS, freq="5min")
    frame = pd.DataFrame(rng.uniform(20, 70, (STEPS, 3)), index, columns=["717", "773", "767"])
    frame.iloc[4:6, 1] = 0  # missing
    change(frame).to_hdf(folder / "metr_la.h5", key="df")
    if attribute is not None:
        with h5py.File(folder / "metr_la.h5", "a") as file:
            file["df"].attrs["note"] = attribute
    distance = np.array([[0, 1, np.inf], [2, 0, 1], [np.inf, 9, 0]], dtype=np.float32)
    np.save(folder / "metr_la_dist.npy", distance)
    (folder / "locations.csv").touch()
    return folder


class _Evil:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.folder),))


def test_metr_la_is_read_from_a_folder(tmp_path: Path):
    data = load_traffic(write_metr_la(tmp_path))
    assert data.node_ids == ("717", "773", "767")
    assert data.index[1] - data.index[0] == pd.Timedelta(minutes=5)
    written = pd.read_hdf(tmp_path / "metr_la.h5").to_numpy()
    assert torch.equal(data.mask, torch.from_numpy(written != 0))
    observed = data.mask.numpy()
    np.testing.assert_allclose(data.speed.numpy()[observed], written[observed], rtol=1e-6)
    # Near sensors are joined, in tsl's direction: a row of the distances is a target.
    assert {tuple(edge) for edge in data.edge_index.T.tolist()} == {(0, 1), (1, 0), (2, 1)}
    dataset = get_dataset("la", {"root": str(tmp_path)})
    assert np.array_equal(dataset.mask[..., 0].astype(bool), observed)


def test_steps_that_the_file_lacks_are_missing_readings(tmp_path: Path):
    data = load_traffic(write_metr_la(tmp_path, lambda frame: frame.drop(frame.index[[9, 10]])))
    assert len(data.index) == STEPS
    assert not data.mask[9:11].any()
    assert data.filled().isfinite().all()


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path, protocol: int):
    evil, ran = _Evil(tmp_path / "ran"), tmp_path / "ran"
    for name, options in {
        "df/block1_values": {"change": lambda frame: frame.assign(x=[evil] * STEPS)},
        "df/axis0": {"change": lambda frame: frame.set_axis(["a", 2, 3.5], axis=1)},
        "df, attribute note": {"attribute": np.bytes_(pickle.dumps(evil, protocol))},
    }.items():
        folder = write_metr_la(tmp_path, **options)
        for read in (load_traffic, lambda root: get_dataset("la", {"root": str(root)})):
            with pytest.raises(ValueError, match=f"Python objects in {name}, .* could run code"):
                read(folder)
    assert not ran.exists()
    # What is refused here does run where pandas reads it.
    pd.read_hdf(tmp_path / "metr_la.h5")
    assert ran.exists()


def test_a_damaged_file_is_named(tmp_path: Path):
    folder = write_metr_la(tmp_path)
    (folder / "metr_la.h5").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"la could not be .*metr_la.h5 cannot be read as HDF5"):
        load_traffic(folder)
