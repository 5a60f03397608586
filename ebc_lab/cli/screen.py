"""What a person sees on the terminal: the live view, decisions, the verdict, status, plan and doctor, drawn with rich."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ebc_lab.bench.packing import describe as packing_in_words
from ebc_lab.config.errors import clock
from ebc_lab.records.paths import RUNS
from ebc_lab.study.inspect.why import headline, noise_in_words

VERDICT_STYLE = {"pass": "green", "fail": "red", "undecided": "yellow"}
STATE_STYLE = {
    "running": "cyan",
    "finished": "green",
    "finished_with_failures": "yellow",
    "interrupted": "yellow",
    "stale": "yellow",
}
OUTCOME_ORDER = ("completed", "diverged", "failed", "oom", "lost", "cancelled", "open")


def plain_table(*columns: str, title: str | None = None) -> Table:
    """A plain table; `>` right-aligns a column, `~` lets it wrap: only long words give way on a narrow terminal."""
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="bold"
    )
    for column in columns:
        name = column.lstrip(">~")
        table.add_column(
            name,
            justify="right" if column[0:1] == ">" else "left",
            overflow="fold",
            no_wrap=column[0:1] != "~",
        )
    return table


class View:
    """Follows a study: a live table on a terminal, plain lines elsewhere. Its three methods are the study's listener."""

    def __init__(self, console: Console):
        self.console = console
        self.live: Live | None = None
        self.started = time.monotonic()

    @contextmanager
    def following(self) -> Iterator[View]:
        if not self.console.is_terminal:
            yield self
            return
        with Live(console=self.console, refresh_per_second=4, transient=True) as self.live:
            yield self
        self.live = None

    def say(self, text: str) -> None:
        self.console.print(Text(f"[{clock(time.monotonic() - self.started)}] {text}"))

    def decided(self, stage: str, decision: Mapping[str, Any]) -> None:
        for line in headline(stage, decision):
            self.console.print(
                Text.assemble((f"[{clock(time.monotonic() - self.started)}] {stage} decided: ", "bold"), line)
            )
        for note in decision["notes"]:
            self.console.print(Text(f"    note: {note}", style="yellow"))
        self.newest = next(iter(headline(stage, decision)), "")

    newest = ""

    def watch(self, progress: Any) -> None:
        if self.live is not None:
            self.live.update(self._draw(progress))

    def _draw(self, p: Any) -> RenderableType:
        head = Text.assemble(
            (f"{p.study} · {p.stage}", "bold"),
            f"  {p.done}/{p.total} runs, {p.at_a_time} at a time, stage ETA {clock(p.eta_s)}",
        )
        table = plain_table("run", "", ">step", ">steps/s")
        for r in p.running:
            bar = ProgressBar(total=r["steps"], completed=r["step"], width=24)
            rate = f"{r['steps_per_s']:.1f}" if r["steps_per_s"] else "–"
            table.add_row(
                f"{r['arm']} lr {r['lr']:g} seed {r['seed']}", bar, f"{r['step']}/{r['steps']}", rate
            )
        newest = Text(f"newest decision: {self.newest}", style="dim") if self.newest else Text("")
        return Group(head, table, newest)


def outcome(console: Console, done: Any) -> None:
    """The end of a call: verdict, where everything lies, what failed."""
    if done.acceptance:
        console.print(verdict(done.acceptance))
    if done.ablation:
        console.print(ablation(done.ablation))
    if done.warning:
        console.print(Text(f"warning: {done.warning}", style="yellow"))
    root = done.study.root
    console.print(
        f"{done.trained} run(s) trained in this call; stages decided: {', '.join(done.stages) or 'none'}"
    )
    places = {
        "page": done.study.page_file.name,
        "decisions": done.study.decisions_file.name,
        "verdict": done.study.acceptance_file.name,
        "results": done.study.results_file.name,
        "tables": "summary_*.*",
        "arms": "ablation.*",
        "plots": "*.svg",
        "runs": f"{RUNS}/",
    }
    for what, where in places.items():
        if any(root.glob(where.rstrip("/"))):
            console.print(Text(f"  {what:<10} {root / where}"))
    if done.failed:
        console.print(
            Text(
                f"{len(done.failed)} run(s) failed: `ebc-lab status {done.study.name}` says why.", style="red"
            )
        )


