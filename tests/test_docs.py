"""The code of the README and of every page of the documentation runs, and what they name exists."""

import ast
import re
import shlex
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from sdkd_plugin.adapters import tsl as _tsl  # noqa: F401 - before a page imports tsl
from sdkd_plugin.cli import main

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import results  # noqa: E402

PAGES = {path.name: path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXTS[name], flags=re.DOTALL | re.MULTILINE)


def with_blocks(language: str) -> list[str]:
    return [name for name in TEXTS if blocks(name, language)]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Pages write files, and what they compute is not taken from the user's cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SDKD_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("page", with_blocks("python"))
# The host's remark about a loss that needs no labels, and Lightning's about few workers.
@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers:UserWarning")
def test_the_blocks_of_a_page_run_in_order(page):
    namespace: dict[str, object] = {"__name__": page}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), namespace)  # noqa: S102


def test_no_page_is_without_what_is_checked():
    assert {"README.md", "start.md", "own_loop.md", "data.md", "frequency.md", "study.md"} < set(
        with_blocks("python")
    )
    for name, text in TEXTS.items():
        assert set(re.findall(r"^```(\S*)\n(?!\Z)", text, flags=re.MULTILINE)) <= {
            "", "python", "bash", "console", "{toctree}",
        }, name  # fmt: skip


@pytest.mark.parametrize("page", with_blocks("console"))
def test_sdkd_commands_run(page):
    for line in "".join(blocks(page, "console")).splitlines():
        program, *arguments = shlex.split(line)
        assert program == "sdkd"
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 0, (line, done.output, done.exception)


@pytest.mark.parametrize("page", TEXTS)
def test_commands_files_and_names_exist(page):
    text = TEXTS[page]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([\w-]+)", text, flags=re.MULTILINE)) <= targets
    for command, rest in re.findall(r"(?:`|^)sdkd ([a-z]+)([^`\n]*)", text, flags=re.MULTILINE):
        assert command in main.commands
        options = {option for each in main.commands[command].params for option in each.opts}
        assert set(re.findall(r"--[\w-]+", rest)) <= options | {"--help"}
    for name in re.findall(r"(?:benchmarks|examples|docs)/[\w/]+\.(?:py|csv|md|svg)", text):
        made = re.fullmatch(r"benchmarks/(\w+)\.md", name)
        found = list(results.RESULTS.glob(f"{made[1]}.*")) if made and page != "README.md" else []
        assert found or (ROOT / name).exists(), name


def test_the_readme_is_short_and_its_loop_is_shown_whole():
    assert len(TEXTS["README.md"].splitlines()) <= 130
    (loop,) = blocks("README.md", "python")
    assert 10 <= len([line for line in loop.splitlines() if line]) <= 18


def test_the_reference_has_every_public_package():
    named = "".join(path.read_text() for path in (ROOT / "docs/reference").glob("*.md"))
    packages = ROOT / "sdkd_plugin"
    for init in packages.rglob("__init__.py"):
        package = ".".join(init.parent.relative_to(ROOT).parts)
        nodes = ast.parse(init.read_text()).body
        public = any(isinstance(n, ast.Assign) and n.targets[0].id == "__all__" for n in nodes)
        # The names of the cache are the front door's.
        if public and package != "sdkd_plugin.cache":
            assert f".. automodule:: {package}\n" in named, package


# The pages of the benchmarks --------------------------------------------------------------------


def test_a_new_record_becomes_a_page_and_a_removed_one_leaves(tmp_path):
    records, pages = tmp_path / "results", tmp_path / "pages"
    records.mkdir()
    pages.mkdir()
    (pages / "old.md").write_text("# old")
    (records / "new.md").write_text("# New\n\nText.\n\n| a | b |\n|---|--:|\n| 1 | 2 |\n")
    assert results.write_pages(pages, records) == ["new"]
    assert [path.name for path in pages.iterdir()] == ["new.md"]
    assert (pages / "new.md").read_text() == (
        "# new\n\nText.\n\n| a | b |\n| --- | --: |\n| 1 | 2 |\n"
    )


def test_wide_tables_are_cut_to_a_screen_and_say_so():
    names = [f"c{i}" for i in range(12)]
    table = f"| {' | '.join(names)} |\n|{'--:|' * 12}\n| {' | '.join('1' * 12)} |"
    lines = results.cut(f"Before.\n\n{table}\n\nAfter.").splitlines()
    assert [line.count("|") for line in lines if line.startswith("|")] == [9, 9, 9]
    assert "(Columns left out: c8, c9, c10, c11.)" in lines
    assert (lines[0], lines[-1]) == ("Before.", "After.")
    assert results.cut("| a |\n| --- |\n| 1 |") == "| a |\n| --- |\n| 1 |"


@pytest.mark.parametrize("stem", sorted({path.stem for path in results.RESULTS.glob("*.*")}))
def test_every_record_has_a_page_that_fits(stem):
    page = results.page(results.RESULTS / stem)
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert len(rows) > 2
    assert max(row.count("|") for row in rows) <= results.COLUMNS + 1
    assert "nan" not in page.replace("missing=nan", "")
