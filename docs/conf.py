"""Configuration of the documentation site: Sphinx, Markdown by MyST, the theme Furo."""

from __future__ import annotations

import re

from sphinx.application import Sphinx

import openclaw_store

project = "openclaw_store"
author = "the authors of openclaw_store"
copyright = "2026, the authors of openclaw_store"
release = version = openclaw_store.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns: list[str] = []
html_theme = "furo"
html_title = f"openclaw_store {version}"
html_copy_source = False
html_show_sphinx = False

myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 4
"""Headings to this depth can be linked to, as `page.md#the-heading`."""

napoleon_numpy_docstring = False
napoleon_use_ivar = True
default_role = "code"  # docstrings write `name`, which is then set as code
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

nitpick_ignore_regex = [("py:.*", ".*")]
"""Annotations name types of Python and of SQLAlchemy, whose pages this build does not read."""


def link_files_outside(app: Sphinx, page: str, source: list[str]) -> None:
    """Offer Markdown files outside of this folder as downloads, since they are no pages here."""
    outside = re.escape("../" * (page.count("/") + 1))
    source[0] = re.sub(rf"\]\(({outside}[^)#]*\.md)(#[^)]*)?\)", r"](path:\1)", source[0])


def setup(app: Sphinx) -> None:
    """Register the handler above."""
    app.connect("source-read", link_files_outside)