def verdict(acceptance: Mapping[str, Any]) -> RenderableType:
    table = plain_table("verdict", "~question", "~figure", title="Verdict")
    tracks = {line["track"] for line in acceptance["lines"]}
    for line in acceptance["lines"]:
        lead = f"{line['track']}: " if len(tracks) > 1 else ""
        table.add_row(
            Text(line["verdict"], style=VERDICT_STYLE[line["verdict"]]),
            lead + line["question"],
            line["figure"],
        )
    return table


def ablation(decision: Mapping[str, Any]) -> RenderableType:
    """A suite's arms, best first: what each did to the losses, to c, S and beta, and to the KL. Empty columns are left out."""
    rows = []
    for found in decision["tracks"].values():
        ranked = sorted(found["arms"].items(), key=lambda item: item[1]["test_median"] or math.inf)
        rows += [_arm_row(label, arm, found["reference"]) for label, arm in ranked if arm["comparable"]]
        rows += [
            _arm_row(f"({label})", arm, found["reference"]) for label, arm in ranked if not arm["comparable"]
        ]
    used = [c for c in rows[0] if any(row[c] for row in rows)] if rows else []
    title = (
        "Arms (means over seeds; difference in test loss, paired, with its own 95% interval; judged by the interval that holds "
        "for all comparisons at once; in brackets: measured on another text)"
    )
    table = plain_table(*used, title=title)
    for row in rows:
        table.add_row(*(row[c] for c in used))
    return table


def _arm_row(label: str, arm: Mapping[str, Any], reference: str) -> dict[str, str]:
    """Column -> cell; the column's alignment stands before its name."""
    f, d = arm["figures"], arm["difference"]

    def show(key: str, form: str) -> str:
        return "" if f.get(key) is None else format(f[key], form)

    def drift(key: str, form: str) -> str:
        early, late = f.get(f"{key}_early"), f.get(f"{key}_late")
        return "" if early is None or late is None else f"{early:{form}}→{late:{form}}"

    whole = arm["outcomes"].get("completed") == len(arm["runs"])
    gap = (
        "reference"
        if d is None
        else difference(d) + ("" if arm["versus"] == reference else f" vs {arm['versus']}")
    )
    return {
        "arm": label,
        ">val": show("val_loss", ".4f"),
        ">test": show("test_loss", ".4f"),
        "~difference": gap,
        ">detectable": "" if d is None or d["detectable"] is None else f"{d['detectable']:.3f}",
        "judged": "" if d is None else d["judged"],
        ">c": show("c_median", ".2f") if arm["ebc"] else "",
        ">c early→late": drift("c", ".2g") if arm["ebc"] else "",
        ">S early→late": drift("surrogate", ".2g"),
        ">β early→late": drift("beta", ".2g"),
        ">KL": show("kl_median", ".2g"),
        ">KL/δ*": show("kl_ratio_median", ".2g"),
        ">within": show("kl_within_30pct", ".0%"),
        ">peak": show("shock_peak", ".2g"),
        ">recovery": show("shock_recovery_steps", ".0f"),
        ">recovered": show("shock_recovered", ".0%"),
        "outcomes": "" if whole else ", ".join(f"{n} {o}" for o, n in arm["outcomes"].items()),
    }


def difference(d: Mapping[str, Any]) -> str:
    """A paired difference and its interval, short."""
    if d.get("diverged"):
        return f"diverged: {d['diverged']['arm']} of its, {d['diverged']['reference']} of the reference's"
    if d["method"] is None:
        return "no pair"
    return f"{d['mean']:+.3f}" + ("" if d["low"] is None else f" [{d['low']:+.3f}, {d['high']:+.3f}]")


