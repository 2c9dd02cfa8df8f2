"""One self-contained HTML file: text, tables and pictures, for screens, phones and paper."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from jinja2 import Environment
from matplotlib.figure import Figure

from sdkd_plugin._version import __version__


class Section(NamedTuple):
    """A heading and what stands below it; a picture's text is also its description."""

    heading: str
    text: str = ""
    content: Figure | pd.DataFrame | None = None


_TEMPLATE = Path(__file__).with_name("page.html")


def html_page(title: str, sections: Sequence[Section]) -> str:
    """The page; it needs no network and runs no script. All text is escaped.

    Args:
        title: of the page.
        sections: in their order; a table has one row a line and strings or numbers in its cells,
            and scrolls sideways on a narrow screen.

    Example:
        >>> table = pd.DataFrame({"model": ["student"], "MSE": ["0.10 ± 0.01"]})
        >>> "0.10 ± 0.01" in html_page("A study", [Section("Table", "Means.", table)])
        True
    """
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["render"] = _render
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(title=title, sections=sections, version=__version__)


def _render(content: Figure | pd.DataFrame | None, description: str) -> str:
    """HTML with all text escaped."""
    if content is None:
        return ""
    if isinstance(content, pd.DataFrame):
        shown = content.to_html(index=False, border=0, na_rep="-", justify="right")
    else:
        # An image in a file of its own, because ids in several drawings of one page would clash.
        buffer = io.BytesIO()
        content.savefig(buffer, format="svg")
        data = base64.b64encode(buffer.getvalue()).decode()
        shown = f'<img alt="{html.escape(description)}" src="data:image/svg+xml;base64,{data}">'
    return f'<div class="scroll">{shown}</div>'
