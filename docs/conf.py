"""Sphinx: the pages of this folder, pictures and benchmark pages made by the build, docstrings."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import pictures  # noqa: E402 - found by the path above
import results  # noqa: E402 - likewise

from sdkd_plugin import __version__  # noqa: E402

project = html_title = "sdkd_plugin"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_show_sourcelink = False
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

# Docstrings: Google's sections; a name in single backticks is a link.
default_role = "any"
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_use_ivar = True

# `-n` refuses a name that is not in the reference. These are in no page of ours:
_INTERNAL = """
    AbstractParts cache_key check_batch EvolutionBlock LatentEvolution model_arguments
    Propagation models.registry sdkd_plugin.adapters sdkd_plugin.spectral.chebyshev
    sdkd_plugin.spectral.cosine sdkd_plugin.study.page
"""
_PYTHON = "functools.partial OSError RuntimeError ValueError"
_LIBRARIES = "DataProcessor LpLoss Trainer torch.fft torch.func"
_OPTIONS = "relative_l2 trust"
_ATTRIBUTES = "DistillationTerms.features TeacherCache.round_trip"  # in the text of their class
_NAMES = f"{_INTERNAL} {_PYTHON} {_LIBRARIES} {_OPTIONS} {_ATTRIBUTES}".split()
nitpick_ignore = [("any", name) for name in _NAMES]
nitpick_ignore_regex = [("py:class", r"(collections|matplotlib|pandas|torch|sdkd_plugin)\..*")]


def setup(app: object) -> None:
    """Draw the pictures and write the benchmarks' pages, before Sphinx looks for pages."""
    pictures.draw(HERE / "_pictures")
    results.write_pages(HERE / "benchmarks")
