# SPDX-License-Identifier: Apache-2.0
"""The Sphinx configuration. To build the documentation, run ``make docs`` or
``sphinx-build -W --keep-going -b html docs docs/_build/html``. The build downloads nothing."""

import inspect
import os
import sys
import warnings
from importlib.resources import files
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("TQDM_MININTERVAL", "3600")  # the gallery shows only the first and last line of a progress bar
sys.path.insert(0, os.path.abspath(".."))
warnings.filterwarnings("ignore", message="FigureCanvasAgg is non-interactive")  # the examples call plt.show()
warnings.filterwarnings("ignore", message=r"\s*ArviZ is undergoing")

from sphinx.util import logging
from sphinx_gallery.sorting import ExplicitOrder

import pyro_realnvp
import pyro_realnvp.plots

logger = logging.getLogger(__name__)

project = "pyro_realnvp"
author = "The pyro_realnvp developers"
copyright = "The pyro_realnvp developers, Apache-2.0"
version = release = pyro_realnvp.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "myst_parser",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "gallery/*.ipynb", "gallery/*.json"]
nitpicky = False
add_module_names = False
toc_object_entries_show_parents = "hide"
maximum_signature_line_length = 88

# -- docstrings --------------------------------------------------------------------------------------------------------
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = ["Shapes"]

# -- pages -------------------------------------------------------------------------------------------------------------
myst_enable_extensions = ["dollarmath", "amsmath", "deflist"]
myst_heading_anchors = 3

# MathJax comes from a local file, so that the formulas are readable without a network. This file, unlike the others of
# MathJax, contains its fonts.
mathjax_file = files("sphinx-mathjax-offline") / "static" / "mathjax" / "tex-svg.js"
mathjax_path = "tex-svg.js"

gallery_order = [  # what a newcomer needs comes first
    "two_moons",
    "conditional",
    "tabular",
    "digits",
    "compose_with_pyro",
    "eight_schools",
    "overdispersion",
    "several_modes",
    "funnel",
    "hierarchical",
    "hidden_markov",
    "simulator",
    "vae",
    "distributed",
]

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"\.py$",
    "image_scrapers": ("matplotlib",),
    "abort_on_example_error": True,
    "show_memory": False,
    "show_signature": False,
    "write_computation_times": False,
    "download_all_examples": True,
    "within_subsection_order": ExplicitOrder([f"{name}.py" for name in gallery_order]),  # each example must be listed
    "thumbnail_size": (800, 300),
}

# -- HTML --------------------------------------------------------------------------------------------------------------
html_theme = "furo"  # follows the reader's light or dark setting, with a switch
html_title = f"pyro_realnvp {release}"
html_static_path = ["_static", str(mathjax_file)]
html_css_files = ["custom.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
pygments_style = "friendly"
pygments_dark_style = "monokai"


def check_that_every_public_name_is_documented(app, env):
    """Warns of every name that the package exports and no API page documents; -W turns the warning into an error."""
    documented = set(env.domains["py"].objects)
    for module in (pyro_realnvp, pyro_realnvp.masks, pyro_realnvp.plots):
        for name, value in vars(module).items():
            if name.startswith("_") or not (inspect.isclass(value) or inspect.isfunction(value)):
                continue
            home = value.__module__
            if not (home.startswith("pyro_realnvp.") if module is pyro_realnvp else home == module.__name__):
                continue  # the name is imported from elsewhere
            names = {f"{module.__name__}.{name}", f"pyro_realnvp.{name}"}
            if not names & documented:
                logger.warning("%s.%s is public, but no API page documents it", module.__name__, name)


def show_the_picture_first(app, page, source):
    """Puts the first picture that an example draws between its introduction and its code."""
    picture = Path(app.srcdir, "gallery", "images", f"sphx_glr_{Path(page).name}_001.png")
    if page.startswith("gallery/") and picture.exists():
        introduction, code = source[0].split("\n.. GENERATED FROM PYTHON SOURCE LINES", 1)
        image = f".. image:: images/{picture.name}\n    :alt: What the example draws\n    :class: gallery-picture"
        source[0] = f"{introduction}\n{image}\n\n.. GENERATED FROM PYTHON SOURCE LINES{code}"


def setup(app):
    app.connect("env-check-consistency", check_that_every_public_name_is_documented)
    app.connect("source-read", show_the_picture_first)
