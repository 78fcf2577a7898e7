"""Sphinx configuration of the documentation: `python -m sphinx -W -b html docs docs/_build/html`."""

import fairseq

project = "fairseq: quantization of Vision Transformers"
author = "the fairseq ViT quantization authors"
project_copyright = "2026, the fairseq ViT quantization authors"
version = release = fairseq.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
]
html_theme = "furo"
html_title = f"fairseq {release}"
html_static_path = ["static"]
html_css_files = ["tables.css"]
exclude_patterns = ["_build"]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
napoleon_google_docstring = True
napoleon_use_ivar = True
# The groups of ViTQuantizer's arguments.
napoleon_custom_sections = [
    ("Which layers", "params_style"),
    ("How weights are rounded", "params_style"),
    ("How activations are rounded", "params_style"),
    ("How it runs", "params_style"),
]
nitpicky = False
