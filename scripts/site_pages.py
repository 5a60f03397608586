"""What the site shows beyond Sphinx's own: pages of source files, and docstrings that are plain English.

The Markdown pages link to files of the repository, `../ebc_lab/ebc/clip.py`, which are no part of a site.
Each file or folder that a page or the API links to becomes a page, highlighted, with its lines numbered.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from jupyter_cache.executors import utils as executing
from pygments.lexers import find_lexer_class_for_filename
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms import SphinxTransform
from sphinx.util import logging

ROOT = Path(__file__).parent.parent
PAGES = "source/"
PACKAGES = (  # of these every name of `__all__` must be in the reference
    *("ebc_lab", "ebc_lab.results", "ebc_lab.ebc", "ebc_lab.lowbit", "ebc_lab.axiom", "ebc_lab.verity"),
    "ebc_lab.verity.ops",
)
ATTRIBUTES = ("attribute", "property")
MARKUP = re.compile(r"(^\s*\* )|[*|\\]|_(?!\w)", re.MULTILINE)  # and bullets, which are meant
MODULE_LEVEL = ("class", "data", "exception", "function")

_shown: set[str] = set()  # paths of files and folders that something links to
_attributes: dict[str, list[str]] = {}  # what is said of each
_log = logging.getLogger(__name__)


# -- source files --------------------------------------------------------------------------------------------


class Links(SphinxTransform):
    """Links of the Markdown pages as a reader of the site wants them.

    A link to a file of the repository that is no page leads to the page of its source. One whose text is the
    name of a page, [compare.md](compare.md), shows that page's title.
    """

    default_priority = 500

    def apply(self, **kwargs: Any) -> None:
        for kind in (addnodes.download_reference, addnodes.pending_xref):
            for link in [*self.document.findall(kind)]:
                if link.get("reftype") != "myst":
                    continue
                target = link["reftarget"]
                if link.get("refdomain") is None:
                    self._lead_to_source(link, Path(target.partition("#")[0]))
                elif target.startswith("/"):  # a Markdown file beside docs
                    self._lead_to_source(link, Path(f"{target}.md"))
                elif re.fullmatch(r"(docs/)?\w+\.md", link.astext()):
                    link["refexplicit"] = False
                    link[0].children.clear()

    def _lead_to_source(self, link: nodes.Element, target: Path) -> None:
        path = ((Path(self.env.srcdir) / self.env.docname).parent / target).resolve()
        if path.exists() and path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / "docs"):
            name = str(path.relative_to(ROOT))
            _shown.add(name)
            up = "../" * self.env.docname.count("/")
            link.replace_self(nodes.reference("", "", *link.children, refuri=f"{up}{PAGES}{name}.html"))


def linkcode_resolve(domain: str, info: dict[str, str]) -> str | None:
    """Return where the source of something in the reference is, seen from a page in `api/`."""
    module = importlib.import_module(info["module"])
    try:
        found: Any = module
        for name in info["fullname"].split("."):
            found = getattr(found, name)
        found = inspect.unwrap(getattr(found, "fget", found))
        path = Path(inspect.getsourcefile(found) or "").relative_to(ROOT)
        line = inspect.getsourcelines(found)[1]
    except (AttributeError, TypeError, ValueError, OSError):  # a value, or defined elsewhere
        return None
    _shown.add(str(path))
    return f"../{PAGES}{path}.html#L-{line}"


def source_pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield a page for each file or folder that is linked to."""
    for name in sorted(_shown):
        path = ROOT / name
        files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
        body = "".join(_highlighted(app, file, numbered=path.is_file()) for file in files)
        heading = f"<h1><code>{name.replace('/', '/<wbr>')}</code></h1>"
        yield PAGES + name, {"title": name, "body": f"{heading}\n{body}", "parents": []}, "page.html"


def _highlighted(app: Sphinx, file: Path, numbered: bool) -> str:
    lexer = find_lexer_class_for_filename(file.name)
    options: dict[str, Any] = {"linenos": "inline", "lineanchors": "L", "anchorlinenos": True}
    html = app.builder.highlighter.highlight_block(  # type: ignore[attr-defined]
        file.read_text(),
        lexer.aliases[0] if lexer else "none",
        **(options if numbered else {}),
    )
    return html if numbered else f"<h2>{file.name}</h2>\n{html}"


# -- docstrings ----------------------------------------------------------------------------------------------


def as_rst(app: Sphinx, what: str, name: str, found: Any, options: Any, lines: list[str]) -> None:
    """Turn plain English into reStructuredText: code stays code, and nothing else is markup."""
    blocks = re.split(r"\n\n+", "\n".join(lines).strip("\n"))
    written = [f"::\n\n{block}" if block.startswith("    ") else _escaped(block) for block in blocks]
    lines[:] = [*"\n\n".join(written).split("\n"), ""]
    if what in ATTRIBUTES:  # kept from napoleon, which takes what comes before a colon for a type
        _attributes[name] = [*lines]
        lines.clear()


def after_napoleon(app: Sphinx, what: str, name: str, found: Any, options: Any, lines: list[str]) -> None:
    if what in ATTRIBUTES:
        lines[:] = _attributes.pop(name)


def _escaped(block: str) -> str:
    """A block whose backticks are code, and whose stars, bars and trailing underscores are no markup."""
    parts = re.split(r"(`[^`]+`)", block)
    parts[::2] = [re.sub(MARKUP, lambda m: m[1] or "\\" + m[0], part) for part in parts[::2]]
    # a name may become a link; of all else the default role would take a dot or a bracket for its own
    parts[1::2] = [part if re.fullmatch(r"`[\w][\w.]*`", part) else f"`{part}`" for part in parts[1::2]]
    for i in range(1, len(parts), 2):  # markup must stand apart: an escaped space, which is not shown
        parts[i - 1] += "\\ " if re.search(r"[^\s\-:/'\"<(\[{]$", parts[i - 1]) else ""
        parts[i + 1] = re.sub(r"^(?=\w)", r"\\ ", parts[i + 1])
    return "".join(parts)


# -- what the reference shows --------------------------------------------------------------------------------


def public() -> dict[str, Any]:
    """Every public name of `PACKAGES`, with its package, -> what it names."""
    packages = [importlib.import_module(package) for package in PACKAGES]
    return {f"{p.__name__}.{name}": getattr(p, name) for p in packages for name in p.__all__}


def all_is_documented(app: Sphinx, env: BuildEnvironment) -> None:
    """Warn of a public name that the reference leaves out."""
    shown = env.get_domain("py").objects.items()  # type: ignore[attr-defined]
    there = {name.rpartition(".")[2] for name, entry in shown if entry.objtype in MODULE_LEVEL}
    for name, value in public().items():
        if name.rpartition(".")[2] not in there and not inspect.ismodule(value):
            _log.warning("%s is public and not in the reference (docs/api)", name)


def setup(app: Sphinx) -> dict[str, Any]:
    # a command prints line by line, its cell shows one output; `nb_merge_streams` would break its lines
    executing.executenb = functools.partial(executing.executenb, coalesce_streams=True)
    app.add_transform(Links)
    app.connect("autodoc-process-docstring", as_rst, priority=100)  # before napoleon reads sections
    app.connect("autodoc-process-docstring", after_napoleon, priority=900)
    app.connect("env-check-consistency", all_is_documented)
    app.connect("html-collect-pages", source_pages)
    return {"parallel_read_safe": False}
