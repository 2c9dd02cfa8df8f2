"""Files are written as a whole, and read without running, expanding or trusting what is in them."""

import errno
import fcntl
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from sdkd_plugin._files import atomic_files, atomic_path, check_files, check_writable, locked
from sdkd_plugin._plain import load_plain, plain_text, read_yaml


def test_what_a_killed_writer_left_is_removed_and_a_living_one_is_not(tmp_path: Path):
    code = """
import os, sys
from sdkd_plugin._files import atomic_path
with atomic_path(sys.argv[1]) as path:
    path.write_text("half")
    print(flush=True)
    sys.stdin.read()
"""
    run = [sys.executable, "-c", code, str(tmp_path / "a.txt")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": {**os.environ}}
    writer = subprocess.Popen(run, **pipes)
    writer.stdout.readline()
    with atomic_path(tmp_path / "a.txt") as path:
        path.write_text("whole")
    assert len(list(tmp_path.iterdir())) == 2  # the other one is still writing
    writer.kill()
    writer.communicate()
    with atomic_path(tmp_path / "a.txt") as path:
        path.write_text("again")
    assert [each.name for each in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("moved", [0, 1, 2, 3])
def test_a_set_is_whole_wherever_its_writer_ended(tmp_path: Path, monkeypatch, moved: int):
    def write(text: str) -> None:
        with atomic_files(tmp_path, "set") as new:
            for name in ("a", "b"):
                (new / name).write_text(text)

    write("old")
    moves, replace = [], os.replace

    def killed(source: object, target: object) -> None:
        if len(moves) == moved:
            raise SystemExit
        moves.append(target)
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed)
        with pytest.raises(SystemExit):
            write("new")
    assert check_files(tmp_path, "set") == {"a", "b"}
    assert {(tmp_path / name).read_text() for name in "ab"} == {"new" if moved else "old"}
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a", "b", "set.sha256"]


def test_files_of_two_sets_are_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"set\.sha256 does not exist"):
        check_files(tmp_path, "set")
    for text in ("one", "two"):
        with atomic_files(tmp_path / text, "set") as new:
            (new / "a").write_text(text)
            (new / "b").write_text(text)
    os.replace(tmp_path / "one" / "a", tmp_path / "two" / "a")
    for folder in ("one", "two"):
        with pytest.raises(ValueError, match=r"set\.sha256 does not fit the files beside it"):
            check_files(tmp_path / folder, "set")
    listed = tmp_path / "two" / "set.sha256"
    for forged in (b"", b"0" * 64 + b"  ../one/b\n", b"\xff" * 80):
        listed.write_bytes(forged)
        with pytest.raises(ValueError, match="does not fit"):
            check_files(tmp_path / "two", "set")


def test_a_folder_that_cannot_be_written_is_named():
    for write in (check_writable, lambda path: atomic_path(path).__enter__()):
        with pytest.raises(OSError, match=r"it cannot be written .*free space.*/proc/none/a"):
            write("/proc/none/a")


def test_archives_that_are_not_torchs_are_refused(tmp_path: Path):
    path = tmp_path / "a.pt"
    torch.save({"a": torch.arange(4.0)}, path)
    assert torch.equal(load_plain(path)["a"], torch.arange(4.0))
    with zipfile.ZipFile(path) as small, zipfile.ZipFile(tmp_path / "b.pt", "w", 8) as bomb:
        for name in small.namelist():
            bomb.writestr(name, bytes(2**24) if name.endswith("data/0") else small.read(name))
    torch.save([torch.zeros(1).expand(2**40)], tmp_path / "c.pt")
    for name, said in (("b", "compressed"), ("c", r"shape \(1099511627776,\) that is expanded")):
        with pytest.raises(ValueError, match=rf"{name}\.pt cannot be read .*{said}"):
            load_plain(tmp_path / f"{name}.pt")
    with pytest.raises(FileNotFoundError, match="none"):
        load_plain(tmp_path / "none.pt")
    nested = [torch.ones(1)]
    nested.append(nested)
    torch.save(nested, path)
    assert len(load_plain(path)) == 2


def test_yaml_without_references(tmp_path: Path):
    path = tmp_path / "a.yaml"
    path.write_text("a: {b: [1, 2.5]}\n")
    assert read_yaml(path) == {"a": {"b": [1, 2.5]}}
    bomb = "a: &a [1, 1]\n" + "".join(
        f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abc", "bcd", strict=True)
    )
    for text, said in (
        (bomb, "anchor or alias"),
        ("a: [1", "cannot be read as YAML"),
        ("[a, b]", "it holds a list, expected names and values"),
        ("a: 1\n" * 2**20, "over 4194304 bytes"),
        ("!!python/object/apply:os.getcwd []", "it has the tag"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"a\.yaml cannot be read .*{said}|{said}"):
            read_yaml(path)
    with pytest.raises(FileNotFoundError, match="none"):
        read_yaml(tmp_path / "none.yaml")


@pytest.mark.parametrize("wait", [True, False])
def test_a_file_system_without_locks_is_written_to(tmp_path: Path, monkeypatch, wait: bool):
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path, wait=wait) as held:
        assert held is wait
    with atomic_path(tmp_path / "a.txt") as path:
        path.write_text("a")
    assert (tmp_path / "a.txt").read_text() == "a"


def test_a_number_with_an_exponent_is_a_number_and_text_like_one_is_text(tmp_path: Path):
    path = tmp_path / "a.yaml"
    path.write_text("a: [1e-3, -2.E+4, 1.5e0, 3e]\n")
    assert read_yaml(path) == {"a": [0.001, -20000.0, 1.5, "3e"]}
    values = {"text": ["1e5", "12E3", "7"], "numbers": [1e-5, 1e300, 7]}
    path.write_text(plain_text(values))
    assert read_yaml(path) == values
