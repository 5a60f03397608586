"""Tables for papers: the same cells as Markdown and as LaTeX, which needs booktabs and graphicx."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ebc_lab.config.schema import Config
from ebc_lab.records.files import write_atomic
from ebc_lab.study.stages.compare_arms import in_bits

from . import words
from .table import PAPER, Column, Table

MOST_CHARACTERS = 52  # beside a name, of a row that fits LaTeX’s article in its footnote size
WIDTHS = {  # of the columns that wrap
    "name": r"p{0.24\linewidth}",
    "label": r"p{0.17\linewidth}",
    "prose": r"p{0.34\linewidth}",
}


def source(config: Config, corpus: Mapping[str, Any], seeds: Sequence[int], looked: str = "") -> str:
    """Return where a study's tables come from. `corpus`: its title and warning; `looked`: that the seeds were
    changed after an answer."""
    shown = ", ".join(map(str, seeds))
    text = f"Study {config.study.name}: {corpus['title']}, {config.scale} scale, "
    text += f"seed{'s' * (len(seeds) > 1)} {shown}."
    text += f" Model: {words.model(config)}. Tokens: {words.tokens(config)}." if in_bits(config) else ""
    text += f" Note: {looked}." if looked else ""
    return f"{text} Corpus: {corpus['warning']}." if corpus["warning"] else text


def write(root: Path, study: str, files: Mapping[str, Sequence[Table]], about: str) -> None:
    """Write each stem's tables as .md and .tex, each with `about`, where it is from, below it."""
    for stem, found in files.items():
        made = [table.on(PAPER) for table in found]
        write_atomic(root / f"{stem}.md", markdown(made, about))
        write_atomic(root / f"{stem}.tex", latex(made, study, about))


def title_of(column: Column) -> str:
    return column.short or column.title


def markdown(made: Sequence[Table], about: str) -> str:
    """Return the tables one after the other, each with its title above, its caption and notes below."""
    parts = []
    for table in made:
        kinds = [column.kind for column in table.columns]
        head = [_plain(title_of(column)) for column in table.columns]
        rule = ["---:" if kind == "figure" else "---" for kind in kinds]
        body = [list(map(_markdown_cell, kinds, row)) for row in table.texts()]
        lines = [f"| {' | '.join(cells)} |" for cells in (head, rule, *body)]
        caption = _plain(f"{table.caption} {notes(table, about)}")
        parts.append(f"## {_plain(table.title)}\n\n" + "\n".join(lines) + f"\n\n{caption}\n")
    return "\n".join(parts)


def _markdown_cell(kind: str, text: str) -> str:
    """Return a cell; a name in code type, where only a table's own bar needs a backslash."""
    if kind != "name":
        return _plain(text)
    text = " ".join(text.split()).replace("|", r"\|")
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def _plain(text: str) -> str:
    """Return text without what Markdown reads as its own: `_` at the edge of a word, links, HTML."""
    marked = re.sub(r"([\\`*|~]|(?<!\w)_|_(?!\w)|\](?=[(\[:]))", r"\\\1", " ".join(text.split()))
    return marked.replace("&", "&amp;").replace("<", "&lt;") if "<" in marked else marked


def notes(table: Table, about: str) -> str:
    """Return what stands below a table: what its figures mean, and where they are from."""
    return f"{words.capital(table.note)}. {about}" if table.note else about


GREEK = {
    "β": "beta",
    "δ": "delta",
    "η": "eta",
    "κ": "kappa",
    "ρ": "rho",
    "σ": "sigma",
    "τ": "tau",
    "Δ": "Delta",
}
LATEX = str.maketrans(
    {
        **{c: f"\\{c}" for c in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        '"': "''",
        "`": r"\textasciigrave{}",
        "*": r"\(^{*}\)",
        "±": r"\(\pm\)",
        "−": r"\(-\)",
        "×": r"\(\times\)",
        "≤": r"\(\le\)",
        "≥": r"\(\ge\)",
        "∞": r"\(\infty\)",
        "√": r"\(\surd\)",
        "·": r"\(\cdot\)",
        "→": r"\(\to\)",
        "½": r"\(\tfrac12\)",
        "‖": r"\(\|\)",
        "²": r"\(^{2}\)",
        "–": "--",
        "—": "---",
        "…": r"\dots{}",
        **{c: rf"\(\{name}\)" for c, name in GREEK.items()},
    }
)


def escaped(text: str) -> str:
    """Return text in which no character means anything to LaTeX."""
    return " ".join(text.split()).translate(LATEX)


def latex(made: Sequence[Table], study: str, about: str) -> str:
    """Return one table environment for each table, under the label `tab:<study>-<its name>`. A table that is
    wider than the column of its paper is scaled down to it."""
    parts = ["% needs \\usepackage{booktabs,graphicx}\n"]
    for table in made:
        kinds = [column.kind for column in table.columns]
        rows = [" & ".join(map(_latex_cell, kinds, row)) + r" \tabularnewline" for row in table.texts()]
        # a bracket at its beginning would be an argument of the line break before it
        body = [f"{{}}{row}" if row.startswith("[") else row for row in rows]
        alignment = "".join(WIDTHS.get(kind, "r" if kind == "figure" else "l") for kind in kinds)
        size = "scriptsize" if _characters(table) > MOST_CHARACTERS else "footnotesize"
        lines = [
            r"\begin{table}",
            rf"\caption{{{escaped(table.caption)}}}\smallskip",
            rf"\label{{tab:{_label(study)}-{_label(table.name)}}}",
            rf"\centering\{size}\setlength{{\tabcolsep}}{{3pt}}",
            r"\sbox0{%",
            rf"\begin{{tabular}}{{@{{}}{alignment}@{{}}}}",
            r"\toprule",
            " & ".join(escaped(title_of(column)) for column in table.columns) + r" \tabularnewline",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}}%",
            r"\ifdim\wd0>\linewidth\resizebox{\linewidth}{!}{\usebox0}\else\usebox0\fi",
            rf"\par\smallskip\parbox{{\linewidth}}{{\scriptsize {escaped(notes(table, about))}}}",
            r"\end{table}",
        ]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _characters(table: Table) -> int:
    """Return how many characters a row takes in the columns that do not wrap."""
    texts = [[title_of(column) for column in table.columns], *table.texts()]
    widths = [max(map(len, cells)) for cells in zip(*texts, strict=True)]
    return sum(w for w, c in zip(widths, table.columns, strict=True) if c.kind not in WIDTHS)


def _label(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")


def _latex_cell(kind: str, text: str) -> str:
    if kind == "name":  # names break after an underscore
        return rf"\raggedright\texttt{{{escaped(text)}}}".replace(r"\_", r"\_\allowbreak{}")
    return rf"\raggedright {escaped(text)}" if kind in ("prose", "label") else escaped(text)