def status(console: Console, found: Mapping[str, Any]) -> None:
    state = Text(found["state"].replace("_", " "), style=STATE_STYLE.get(found["state"], ""))
    console.print(
        Text.assemble(
            (f"{found['study']} ", "bold"), state, f"  ({found['scale']} scale, {found['corpus']['title']})"
        )
    )
    console.print(Text(found["root"], style="dim"))
    if found["corpus"].get("warning"):
        console.print(Text(f"warning: {found['corpus']['warning']}", style="yellow"))
    if found["holder"] is not None:
        h = found["holder"]
        console.print(
            f"run by process {h.get('pid', '?')} on {h.get('host', '?')} since {h.get('since', '?')}"
        )
    if found["queue"]:
        jobs = ", ".join(f"{n} {state.lower()}" for state, n in sorted(found["queue"].items()))
        alone = (
            ""
            if found["holder"] is not None
            else "; nobody drives them: the command that began the study adopts them"
        )
        console.print(Text(f"Slurm jobs: {jobs}{alone}"))
    table = plain_table("stage", "state", ">runs", "~outcomes", "~decided")
    for s in found["stages"]:
        outcomes = ", ".join(f"{s['outcomes'][o]} {o}" for o in OUTCOME_ORDER if o in s["outcomes"])
        table.add_row(s["stage"], s["state"], str(s["runs"]), outcomes, "\n".join(s["decided"]))
    console.print(table)
    for r in found["running"]:
        p = r["progress"]
        console.print(
            Text(
                f"  {r['arm']} seed {r['seed']}: step {p['step']}/{p['steps']}, {p['steps_per_s']:.1f} steps/s"
            )
        )
    if found["state"] in ("running", "interrupted") and found["eta_s"] is not None:
        console.print(f"about {clock(found['eta_s'])} of work left")
    for s in found["stages"]:
        if s["stale_because"]:
            console.print(
                Text(
                    f"{s['stage']} is stale: {s['stale_because']}; {_retrained(s['would_train'])}",
                    style="yellow",
                )
            )
    for problem in found["problems"]:
        console.print(Text(f"problem: {problem}", style="red"))
    for f in found["failures"]:
        console.print(Text(f"{len(f['runs'])} {f['outcome']}: {f['cause']}", style="red"))
        again = f"\n  again: {f['command']}" if f["command"] else ""
        console.print(Text(f"  log {f['log']}{again}", overflow="fold"))
    if found["state"] in ("interrupted", "empty", "stale"):
        console.print("carry on with the command that began it")


def _retrained(runs: int | None) -> str:
    if runs is None:
        return "it is decided again after that"
    return (
        f"{runs} run(s) would be trained"
        if runs
        else "it would be decided again, from the runs that are there"
    )


def why(console: Console, found: Mapping[str, Any]) -> None:
    for stage, d in found.items():
        console.print(Text(f"\n{stage}", style="bold"))
        for line in d["headline"]:
            console.print(Text(f"  {line}"))
        console.print(Text(f"  rule: {d['rule']}", style="dim"))
        if d["stale_because"]:
            console.print(Text(f"  stale: {d['stale_because']}", style="yellow"))
        if stage == "ablation":
            console.print(ablation(d))
        elif stage == "tune":
            console.print(_tuned(d))
        elif stage == "finals":
            console.print(
                verdict({"lines": [{"track": t, **x} for t, f in d["tracks"].items() for x in f["verdict"]]})
            )
        else:
            console.print(_candidates(d))
        for track, floor in d["noise"].items():
            console.print(Text(f"  noise of {track}: {noise_in_words(floor)}"))
        for line in d["flips"]:
            console.print(Text(f"  what would have changed it — {line}"))
        for note in d["notes"]:
            console.print(Text(f"  note: {note}", style="yellow"))


def _tuned(decision: Mapping[str, Any]) -> Table:
    table = plain_table("arm", "best point", ">val loss", ">margin", ">runs", "~edge")
    for found in decision["tracks"].values():
        for label, arm in found["arms"].items():
            point = ", ".join(f"{k} {v:g}" for k, v in arm["point"].items())
            loss = "" if arm["val_loss"] is None else f"{arm['val_loss']:.4f}"
            margin = "" if arm["margin_sigma"] is None else f"{arm['margin_sigma']:.1f} σ"
            table.add_row(
                label,
                point,
                loss,
                margin,
                str(arm["runs"]),
                ", ".join(f"{k}: {e}" for k, e in arm["edges"].items()),
            )
    return table


