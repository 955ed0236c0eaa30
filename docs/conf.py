"""Sphinx settings. `make docs` runs Sphinx on the whole checkout, so the links of the pages also work on GitHub."""

project = "atedm-kernels"
root_doc = "docs/index"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "bench/README.md"]
include_patterns += ["python/atedm/embedded/README.md"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

myst_heading_anchors = 3

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_use_ivar = True

html_theme = "furo"
html_title = project
