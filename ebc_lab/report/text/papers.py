"""The tables of a study as Markdown and LaTeX, for papers: what was found, with its uncertainty, in words a caption needs.

`finals`, `suite` and `verdict` say what stands in them; `markdown` and `latex` write the same cells twice. The LaTeX needs
booktabs and nothing else.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ebc_lab.config.schema import Config
from ebc_lab.records.files import write_atomic
from ebc_lab.study.stages.compare_arms import seeds_of

Results = Mapping[str, Mapping[str, Any]]
NAMES = {"baseline": "the baseline", "control": "the fair control"}
DASH = "–"
WIDE = 6  # columns that fit a page of LaTeX's article in a larger type
SPARED = (">diverged", ">joint", "judged")  # columns that a table goes without where they say nothing


@dataclass(frozen=True)
class About:
    """What every caption says of the study."""

    study: str
    corpus: str
    warning: str | None
    scale: str
    seeds: Sequence[int]
    margin: float  # nats per token

    def __str__(self) -> str:
        seeds = ", ".join(map(str, self.seeds))
        told = f"Study {self.study}: {self.corpus}, {self.scale} scale, seed{'s' * (len(self.seeds) > 1)} {seeds}."
        return f"{told} Corpus: {self.warning}." if self.warning else told


@dataclass(frozen=True)
class Sheet:
    """One table. Of a column's name, a leading ` means names as they stand, > figures to the right, ~ words that wrap."""

    name: str  # of the label that a paper refers to
    title: str
    caption: Sequence[str]  # sentences
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


# -- what stands in them ---------------------------------------------------------------------------------------------------


def finals(about: About, decision: Mapping[str, Any], results: Results) -> list[Sheet]:
    """The arms of the finals, and their differences from the baseline and from the fair control."""
    sheets = []
    for track, found in decision["tracks"].items():
        sheets.append(_arms(about, "finals", track, found["arms"], results))
        for role, name in NAMES.items():
            reference = found["roles"][role]
            rows = [_difference_row(arm, d) for arm, d in found["differences"][role].items()]
            title = f"Test loss against {name}, {reference}"
            sheets.append(
                _differences(about, f"{track}-{role}", title, found["differences"][role].values(), rows)
            )
    return sheets


def suite(about: About, decision: Mapping[str, Any], results: Results) -> list[Sheet]:
    """A suite's arms, and the difference of each from the arm it is compared with."""
    sheets = []
    for track, found in decision["tracks"].items():
        sheets.append(_arms(about, "suite", track, found["arms"], results))
        compared = {label: arm for label, arm in found["arms"].items() if arm["difference"]}
        rows = []
        for label, arm in compared.items():
            elsewhere = "" if arm["versus"] == found["reference"] else f" (against {arm['versus']})"
            rows.append(_difference_row(label + elsewhere, arm["difference"]))
        title = f"Test loss of {track}'s arms against {found['reference']}"
        sheets.append(
            _differences(
                about, f"{track}-differences", title, [a["difference"] for a in compared.values()], rows
            )
        )
    return sheets


def verdict(about: About, acceptance: Mapping[str, Any]) -> list[Sheet]:
    """The lines of the verdict."""
    many = len({line["track"] for line in acceptance["lines"]}) > 1
    columns = (*(("`track",) if many else ()), "~question", "verdict", "~figure")
    rows = [tuple(line[c.lstrip("`~")] for c in columns) for line in acceptance["lines"]]
    counts = ", ".join(f"{n} {v}" for v, n in acceptance["counts"].items())
    caption = [f"{counts}.", "Judged on the test split, which no decision has looked at.", str(about)]
    return [Sheet("verdict", "Verdict", caption, columns, rows)]