def _candidates(decision: Mapping[str, Any]) -> Table:
    winners = {d["run_id"] for d in decision["tracks"].values()}
    table = plain_table(
        "", "~arm", "role", ">lr", ">δ*", ">seed", "outcome", ">val loss", ">±", ">c", ">clipped"
    )

    def number(x: float | None, form: str) -> str:
        return "" if x is None else format(x, form)

    for c in decision["candidates"]:
        table.add_row(
            "→" if c["run_id"] in winners else "",
            c["arm"],
            c["role"],
            number(c["lr"], "g"),
            number(c["delta_star"], "g"),
            str(c["seed"]),
            c["outcome"] or "",
            number(c["val_loss"], ".4f"),
            number(c["val_se"], ".4f"),
            number(c["c_median"], ".2f"),
            number(c["clip_rate"], ".0%"),
        )
    return table


def plan(console: Console, found: Mapping[str, Any]) -> None:
    about = f"{found['scale']} scale on {found['device']}, {found['slots']} run(s) at a time"
    console.print(Text.assemble((f"{found['study']} ", "bold"), about))
    if found["changed"]:
        others = "; ".join(found["changed"][:4])
        console.print(
            Text(f"begun with other settings ({others}): autopilot would ask for --force", style="yellow")
        )
    done = ["done"] if found["begun"] else []
    left = "left " if found["begun"] else ""
    columns = (
        "runs min",
        "exp.",
        "max",
        *done,
        "steps exp.",
        "tokens exp.",
        f"time {left}min",
        "exp.",
        "max",
    )
    table = plain_table("stage", *(f">{c}" for c in columns))
    for stage, s in found["stages"].items():
        e = s["expected"]
        times = [clock(s[k]["eta_s"]) for k in ("min", "expected", "max")]
        counts = [str(s[k]["runs"]) for k in ("min", "expected", "max")] + [str(e["done"]) for _ in done]
        table.add_row(stage, *counts, f"{e['steps']:,}", f"{e['tokens']:,}", *times)
    console.print(table)
    known = f"times from {found['eta_from']}" if found["eta_from"] else None
    console.print(
        Text(known or "no speed is known for this shape here: run `ebc-lab doctor` for times", style="dim")
    )


def verified(console: Console, found: Mapping[str, Any]) -> None:
    for bad in found["bad"]:
        console.print(Text(f"{bad['file']}: {bad['what']}", style="red"))
        console.print(Text(f"  {bad['remedy']}", overflow="fold"))
    if found["under_way"]:
        console.print(f"under way or interrupted: {found['unrecorded']} file(s) are not recorded yet")
    if found["growing"]:
        console.print(
            f"{found['growing']} file(s) of runs without a result: not recorded before they have one"
        )
    word = "as recorded" if found["ok"] else f"checked, {len(found['bad'])} wrong"
    console.print(
        Text(f"{found['study']}: {found['files']} file(s) {word}", style="green" if found["ok"] else "red")
    )
    if "sha256" in found:
        console.print(f"sha256 of the bundle: {found['sha256']}", soft_wrap=True)


def exported(console: Console, found: Mapping[str, Any]) -> None:
    console.print(
        Text(
            f"{found['bundle']}: {found['files']} files, {found['bytes'] / 1e6:.1f} MB; checkpoints are not in it"
        )
    )
    console.print(f"sha256: {found['sha256']}", soft_wrap=True)
    console.print(
        f"`ebc-lab verify {found['bundle']}` checks it anywhere; `report` and `why --replay` read it",
        soft_wrap=True,
    )


