"""The wheel: what is in the checkout beside the code must be in it too."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("sdkd_plugin", "hydra_plugins")
PARTS = (*PACKAGES, "pyproject.toml", "README.md", "LICENSE")


@pytest.mark.slow
def test_all_files_of_the_packages_are_in_the_wheel(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for part in PARTS:  # a copy, because setuptools writes into the folder
        if (ROOT / part).is_dir():
            shutil.copytree(
                ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(ROOT / part, source / part)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir"]
    subprocess.run([*build, tmp_path, source], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        held = {name for name in opened.namelist() if name.split("/")[0] in PACKAGES}
        entry = next(name for name in opened.namelist() if name.endswith("entry_points.txt"))
        assert "sdkd = sdkd_plugin.cli:main" in opened.read(entry).decode()
    files = (path for part in PACKAGES for path in (source / part).rglob("*"))
    expected = {path.relative_to(source).as_posix() for path in files if path.is_file()}
    assert held == expected
    assert "sdkd_plugin/conf/cli/traffic.yaml" in held
