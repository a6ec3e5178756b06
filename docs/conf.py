"""What Sphinx needs to know: `make docs`."""

import numattn

project = "numattn"
author = "the numattn developers"
project_copyright = "the numattn developers"
version = release = numattn.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",  # a page for each public object, in docs/generated
    "numpydoc",
    "sphinx_design",  # cards
    # Runs the tutorial's code when the site is built, and puts in the pictures that it draws.
    "matplotlib.sphinxext.plot_directive",
]

# Docstrings name arguments and functions in single backticks.
default_role = "py:obj"
rst_prolog = ".. currentmodule:: numattn\n"
autodoc_preserve_defaults = True  # np.float32, not its repr
autodoc_typehints = "none"  # docstrings say it shorter
autodoc_member_order = "bysource"
autodoc_mock_imports = ["torch", "transformers"]  # which the site is built without
autosummary_generate_overwrite = True
templates_path = ["_templates"]
exclude_patterns = ["_templates"]
add_module_names = False
numpydoc_show_class_members = False  # _templates/class.rst lists them

plot_include_source = True
plot_html_show_source_link = False
plot_html_show_formats = False
plot_formats = [("png", 110)]
plot_rcparams = {"savefig.bbox": "tight"}
plot_apply_rcparams = True

html_theme = "furo"
html_title = f"numattn {release}"
html_copy_source = False
html_show_sourcelink = False
