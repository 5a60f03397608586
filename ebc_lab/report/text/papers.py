"""The tables of a study as Markdown and LaTeX, for papers: what was found, with its uncertainty, and a
caption.

`finals`, `suite` and `verdict` choose and caption the tables; `markdown` and `latex` write the same cells
twice. The LaTeX needs booktabs and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ebc_lab.config.schema import Config
from ebc_lab.records.decisions import Acceptance, Decision, Difference, FinalsTrack, SuiteTrack
from ebc_lab.records.figures import RunResult
from ebc_lab.records.files import write_atomic
from ebc_lab.study.stages.compare_arms import in_bits, seeds_of
from ebc_lab.study.stages.stage import decision_that_shows

from . import glance, tables, words
from .table import PAPER, Column, Table
from .tables import Results
from .words import FAMILIES, capital, optimizer

WIDE = 6  # columns that fit a page of LaTeX's article in a larger type


@dataclass(frozen=True)
class About:
    """What every caption says of the study."""

    study: str
    corpus: str
    warning: str | None
    scale: str
    seeds: Sequence[int]
    margin: float  # nats per token
    model: str = ""  # a sentence on what is trained, where it is no GPT on characters
    looked: str = ""  # that the seeds were changed after an answer

    def __str__(self) -> str:
        seeds = ", ".join(map(str, self.seeds))
        source = f"Study {self.study}: {self.corpus}, {self.scale} scale"
        text = f"{source}, seed{'s' * (len(self.seeds) > 1)} {seeds}."
        text += f" {self.model}" if self.model else ""
        text += f" Note: {self.looked}." if self.looked else ""
        return f"{text} Corpus: {self.warning}." if self.warning else text


# -- which tables, and what is said below them ---------------------------------------------------------------


def finals(about: About, decision: Decision, results: Results) -> list[Table]:
    """Return the arms of the finals, and their differences from each of their references."""
    made = []
    for track, compared in decision["tracks"].items():
        made += _arms(about, "finals", track, compared, results)
        for family, pairs in compared["differences"].items():
            title = f"Test loss against {FAMILIES[family]}"
            title += f", {compared['roles'][family]}" if family in compared["roles"] else ""
            made.append(_differences(about, f"{track}-{family}", title, pairs, compared, family))
    return made


def suite(
    about: About,
    decision: Decision,
    results: Results,
    tune: Decision | None = None,
    grids: glance.Grids = MappingProxyType({}),
) -> list[Table]:
    """Return a suite's arms, and the difference of each from the arm it is compared with; of arms that it
    asks about first whether they are better, and what was tried of each. `tune`, `grids`: what `glance.tried`
    tells."""
    made = []
    for track, compared in decision["tracks"].items():
        made += _better(about, track, compared, tune, grids)
        made += _arms(about, "suite", track, compared, results)
        title = f"{optimizer(track)}: test loss of the arms against {compared['reference']}"
        pairs = tables.suite_pairs(compared, compared["arms"])
        made.append(_differences(about, f"{track}-differences", title, pairs, compared))
        spans = tables.spans(compared, f"{track}-{{}}".format)
        made += [replace(t.on(PAPER), caption=[f"{t.note}.", str(about)]) for t in spans]
    return made


def verdict(about: About, acceptance: Acceptance) -> list[Table]:
    """Return the lines of the verdict."""
    counts = ", ".join(f"{n} {v}" for v, n in acceptance["counts"].items())
    caption = [f"{counts}.", "Judged on the test split, which no decision has looked at.", str(about)]
    return [replace(tables.verdict(acceptance["lines"]).on(PAPER), caption=caption)]


def _better(
    about: About, track: str, compared: SuiteTrack, tune: Decision | None, grids: glance.Grids
) -> list[Table]:
    """Tell whether the arms that a suite asks about are better, each with its answer; and what was tried."""
    made = []
    tuned = words.tuned_arms(tune, track)
    for i, label in enumerate(words.asked(compared), 1):
        table = glance.is_better(f"{track}-better-{i}", label, compared, tuned).on(PAPER)
        sentence = f"{compared['answers'][label]['sentence']}."
        made.append(replace(table, caption=[sentence, f"{capital(table.note)}.", str(about)]))
    if made and tune and (tried := glance.tried(f"{track}-tried", tune, track, compared["arms"], grids)):
        made.append(replace(tried.on(PAPER), caption=[f"{capital(tried.note)}.", str(about)]))
    return made


def _arms(
    about: About, kind: str, track: str, compared: FinalsTrack | SuiteTrack, results: Results
) -> list[Table]:
    """Return the arms, what few levels took where any has them, what the splats of energy-based models know,
    and what is kept beside the weights where arms differ in that."""
    usual = [arm for arm in compared["arms"].values() if not arm.get("shape")]
    ids = [run_id for arm in usual for run_id in arm["runs"].values()]
    steps = max((results.get(run_id, RunResult()).get("steps") or 0 for run_id in ids), default=0)
    otherwise = "" if len(usual) == len(compared["arms"]) else ", or as many times that as an arm says"
    with_bits = any(tables.bits_of(arm) is not None for arm in compared["arms"].values())
    made = tables.arms(f"{track}-arms", compared, results).on(PAPER)
    shown = {title_of(column) for column in made.columns}
    means = {"c": "median clip coefficient c", "KL/δ*": "applied KL over its target δ*"}
    means |= {"tokens/s": "training tokens per second"}
    known = "".join(f"; {meaning}" for column, meaning in means.items() if column in shown)
    bits = "; bits per character on the test split" if with_bits else ""
    caption = [
        f"After {steps} steps{otherwise}: seeds completed; mean cross-entropy on the whole split, in nats "
        f"per token, ± the standard deviation over seeds{bits}{known}; all are means over completed seeds.",
        "An arm of which a run diverged has no mean: a mean over the survivors would flatter it.",
        str(about),
    ]
    arms = replace(made, title=f"Arms of the {kind}, {optimizer(track)}", caption=caption)
    further = [
        tables.low_bit(f"{track}-low-bit", compared, results),
        tables.states(f"{track}-states", compared, results),
        tables.beside_weights(f"{track}-memory", compared, results),
    ]
    every = [arms]
    for table in filter(None, further):
        title = f"{table.title} in the arms of the {kind}, {optimizer(track)}"
        every.append(replace(table.on(PAPER), title=title, caption=[f"{capital(table.note)}.", str(about)]))
    return every


def _differences(
    about: About,
    name: str,
    title: str,
    pairs: Mapping[str, Difference],
    compared: FinalsTrack | SuiteTrack,
    family: str = "",
) -> Table:
    made = tables.differences(name, title, pairs, compared, family=family).on(PAPER)
    shown = {column.short for column in made.columns}
    together = max((d.get("comparisons") or 0 for d in pairs.values()), default=0)
    looks = max((d.get("looks") or 1 for d in pairs.values()), default=1)
    margin = f"+{about.margin:g}"
    explained = {
        "diverged": "diverged: runs of the arm / of the reference; the median and its interval are then by "
        "rank.",
        "joint": f"Joint: intervals that hold, at 95%, for all {together} comparisons together (Bonferroni); "
        "by them an arm is judged, and what is detectable is theirs.",
        "judged": f"beats: the upper limit is below 0; meets: at most {margin}; "
        f"misses: the lower limit is above {margin}.",
    }
    caption = [
        "Arm minus reference in nats per token, paired by seed, negative where the arm is better: mean, 95% "
        "t-interval by itself, and the smallest difference that so many seeds would have shown with power "
        "80%.",
        *(meaning for column, meaning in explained.items() if column in shown),
        *(
            [f"The error of every interval is divided by {looks}, for looks at the results."]
            if looks > 1
            else []
        ),
        *([] if "joint" in shown else [f"Nothing corrects for the {len(pairs)} comparisons."]),
        str(about),
    ]
    return replace(made, caption=caption)


# -- how they are written ------------------------------------------------------------------------------------


def title_of(column: Column) -> str:
    return column.short or column.title


def markdown(made: Sequence[Table]) -> str:
    """Return the tables one after the other, each with its title above and its caption below."""
    parts = []
    for table in made:
        kinds = [column.kind for column in table.columns]
        head = [_plain(title_of(column)) for column in table.columns]
        rule = ["---:" if kind == "figure" else "---" for kind in kinds]
        body = [list(map(_markdown_cell, kinds, row)) for row in table.texts()]
        lines = [f"| {' | '.join(cells)} |" for cells in (head, rule, *body)]
        caption = _plain(" ".join(table.caption))
        parts.append(f"## {_plain(table.title)}\n\n" + "\n".join(lines) + f"\n\n{caption}\n")
    return "\n".join(parts)


def _markdown_cell(kind: str, text: str) -> str:
    return _code(text) if kind == "name" else _plain(text)


def _plain(text: str) -> str:
    """Return text without anything that Markdown reads as its own: no `_` at the edge of a word, no bracket
    of a link, and no HTML."""
    marked = re.sub(r"([\\`*|~]|(?<!\w)_|_(?!\w)|\](?=[(\[:]))", r"\\\1", " ".join(text.split()))
    return marked.replace("&", "&amp;").replace("<", "&lt;") if "<" in marked else marked


def _code(name: str) -> str:
    """Return a name in code type; a table's own bar is the one character that needs a backslash there."""
    text = " ".join(name.split()).replace("|", r"\|")
    return f"`` {text} ``" if "`" in text else f"`{text}`"


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