def _arms(
    about: About, kind: str, track: str, arms: Mapping[str, Mapping[str, Any]], results: Results
) -> Sheet:
    rows = []
    for name, arm in arms.items():
        own = [results.get(run_id, {}) for run_id in arm["runs"].values()]
        done = [r for r in own if r.get("outcome") == "completed"]
        diverged = sum(r.get("outcome") == "diverged" for r in own)
        lost = f"{diverged} of {len(own)} diverged" if diverged else None

        def over(key: str, form: str, done: Sequence[Mapping[str, Any]] = done) -> str:
            values = [float(r[key]) for r in done if r.get(key) is not None]
            return format(statistics.fmean(values), form) if values else DASH

        rows.append(
            (
                name,
                f"{len(done)} of {len(own)}" if len(done) < len(own) else str(len(own)),
                lost or _with_spread(done, "val_loss"),
                lost or _with_spread(done, "test_loss"),
                over("c_median", ".2f") if arm["ebc"] else DASH,
                over("kl_ratio_median", ".2f") if arm["ebc"] else DASH,
                over("tokens_per_s", ".0f"),
            )
        )
    steps = {
        r["steps"]
        for arm in arms.values()
        for i in arm["runs"].values()
        if (r := results.get(i, {})).get("steps")
    }
    caption = [
        f"After {max(steps, default=0)} steps: seeds completed; mean cross-entropy on the whole split, in nats per token, "
        "± the standard deviation over seeds; median clip coefficient c; applied KL over its target δ*; training tokens per "
        "second (the last three: means over completed seeds).",
        "An arm of which a run diverged has no mean: a mean over the survivors would flatter it.",
        str(about),
    ]
    columns = ("`arm", ">seeds", ">val. loss", ">test loss", ">c", ">KL/δ*", ">tokens/s")
    return Sheet(f"{track}-arms", f"Arms of the {kind}, {track}", caption, columns, rows)


def _with_spread(done: Sequence[Mapping[str, Any]], key: str) -> str:
    values = [float(r[key]) for r in done if r.get(key) is not None]
    if not values:
        return DASH
    return f"{statistics.fmean(values):.4f}" + (
        f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    )


def _difference_row(arm: str, d: Mapping[str, Any]) -> tuple[str, ...]:
    ranked = d.get("method") == "rank"
    centre, mark = (d.get("median"), "median ") if d.get("mean") is None else (d["mean"], "")
    lost, detectable = d.get("diverged"), d.get("joint_detectable", d.get("detectable"))
    return (
        arm,
        str(d["seeds"]),
        f"{lost['arm']} / {lost['reference']}" if lost else "",
        DASH if centre is None else f"{mark}{_signed(centre)}",
        _interval(d, "low", "high", ranked),
        _interval(d, "joint_low", "joint_high", ranked),
        DASH if detectable is None else f"{detectable:.3f}",
        d.get("judged") or DASH,
    )


def _interval(d: Mapping[str, Any], low: str, high: str, ranked: bool) -> str:
    """A limit that is absent is infinite by rank, and not known by t."""
    if low not in d or (d[low] is None and d[high] is None and not ranked):
        return DASH
    left = "(−∞" if d[low] is None else f"[{_signed(d[low])}"
    return f"{left}, {'∞)' if d[high] is None else f'{_signed(d[high])}]'}"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _differences(
    about: About, name: str, title: str, found: Collection[Mapping[str, Any]], rows: Sequence[Sequence[str]]
) -> Sheet:
    columns = (
        "`arm",
        ">seeds",
        ">diverged",
        ">difference",
        ">95% interval",
        ">joint",
        ">detectable",
        "judged",
    )
    shown = [
        i
        for i, column in enumerate(columns)
        if column not in SPARED or any(row[i] not in ("", DASH) for row in rows)
    ]
    kept = [[row[i] for i in shown] for row in (columns, *rows)]
    family = max((d.get("comparisons") or 0 for d in found), default=0)
    looks = max((d.get("looks") or 1 for d in found), default=1)
    margin = f"+{about.margin:g}"
    explained = {
        ">diverged": "diverged: runs of the arm / of the reference; the median and its interval are then by rank.",
        ">joint": f"Joint: intervals that hold, at 95%, for all {family} comparisons together (Bonferroni); by them an arm is "
        "judged, and what is detectable is theirs.",
        "judged": f"beats: the upper limit is below 0; meets: at most {margin}; misses: the lower limit is above {margin}.",
    }
    caption = [
        "Arm minus reference in nats per token, paired by seed, negative where the arm is better: mean, 95% t-interval by "
        "itself, and the smallest difference that so many seeds would have shown with power 80%.",
        *(words for column, words in explained.items() if column in kept[0]),
        *([f"Every interval is corrected for {looks} looks at the results."] if looks > 1 else []),
        *([] if ">joint" in kept[0] else [f"Nothing corrects for the {len(rows)} comparisons."]),
        str(about),
    ]
    return Sheet(name, title, caption, kept[0], kept[1:])


# -- how they are written --------------------------------------------------------------------------------------------------


