"""One self-contained HTML file: text, tables and pictures, for screens, phones and paper."""

import base64
import html
import io
from collections.abc import Sequence
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


_TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; margin: 0 auto; max-width: 64rem;
  padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; border-top: 1px solid #d0d7de; padding-top: 1rem; }
p { max-width: 46rem; }
img { min-width: 34rem; max-width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #d0d7de; text-align: right;
  white-space: nowrap; }
th { vertical-align: bottom; white-space: normal; }
td:first-child, th:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
footer { color: #57606a; font-size: .85rem; margin-top: 2rem; }
@media print { .scroll { overflow: visible; } table { font-size: .5rem; } h2 { break-after: avoid; }
  th, td { padding: .2rem .3rem; } img { min-width: 0; max-height: 12cm; }
  section { break-inside: avoid; } body { max-width: none; font-size: 11pt; } }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for section in sections %}
<section>
<h2>{{ section.heading }}</h2>
{% if section.text %}<p>{{ section.text }}</p>{% endif %}
{{ section.content | render(section.text or section.heading) }}
</section>
{% endfor %}
<footer>Made by sdkd_plugin {{ version }}.</footer>
</body>
</html>
"""


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
    template = environment.from_string(_TEMPLATE)
    return template.render(title=title, sections=sections, version=__version__)


class _Html(str):
    """Text that is HTML already."""

    def __html__(self) -> str:
        return self


def _render(content: Figure | pd.DataFrame | None, description: str) -> _Html:
    if content is None:
        return _Html("")
    if isinstance(content, pd.DataFrame):
        table = content.to_html(index=False, border=0, na_rep="-", justify="right")
        return _Html(f'<div class="scroll">{table}</div>')
    buffer = io.BytesIO()
    # An image in a file of its own, because ids in several drawings of one page would clash.
    content.savefig(buffer, format="svg")
    data = base64.b64encode(buffer.getvalue()).decode()
    picture = f'<img alt="{html.escape(description)}" src="data:image/svg+xml;base64,{data}">'
    return _Html(f'<div class="scroll">{picture}</div>')