def compared(console: Console, found: Mapping[str, Any]) -> None:
    """Two studies side by side, what is equal in a few words and what is not in tables."""
    a, b = found["studies"]
    corpora = [f"{c['title']} ({c['sha256'][:12]}…)" for c in found["corpus"]]
    console.print(
        Text(f"corpus: {'the same, ' + corpora[0] if found['same_corpus'] else ' | '.join(corpora)}")
    )
    for what in ("settings", "resolved", "machine"):
        if found[what]:
            console.print(_pairs(what, a, b, [(k, *pair) for k, pair in found[what].items()]))
        else:
            console.print(f"{what}: the same")
    runs = found["runs"]
    equal = f"{runs['common']} in common, of which {runs['equal']} with equal results"
    console.print(f"runs: {runs['counts'][0]} and {runs['counts'][1]}, {equal}")
    for run_id, keys in runs["different"].items():
        console.print(
            Text(f"  {run_id}: {', '.join(f'{k} {x!r} | {y!r}' for k, (x, y) in list(keys.items())[:3])}")
        )
    rows = [
        (f"{stage} {track}: {figure}", *pair)
        for stage, tracks in found["decisions"].items()
        for track, figures in tracks.items()
        for figure, pair in figures.items()
    ]
    if rows:
        console.print(_pairs("decision", a, b, rows))
    if found["verdict"]:
        table = plain_table("verdict", a, "", b, "", "", title="Verdict")
        for line in found["verdict"]:
            cells = [Text(v or "–", style=VERDICT_STYLE.get(v or "", "")) for v in line["verdict"]]
            (x, y), flip = line["figure"], Text("flipped" if line["flipped"] else "", style="bold")
            table.add_row(f"{line['track']}: {line['name']}", cells[0], x or "", cells[1], y or "", flip)
        console.print(table)
    if found["arms"]:
        table = plain_table("~arm", f">{a}", f">{b}", ">difference", title="Mean test loss")
        for arm, f in found["arms"].items():
            losses = ["–" if x is None else f"{x:.4f}" for x in f["test_loss"]]
            table.add_row(arm, *losses, "–" if f["difference"] is None else f"{f['difference']:+.4f}")
        console.print(table)


def _pairs(what: str, a: str, b: str, rows: Sequence[tuple[str, Any, Any]]) -> Table:
    """(name, in a, in b), what differs in bold."""
    table = plain_table(f"~{what}", f"~{a}", f"~{b}")
    for name, *pair in rows:
        shown = [f"{x:.6g}" if isinstance(x, float) else "–" if x is None else str(x) for x in pair]
        table.add_row(name, *shown, style="bold" if pair[0] != pair[1] and what == "decision" else "")
    return table


def doctor(console: Console, found: Mapping[str, Any]) -> None:
    h = found["hardware"]
    console.print(
        Text(
            f"machine    {h['host']}: {h['cpu']}, {h['cores']} cores, GPUs: {', '.join(h['gpus']) or 'none'}"
        )
    )
    console.print(Text("versions   " + ", ".join(f"{k} {v}" for k, v in found["versions"].items())))
    if "corpus" in found:
        c = found["corpus"]
        console.print(
            Text(
                f"corpus     {c['name']}: {c['source']}, {c['characters']:,} characters, sha256 {c['sha256'][:12]}…"
            )
        )
    if "speed" in found:
        _speed(console, found["speed"])
    if "packing" in found:
        console.print(Text(f"packing    {packing_in_words(found['packing'])}"))
    o = found["output"]
    console.print(
        Text(
            f"output     {o['path']}: {'writable' if o['writable'] else 'NOT writable'}, {o['free_gb']} GB free"
        )
    )
    console.print(Text(f"slurm      {'sbatch is here' if found['slurm'] else 'no sbatch here'}"))
    for problem in found["problems"]:
        console.print(Text(f"problem    {problem}", style="red"))


def _speed(console: Console, s: Mapping[str, Any]) -> None:
    table = plain_table(
        ">runs at once",
        ">threads each",
        "~dtype",
        ">steps/s together",
        title=f"speed: {s['scale']} shape on {s['device']}",
    )
    for r in sorted(s["rates"], key=lambda r: (r["threads"], r["processes"], r["dtype"])):
        table.add_row(str(r["processes"]), str(r["threads"]), r["dtype"], f"{r['steps_per_s']:.1f}")
    console.print(table)
    for c in s["compile"]:
        steps = f"a step of {c['eager_ms']:.1f} ms takes {c['compiled_ms']:.1f} ms"
        console.print(
            f"compiling at {c['threads']} thread(s) in {c['dtype']}: {c['compile_s']:.0f} s, then {steps}"
        )
    for what, name in (("study", "a study takes"), ("single_run", "one run takes")):
        for setting, reason in s[what]["why"].items():
            console.print(Text(f"{name}  {setting}={s[what][setting]}: {reason}", overflow="fold"))
    for setting, rule in s["rules"].items():
        console.print(Text(f"rule       {setting}: {rule}", style="dim", overflow="fold"))


def corpus(console: Console, found: Mapping[str, Any]) -> None:
    for key, value in found.items():
        if value is not None:
            console.print(Text(f"{key:<11} {value}"))