def markdown(sheets: Sequence[Sheet]) -> str:
    """The tables one after the other, each with its title above and its caption below."""
    parts = []
    for sheet in sheets:
        kinds = [column[0] for column in sheet.columns]
        head = [column.lstrip("`>~") for column in sheet.columns]
        rule = ["---:" if kind == ">" else "---" for kind in kinds]
        body = [
            [_as_it_stands(c) if k == "`" else _plain(c) for k, c in zip(kinds, row, strict=True)]
            for row in sheet.rows
        ]
        lines = [f"| {' | '.join(cells)} |" for cells in ([_plain(h) for h in head], rule, *body)]
        parts.append(
            f"## {_plain(sheet.title)}\n\n" + "\n".join(lines) + f"\n\n{_plain(' '.join(sheet.caption))}\n"
        )
    return "\n".join(parts)


def _plain(text: str) -> str:
    """Text in which no character means anything to Markdown: also no `_` at the edge of a word, no bracket of a link."""
    return re.sub(r"([\\`*|<~]|(?<!\w)_|_(?!\w)|\](?=[(\[:]))", r"\\\1", " ".join(text.split()))


def _as_it_stands(name: str) -> str:
    """A name in code type; a table's own bar is the one character that needs a backslash there."""
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
    """Text in which no character means anything to LaTeX."""
    return " ".join(text.split()).translate(LATEX)


def latex(sheets: Sequence[Sheet], study: str) -> str:
    """One table environment a sheet, under the label `tab:<study>-<its name>`."""
    parts = ["% needs \\usepackage{booktabs}\n"]
    label = re.sub(r"[^A-Za-z0-9]+", "-", study).strip("-")
    for sheet in sheets:
        kinds = [column[0] for column in sheet.columns]
        body = [" & ".join(map(_latex_cell, kinds, row)) + r" \tabularnewline" for row in sheet.rows]
        name = re.sub(r"[^A-Za-z0-9]+", "-", sheet.name).strip("-")
        lines = [
            r"\begin{table}",
            rf"\centering\{'scriptsize' if len(sheet.columns) > WIDE else 'footnotesize'}\setlength{{\tabcolsep}}{{2pt}}",
            rf"\caption{{{escaped(sheet.title)}. {' '.join(map(escaped, sheet.caption))}}}",
            rf"\label{{tab:{label}-{name}}}",
            rf"\begin{{tabular}}{{@{{}}{''.join(map(_alignment, kinds))}@{{}}}}",
            r"\toprule",
            " & ".join(escaped(c.lstrip("`>~")) for c in sheet.columns) + r" \tabularnewline",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _alignment(kind: str) -> str:
    return {"`": r"p{0.22\linewidth}", ">": "r", "~": r"p{0.34\linewidth}"}.get(kind, "l")


def _latex_cell(kind: str, text: str) -> str:
    if kind == "`":  # names break after an underscore
        return rf"\raggedright\texttt{{{escaped(text)}}}".replace(r"\_", r"\_\allowbreak{}")
    return rf"\raggedright {escaped(text)}" if kind == "~" else escaped(text)


def write(
    root: Path,
    config: Config,
    corpus: Mapping[str, Any],
    decisions: Mapping[str, Any],
    acceptance: Mapping[str, Any] | None,
    result_of: Callable[[str], Mapping[str, Any] | None],
) -> None:
    """summary_final, acceptance and ablation as .md and .tex, each where the study has it.

    `corpus`: its title and warning, under `corpus` and `warning`.
    """
    made: dict[str, list[Sheet]] = {}
    about = About(
        config.study.name,
        corpus["corpus"],
        corpus["warning"],
        config.scale,
        config.seeds,
        config.finals.margin,
    )
    for stage, name, sheets in (("finals", "summary_final", finals), ("ablation", "ablation", suite)):
        if stage in decisions:
            about = replace(about, seeds=seeds_of(decisions[stage]))
            arms = [arm for track in decisions[stage]["tracks"].values() for arm in track["arms"].values()]
            results = {run_id: result_of(run_id) or {} for arm in arms for run_id in arm["runs"].values()}
            made[name] = sheets(about, decisions[stage], results)
    if acceptance:
        made["acceptance"] = verdict(about, acceptance)
    for name, tables in made.items():
        write_atomic(root / f"{name}.md", markdown(tables))
        write_atomic(root / f"{name}.tex", latex(tables, about.study))
