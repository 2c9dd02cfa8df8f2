"""A page for each record in ``benchmarks/results``: new ones appear by themselves."""

import ast
import re
from pathlib import Path

import pandas as pd

from sdkd_plugin.report import format_table

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RESULTS = BENCHMARKS / "results"
COLUMNS, ROWS = 8, 40
"""What fits a screen."""
MACHINE = ["hardware", "device", "threads", "python", "torch", "sdkd_plugin"]
_KEPT_OUT = {*MACHINE, "date", "protocol", "source", "seed", "candidates", "seconds"}


def write_pages(folder: Path, results: Path = RESULTS) -> list[str]:
    """Write the pages into a folder, which then holds nothing else; the names of the records."""
    folder.mkdir(exist_ok=True)
    stems = sorted({path.stem for path in results.iterdir() if path.suffix in (".csv", ".md")})
    for old in folder.glob("*.md"):
        if old.stem not in stems:
            old.unlink()
    for stem in stems:
        path, text = folder / f"{stem}.md", page(results / stem)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
    return stems


def page(record: Path) -> str:
    """The page of a record, given by its path without suffix."""
    parts = [f"# {record.name.replace('_', ' ')}"]
    if script := _script(record.stem):
        name = script.relative_to(BENCHMARKS.parent).as_posix()
        parts += [f"Made by `{name}`:", _docstring(script)]
    table, rows, picture = (record.with_suffix(suffix) for suffix in (".md", ".csv", ".png"))
    if picture.exists():
        parts.append(f"![{record.name}]({_from_docs(picture)})")
    if table.exists():
        parts.append(_as_section(table.read_text(encoding="utf-8")))
    elif rows.exists():
        parts.append(_table_of(pd.read_csv(rows)))
    if rows.exists():
        measured = pd.read_csv(rows)
        where = [
            f"{c} {v}" for c in MACHINE if c in measured for v in measured[c].dropna().unique()
        ]
        parts.append(f"Measured on: {', '.join(where)}." if where else "")
        parts.append(f"All rows and columns: {{download}}`{rows.name} <{_from_docs(rows)}>`.")
    return "\n\n".join(part for part in parts if part) + "\n"


def cut(table: str, columns: int = COLUMNS) -> str:
    """Markdown whose tables have no more columns than fit a screen; it says what is left out."""
    lines: list[str] = []
    left_out: list[str] = []
    for line in [*table.splitlines(), ""]:
        if not line.startswith("|"):
            if left_out:
                lines += ["", f"(Columns left out: {', '.join(left_out)}.)"]
                left_out = []
            lines.append(line)
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not lines or not lines[-1].startswith("|"):
            left_out = cells[columns:]
        lines.append(f"| {' | '.join(cells[:columns])} |")
    return "\n".join(lines[:-1])


def _script(stem: str) -> Path | None:
    """The benchmark or example whose name begins the record's; the longest such."""
    scripts = [*BENCHMARKS.glob("[!_]*.py"), *(BENCHMARKS.parent / "examples").glob("*.py")]
    found = [path for path in scripts if stem.startswith(path.stem)]
    return max(found, key=lambda path: len(path.stem), default=None)


def _docstring(script: Path) -> str:
    text = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines())


def _as_section(text: str) -> str:
    """A record's own text without its title, headings below the page's."""
    text = re.sub(r"\A# .*\n+", "", text)
    return cut(text.strip())


def _table_of(rows: pd.DataFrame) -> str:
    """The columns that vary; means and deviations where several seeds make a row."""
    if "steps" in rows:  # 4000.0 is a count beside rows that have none
        rows["steps"] = rows["steps"].map(lambda n: "-" if pd.isna(n) else f"{n:.0f}")
    known = [str(c) for c in rows if c not in _KEPT_OUT]
    shown = [c for c in known if rows[c].nunique() > 1]
    numbers = {c: (c, ".3g") for c in shown if rows[c].dtype.kind in "if"}
    if "model" in shown and "seed" in rows and rows["seed"].nunique() > 1:
        index = [c for c in shown if c not in numbers]
        table = format_table(rows.fillna(dict.fromkeys(index, "-")), index=index, columns=numbers)
    else:
        texts = [[_cell(value) for value in row] for row in rows[shown].head(ROWS).to_numpy(object)]
        lines = [shown, ["--:" if c in numbers else "---" for c in shown], *texts]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        if len(rows) > ROWS:
            table += f"\n\n(The first {ROWS} of {len(rows)} rows.)"
    constant = [f"{c} {rows[c].iloc[0]}" for c in known if rows[c].nunique() == 1]
    return cut(table) + (f"\n\nEqual in all rows: {', '.join(constant)}." if constant else "")


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "-" if pd.isna(value) else f"{value:.4g}"
    return str(value).replace("|", "/")


def _from_docs(path: Path) -> str:
    return f"../../{path.relative_to(BENCHMARKS.parent).as_posix()}"
