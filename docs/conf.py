"""How Sphinx builds the site: `make site`. What it does beyond Sphinx is in scripts/site_pages.py."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

# the notebook runs this tree's `ebc-lab`, with this Python
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])

from site_pages import linkcode_resolve  # noqa: E402, F401 (Sphinx looks for it here)

import ebc_lab  # noqa: E402

project = "EBC Lab"
author = "EBC Lab"
copyright = "EBC Lab, MIT licence"
release = version = ebc_lab.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.linkcode",
    "sphinx_copybutton",
    "site_pages",
]

# -- pages: Markdown as the repository shows it --------------------------------------------------------------

myst_heading_anchors = 4  # the names of headings are those that links in the repository use
highlight_language = "none"  # of a block that names no language: a command, or what it prints

# -- the notebook: executed at every build, nothing of it is kept --------------------------------------------

nb_execution_mode = "force"
nb_execution_in_temp = True
if os.environ.get("NOTEBOOK") == "off":  # for a quick look at the rest
    nb_execution_mode = "off"
    suppress_warnings = ["myst-nb.lexer"]
nb_execution_timeout = 300  # seconds a cell
nb_execution_show_tb = True  # of a cell that fails, which is a warning: `make site` takes them for errors

# -- the API: docstrings are plain English, with single backticks around code --------------------------------

default_role = "py:obj"  # a link where it names something of ours, else only code
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False  # torch.nn.Module.forward would speak of itself
maximum_signature_line_length = 80
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries_show_parents = "hide"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
INTERNAL = (  # types that show in the signature of something public
    r"ebc\.(flat|parallel|probe|controller|budgets|given)\.[\w.]+",
    r"ebc\.(step\.(Forecast|Arithmetic)|proposal\.StateCopy)",
    r"ebm\.energy\.Splats",
    r"(integrations\.transformers\.Reporting|lowbit\.linear\.Model)",
    r"verity\.grids\.Grid",
    r"judging\.record\.\w+",
    r"(study|records)\..*",
)
nitpick_ignore_regex = [
    ("py:obj", ".*"),  # code in a docstring need not be the name of something
    ("py:.*", r"(?!ebc_lab\b).*"),  # types of torch and others; their documentation is not on this machine
    ("py:class", rf"ebc_lab\.({'|'.join(INTERNAL)})"),
]

# -- how it looks, all of it from this folder: no font, script or picture comes from the network -------------

html_theme = "furo"
html_title = "EBC Lab"
html_copy_source = False
html_show_sphinx = False
html_static_path = ["static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]

# -- `make site-links` asks the network about these alone ----------------------------------------------------

linkcheck_ignore = [r"^(?!https?:)"]
