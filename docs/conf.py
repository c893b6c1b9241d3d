"""Settings of Sphinx. ``make docs`` builds the pages; warnings are errors."""

import shutil
import sys
from importlib.metadata import version as version_of
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

import api_pages  # noqa: E402 - a script beside this file

project = "sadsl"
author = "the authors of sadsl"
copyright = "the authors of sadsl"
release = version = version_of("sadsl")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]

# Notebooks lie beside the sources, where `make notebooks` runs them. Here they are
# copies, with the outputs that were committed.
shutil.rmtree(HERE / "notebooks", ignore_errors=True)
shutil.copytree(
    ROOT / "notebooks",
    HERE / "notebooks",
    ignore=shutil.ignore_patterns(".ipynb_checkpoints", "out"),
)
nb_execution_mode = "off"
nb_merge_streams = True
api_pages.write(HERE / "api")

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "undoc-members": False}
# Annotations stand in the signatures, as they are written.
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
maximum_signature_line_length = 72
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

# References in the text must resolve. Annotations name classes of jax and flax, whose
# pages a build without a network cannot look up.
nitpicky = True
nitpick_ignore_regex = [("py:(class|data|obj|exc)", ".*")]

html_theme = "sphinx_book_theme"
html_title = "sadsl"
html_static_path = ["_static"]
html_css_files = ["sadsl.css"]
html_theme_options = {
    "show_toc_level": 2,
    "home_page_in_toc": False,
    "use_download_button": False,
    "use_fullscreen_button": False,
    # The sidebar has the search field already.
    "navbar_persistent": [],
    "navbar_end": [],
}
html_copy_source = False
html_show_sourcelink = False
