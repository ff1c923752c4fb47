"""Settings of the documentation: `make docs` builds it, and every block of code in it is run."""

import os
import re
import sys
from pathlib import Path
from typing import Any

import paramtree

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]
from tests.quick import FLAGS  # noqa: E402  # after its folder is known

# The programs that pages show side by side are imported by their cells.
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE / "_programs"), os.environ.get("PYTHONPATH", "")])
# A page runs in a process of its own; what it prints must not depend on the machine.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count=8 {FLAGS}")

project = "paramtree"
author = "the paramtree authors"
version = release = paramtree.__version__
copyright = "the paramtree authors, Apache-2.0"  # noqa: A001

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "_ext", "_programs", "**/.ipynb_checkpoints"]
nitpicky = False

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
# Every block is run in each build, and one that raises stops the build.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 180
nb_execution_in_temp = True
nb_merge_streams = True

# Programs are included in sections, with blank lines at both ends.
highlight_options = {"default": {"stripnl": True}, "python": {"stripnl": True}}

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Example", "Example"), "Fields"]

html_theme = "furo"
html_title = "paramtree"
html_static_path = ["_static"]
html_favicon = "_static/icon.svg"
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def _as_written(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Keeps a single asterisk, as in (out, in, *spatial), which reStructuredText takes for emphasis."""
    verbatim = r"(``.*?``|^[ ]*(?:>>>|\.\.\.).*?$)"
    parts = re.split(verbatim, "\n".join(lines), flags=re.DOTALL | re.MULTILINE)
    parts[::2] = [re.sub(r"(?<!\*)\*(?!\*)", r"\\*", part) for part in parts[::2]]
    lines[:] = "".join(parts).split("\n")


def setup(app: Any) -> None:
    """Registers what Sphinx calls."""
    app.connect("autodoc-process-docstring", _as_written, priority=900)