def latex(made: Sequence[Table], study: str) -> str:
    """Return one table environment for each table, under the label `tab:<study>-<its name>`."""
    parts = ["% needs \\usepackage{booktabs}\n"]
    for table in made:
        kinds = [column.kind for column in table.columns]
        rows = [" & ".join(map(_latex_cell, kinds, row)) + r" \tabularnewline" for row in table.texts()]
        # a bracket at its beginning would be an argument of the line break before it
        body = [f"{{}}{row}" if row.startswith("[") else row for row in rows]
        size = "scriptsize" if len(table.columns) > WIDE else "footnotesize"
        lines = [
            r"\begin{table}",
            rf"\centering\{size}\setlength{{\tabcolsep}}{{2pt}}",
            rf"\caption{{{escaped(table.title)}. {' '.join(map(escaped, table.caption))}}}",
            rf"\label{{tab:{_label(study)}-{_label(table.name)}}}",
            rf"\begin{{tabular}}{{@{{}}{''.join(map(_alignment, kinds))}@{{}}}}",
            r"\toprule",
            " & ".join(escaped(title_of(column)) for column in table.columns) + r" \tabularnewline",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _label(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")


def _alignment(kind: str) -> str:
    widths = {"name": r"p{0.22\linewidth}", "figure": "r", "prose": r"p{0.34\linewidth}"}
    return widths.get(kind, "l")


def _latex_cell(kind: str, text: str) -> str:
    if kind == "name":  # names break after an underscore
        return rf"\raggedright\texttt{{{escaped(text)}}}".replace(r"\_", r"\_\allowbreak{}")
    return rf"\raggedright {escaped(text)}" if kind == "prose" else escaped(text)


def write(
    root: Path,
    config: Config,
    corpus: Mapping[str, Any],
    decisions: Mapping[str, Decision],
    acceptance: Acceptance | None,
    result_of: Callable[[str], RunResult | None],
    looked: str = "",
) -> None:
    """summary_final, acceptance and ablation as .md and .tex, each where the study has it.

    `corpus`: its title and warning, under `corpus` and `warning`.
    """
    made: dict[str, list[Table]] = {}
    named = (config.study.name, corpus["corpus"], corpus["warning"], config.scale)
    model = f"Model: {words.model(config)}. Tokens: {words.tokens(config)}." if in_bits(config) else ""
    about = About(*named, config.seeds, config.finals.margin, model, looked)
    for shown, name in (("verdict", "summary_final"), ("arms", "ablation")):
        decision = decision_that_shows(shown, decisions)
        if decision is not None:
            about = replace(about, seeds=seeds_of(decision))
            arms = [arm for track in decision["tracks"].values() for arm in track["arms"].values()]
            results = {
                run_id: result_of(run_id) or RunResult() for arm in arms for run_id in arm["runs"].values()
            }
            grids = {label: arm.tune for label, arm in config.ablation.arms.items()}
            made[name] = (
                finals(about, decision, results)
                if shown == "verdict"
                else suite(about, decision, results, decisions.get("tune"), grids)
            )
    if acceptance:
        made["acceptance"] = verdict(about, acceptance)
    for name, tables_of in made.items():
        write_atomic(root / f"{name}.md", markdown(tables_of))
        write_atomic(root / f"{name}.tex", latex(tables_of, about.study))
