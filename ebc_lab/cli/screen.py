"""What the terminal shows: the live view, decisions, the verdict, status, plan and doctor, by rich."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ebc_lab.config.errors import clock, visible
from ebc_lab.config.schema import Config
from ebc_lab.records.columns import BITS
from ebc_lab.records.decisions import Decision
from ebc_lab.records.figures import FINISHED, RunResult
from ebc_lab.report.kinds import Evidence, kind_of
from ebc_lab.report.text import table as model
from ebc_lab.report.text.words import explained, optimizer, plural, size, tracks_in_words
from ebc_lab.study.inspect.reproduce import decides_all, deciding, ways_to_decide
from ebc_lab.study.inspect.slots import in_words as slots_in_words
from ebc_lab.study.inspect.slots import timeline
from ebc_lab.study.inspect.why import noise_in_words
from ebc_lab.study.so_far import NOTHING
from ebc_lab.study.stages.stage import concluding_stages, stage_of
from ebc_lab.study.store.changes import describe_earlier_looks
from ebc_lab.study.store.counts import in_words as runs_in_words
from ebc_lab.study.store.study import RETRIED, recorded_config

from .options import live

LINE_EVERY_S = 60.0  # how far a study is, where there is no terminal
BAR, LEAST_WITH_BAR = 24, 100  # characters of a bar, and of the terminal that has room for it
VERDICT_STYLE = {"pass": "green", "fail": "red", "undecided": "yellow"}
STATE_STYLE = {
    "running": "cyan",
    "finished": "green",
    "finished_with_failures": "yellow",
    "interrupted": "yellow",
    "stale": "yellow",
}
OUTCOME_ORDER = (*FINISHED, "failed", "oom", "lost", "cancelled", "open")


class PlainTable(Table):
    """A table whose cells are shown as they are: nothing in a text is markup, and no figure is cut.

    Where room is too short, texts that should stay on one line are folded, and then long titles of figures.
    """

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        texts = [column for column in self.columns if column.justify == "left"]
        figures = [column for column in self.columns if column.justify != "left"]
        for columns in (texts, figures):
            if self._least_width() > options.max_width:
                for column in columns:
                    column.no_wrap = False
        yield from super().__rich_console__(console, options)

    def _least_width(self) -> int:
        """Return the characters of a line in which columns that do not wrap stay on one."""
        widths = []
        for column in self.columns:
            texts = [part.plain for part in (column.header, *column.cells) if isinstance(part, Text)]
            pieces = texts if column.no_wrap else [word for text in texts for word in text.split()]
            widths.append(column.width or max(map(cell_len, pieces), default=0))
        return sum(widths) + 2 * (len(widths) - 1)

    def add_row(self, *cells: RenderableType | None, **how: Any) -> None:
        super().add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells), **how)


def plain_table(*columns: str, title: str | None = None) -> Table:
    """Return an empty table; `>` right-aligns a column, `~` lets it wrap, so that others keep their width."""
    table = PlainTable(
        title=Text(title) if title else None,
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        header_style="bold",
    )
    for column in columns:
        name = column.lstrip(">~")
        table.add_column(
            Text(name),
            justify="right" if column[0:1] == ">" else "left",
            overflow="fold",
            no_wrap=column[0:1] != "~",
        )
    return table


class View:
    """Follows a study, as its listener: a live table on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console):
        self.console = console
        self.display: Any = None
        self.started = time.monotonic()
        self.printed_at = self.started
        self.newest = ""  # decision, in a line
        self.watched = False  # it has trained
        self.early = ("", "")  # the newest line about a stage that was not decided yet: the stage, the line

    @contextmanager
    def following(self) -> Iterator[View]:
        with live(self.console, refresh_per_second=4, transient=True) as self.display:
            yield self
        self.display = None

    def say(self, text: str) -> None:
        self._line(Text(f"[{clock(time.monotonic() - self.started)}] {visible(text)}"))

    def _line(self, text: Text) -> None:
        """Print a line; in a file or a pipe it is not broken, so that it can be searched."""
        self.console.print(text, soft_wrap=not self.console.is_terminal)

    def decided(self, stage: str, decision: Decision) -> None:
        headlines = [tracks_in_words(line) for line in stage_of(stage).headlines(decision)]
        for line in headlines:
            since = clock(time.monotonic() - self.started)
            self._line(Text.assemble((f"[{since}] {stage} decided: ", "bold"), line))
        for note in decision["notes"]:
            self._line(Text(f"    note: {tracks_in_words(note)}", style="yellow"))
        self.newest = next(iter(headlines), "")

    def watch(self, progress: Any) -> None:
        self.watched = True
        if self.display is not None:
            self.display.update(self._draw(progress))
            return
        due = time.monotonic() - self.printed_at >= LINE_EVERY_S
        if due:
            self.printed_at = time.monotonic()
            self.say(f"{progress.stage}: {how_far(progress)}")
        stage, line = self.early
        now = progress.so_far
        at_last = line.startswith(NOTHING) and not now.startswith(NOTHING)
        if now and now != line and (due or at_last or stage != progress.stage):
            self.early = progress.stage, now
            self.say(f"{progress.stage} so far: {tracks_in_words(now)}")

    def _draw(self, p: Any) -> RenderableType:
        head = Text.assemble((f"{p.study} · {p.stage}", "bold"), f"  {how_far(p)}")
        early = [Text(f"so far: {tracks_in_words(p.so_far)}")] if p.so_far else []
        newest = Text(f"newest decision: {self.newest}" if self.newest else "", style="dim", no_wrap=True)
        newest.overflow = "ellipsis"
        runs = [running_rows(p.running, self.console.width)] if p.running else []
        return Group(head, *early, *runs, newest)


def how_far(p: Any) -> str:
    """Return `12 of about 27 runs, 2 at a time, 40 s left`, without what is not known."""
    if p.measuring:
        return f"{plural(p.done, 'run')} done, measuring time, one after another"
    whole = plural(p.done, "run") if p.total is None else f"{p.done} of about {plural(p.total, 'run')}"
    left = "" if p.left_s is None else f", {clock(p.left_s)} left"
    return f"{whole}, {p.at_a_time} at a time{left}"


def running_rows(running: Sequence[Mapping[str, Any]], width: int) -> RenderableType:
    """Return a row for each run in progress, with a bar where there is room for one."""
    table = plain_table("arm", ">lr", ">seed", ">step", ">steps/s")
    if width >= LEAST_WITH_BAR:
        table.add_column(width=BAR)
    for r in running:
        speed = f"{r['steps_per_s']:.1f}" if r["steps_per_s"] else "–"
        cells = [r["arm"], f"{r['lr']:g}", str(r["seed"]), f"{r['step']}/{r['steps']}", speed]
        bar = [ProgressBar(total=r["steps"], completed=r["step"])] if width >= LEAST_WITH_BAR else []
        table.add_row(*cells, *bar)
    return table


def outcome(console: Console, done: Any) -> None:
    """Print what a call came to and where that lies; last the answer, the page, the next command."""
    if done.acceptance:
        text = " ".join(line["question"] + line["figure"] for line in done.acceptance["lines"])
        for term, meaning in explained(text).items():
            console.print(Text(f"  {term}: {meaning}", style="dim"))
    config = recorded_config(done.study.header())
    for decision in done.decisions.values():
        if kind_of(decision).concludes:
            found = Evidence(decision, config, done.study.decisions(), done.study.results_of(decision))
            console.print(evidence(found))
    stages = ", ".join(done.stages) or "none"
    console.print(f"in this call: {runs_in_words(done.runs)}; stages decided: {stages}")
    if busy := timeline(done.study.records()):
        console.print(slots_in_words(busy.use))
    console.print(Text(f"in {done.study.root}", style="dim"))
    if done.warning:
        console.print(Text(f"warning: {done.warning}", style="yellow"))
    if done.failed:
        why = f"`ebc-lab status {shlex.quote(done.study.called)}` says why"
        console.print(Text(f"{len(done.failed)} run(s) failed: {why}.", style="red"))
    _last_words(console, done)


def _last_words(console: Console, done: Any) -> None:
    """Print the answer, where the page is, what would decide more, and the next command."""
    console.print()
    study, header = done.study, done.study.header()
    last = done.decisions[list(done.decisions)[-1]] if done.decisions else None
    if last and kind_of(last).concludes:
        config = recorded_config(header)
        print_answers(console, config, done.decisions, study.results_of(last))
    else:
        for line in done.answer:
            console.print(Text.assemble(("answer  ", "bold"), tracks_in_words(line)))
    if warned := describe_earlier_looks(header):
        console.print(Text(f"        {warned}", style="yellow"))
    if study.page_file.exists():
        console.print(Text.assemble(("page    ", "bold"), str(study.page_file)), soft_wrap=True)
    if more := deciding(study, header, done.decisions):
        console.print(Text.assemble(("decide  ", "bold"), more), soft_wrap=True)
        if not decides_all(ways_to_decide(done.decisions)):
            console.print(
                "        (a part: no number of seeds that a study takes is known to decide the rest)"
            )
    why = f"ebc-lab why {shlex.quote(study.called)}"
    console.print(Text.assemble(("next    ", "bold"), why), soft_wrap=True)
    console.print(Text(f"        python: ebc_lab.load({study.called!r}).runs()"), soft_wrap=True)


def draw_table(table: model.Table) -> Table:
    """Return a table of the report as the terminal shows it."""
    shown = table.on(model.TERMINAL)
    columns = (MARKS.get(c.kind, "") + (c.short or c.title) for c in shown.columns)
    made = plain_table(*columns, title=table.title)
    for row in shown.rows:
        made.add_row(*map(_cell, row.cells), style="bold" if row.chosen else "")
    return made


LEAST_GPU_HOURS = 0.1  # of an estimate that a plan tells
MARKS = {"figure": ">", "prose": "~"}  # of `plain_table`


def _cell(cell: model.Cell) -> Text:
    note = f" ({cell.note})" if cell.note and not cell.page else ""
    return Text(cell.text + note, style=VERDICT_STYLE.get(cell.tone, ""))


def print_answers(
    console: Console, config: Config, decisions: Mapping[str, Decision], results: Mapping[str, RunResult]
) -> None:
    """Print the answer on each track, and what it rests on, one line each."""
    for stage in concluding_stages(decisions):
        found = Evidence(decisions[stage], config, decisions, results)
        for answer in kind_of(found.decision).answers(found):
            whose = f"{optimizer(answer.track)}: " if len(found.tracks) > 1 else ""
            word = " " * 8 if answer.adds else "answer  "
            console.print(Text.assemble((word, "bold"), whose + answer.sentence))
            for finding in answer.findings:
                console.print(Text(f"        {finding}"))


def evidence(found: Evidence) -> RenderableType:
    """Return the tables of a decision, each above its note where the decision concludes something."""
    made: list[RenderableType] = []
    kind = kind_of(found.decision)
    for table in kind.tables(found):
        if model.TERMINAL in table.places:
            made.append(draw_table(table))
            if kind.concludes and (note := table.on(model.TERMINAL).note):
                made.append(Text(note, style="dim"))
    return Group(*made)


def status(console: Console, state: Mapping[str, Any]) -> None:
    """Print how far a study is, what is wrong with it, and the command that continues it."""
    _print_header(console, state)
    table = plain_table("stage", "state", ">runs", "~outcomes", "~decided")
    for s in state["stages"]:
        outcomes = ", ".join(f"{s['outcomes'][o]} {o}" for o in OUTCOME_ORDER if o in s["outcomes"])
        decided = tracks_in_words("\n".join(s["decided"]))
        table.add_row(s["stage"], s["state"], str(s["runs"]), outcomes, decided)
    console.print(table)
    console.print(Text(runs_in_words(state["runs"])))
    for r in state["running"]:
        p = r["progress"]
        step = f"step {p['step']}/{p['steps']}, {p['steps_per_s']:.1f} steps/s"
        console.print(Text(f"  {r['arm']} seed {r['seed']}: {step}"))
    if early := state["so_far"]:
        said = tracks_in_words(early["line"])
        console.print(Text.assemble(("so far  ", "bold"), f"{early['stage']}: {said}"), soft_wrap=True)
    if state["state"] in ("running", "interrupted") and state["eta_s"] is not None:
        console.print(f"about {clock(state['eta_s'])} of work left")
    if state["slots"]:
        console.print(Text(slots_in_words(state["slots"]), style="dim"), soft_wrap=True)
    for s in state["stages"]:
        if s["stale_because"]:
            stale = f"{s['stage']} is stale: {s['stale_because']}; {_retrained(s['would_train'])}"
            console.print(Text(stale, style="yellow"), soft_wrap=True)
    for problem in state["problems"]:
        console.print(Text(f"problem: {problem}", style="red"), soft_wrap=True)
    for f in state["failures"]:
        console.print(Text(f"{len(f['runs'])} {f['outcome']}: {f['cause']}", style="red"))
        again = f"\n  again: {f['command']}" if f["command"] else ""
        console.print(Text(f"  log {f['log']}{again}"), soft_wrap=True)
    if state["continue"]:
        does = "trains it anew, in another study" if state["anew"] else "continues the study"
        console.print(f"this {does}:\n  {state['continue']}", soft_wrap=True, markup=False)


def state_in_words(status_of: Mapping[str, Any]) -> Text:
    """Return a study's state; of one that is not finished and whose runs have failed, how they failed."""
    state = status_of["state"]
    words = state.replace("_", " ")
    failures = [f for f in status_of["failures"] if f["outcome"] not in RETRIED]
    if state == "interrupted" and failures:
        runs = plural(sum(len(failure["runs"]) for failure in failures), "run")
        words = f"stopped, {runs} failed ({failures[0]['cause']})"
    return Text(words, style=STATE_STYLE.get(state, ""))


def _print_header(console: Console, status_of: Mapping[str, Any]) -> None:
    """Print which study it is, its state, and who drives it."""
    state = state_in_words(status_of)
    about = f"  ({status_of['scale']} scale, {status_of['corpus']['title']})"
    console.print(Text.assemble((f"{status_of['study']} ", "bold"), state, about))
    console.print(Text(status_of["root"], style="dim"))
    for warning in filter(None, (status_of["corpus"].get("warning"), status_of["upgraded"])):
        console.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)
    if (h := status_of["holder"]) is not None:
        pid, host, since = (h.get(key, "?") for key in ("pid", "host", "since"))
        console.print(f"run by process {pid} on {host} since {since}")
    for w in status_of["joined"]:
        on = f", on {', '.join(w['run_ids'])}" if w["run_ids"] else ""
        console.print(Text(f"worker {w['worker']} has joined from {w['host']}{on}"), soft_wrap=True)
    if status_of["queue"]:
        jobs = ", ".join(f"{n} {state.lower()}" for state, n in sorted(status_of["queue"].items()))
        alone = "; no process drives them: the command that began the study adopts them"
        console.print(Text(f"Slurm jobs: {jobs}{alone if h is None else ''}"))


def cancelled(ending: Mapping[str, Any], state: Mapping[str, Any]) -> str:
    """Return what was stopped, and what continues it; or that the study has ended already, by its `state`."""
    name, command = ending["study"], ending["continue"] or "the command that began it"
    if not (ending["driver"] or ending["jobs"] or ending["runs"]):
        nothing, failed = "so there is nothing to cancel", state["failures"]
        if state["state"].startswith("finished"):
            lost = sum(len(f["runs"]) for f in failed)
            but = f", though {plural(lost, 'run')} failed" if lost else ""
            found = f"`ebc-lab why {shlex.quote(state['root'])}` says what it found"
            return f"{name} has finished already{but}, {nothing}: {found}"
        before = any(f["outcome"] == "cancelled" for f in failed)
        how = "was cancelled already" if before else "is not running"
        return f"{name} {how}, {nothing}; this continues it from the checkpoints:\n  {command}"
    stopped = f"{plural(len(ending['runs']), 'run')} stopped before the end"
    runs = stopped if ending["runs"] else "no run to stop"
    jobs = f", {plural(ending['jobs'], 'Slurm job')} ended" if ending["jobs"] else ""
    return f"{name}: cancelled; {runs}{jobs}; this continues from the checkpoints:\n  {command}"


def _retrained(runs: int | None) -> str:
    if runs is None:
        return "it is decided again after that"
    if runs:
        return f"{runs} run(s) would be trained"
    return "it would be decided again, from the runs that are there"


def why(console: Console, reasons: Mapping[str, Any], config: Config) -> None:
    """Print the answer, and decisions with their evidence."""
    last = list(reasons)[-1]
    if len(reasons) > 1 and kind_of(reasons[last]).concludes:
        print_answers(console, config, reasons, {})
    for stage, d in reasons.items():
        console.print(Text(f"\n{stage}", style="bold"))
        for line in d["headline"]:
            console.print(Text(f"  {tracks_in_words(line)}"))
        console.print(Text(f"  rule: {d['rule']}", style="dim"))
        if d["stale_because"]:
            console.print(Text(f"  stale: {d['stale_because']}", style="yellow"))
        console.print(evidence(Evidence(d, config)))
        for track, floor in d["noise"].items():
            console.print(Text(f"  noise of {optimizer(track)}: {noise_in_words(floor)}"))
        for line in d["flips"]:
            console.print(Text(f"  what would have changed it — {tracks_in_words(line)}"))
        if d["decide"]:
            what = "it" if decides_all(ways_to_decide({stage: d})) else "a part of it"
            console.print(Text(f"  what would decide {what} — {d['decide']}"), soft_wrap=True)
        for note in d["notes"]:
            console.print(Text(f"  note: {tracks_in_words(note)}", style="yellow"))


def plan(console: Console, forecast: Mapping[str, Any], overrides: Sequence[str]) -> None:
    about = f"{forecast['scale']} scale on {forecast['device']}, {forecast['slots']} run(s) at a time"
    about += f", on {forecast['text']}" if forecast["text"] else ""
    console.print(Text.assemble((f"{forecast['study']}: ", "bold"), about))
    if forecast["changed"]:
        others = "; ".join(forecast["changed"][:4])
        begun = f"begun with other settings ({others}): autopilot would ask for --force"
        console.print(Text(begun, style="yellow"))
    if forecast["beyond_sensible"]:
        console.print(Text(forecast["beyond_sensible"], style="yellow"))
    copied = any(s["expected"]["copied"] for s in forecast["stages"].values())
    done = ["done"] * forecast["begun"] + ["copied"] * copied
    left = "left " if done else "time "
    columns = ("runs min", "exp.", "max", *done, "steps", "tokens", f"{left}min", "exp.", "max")
    table = plain_table("stage", *(f">{c}" for c in columns))
    for stage, s in forecast["stages"].items():
        e = s["expected"]
        times = [clock(s[k]["eta_s"]) for k in ("min", "expected", "max")]
        counts = [str(s[k]["runs"]) for k in ("min", "expected", "max")] + [str(e[key]) for key in done]
        table.add_row(stage, *counts, f"{e['steps']:,}", f"{e['tokens']:,}", *times)
    console.print(table)
    if forecast["eta_from"]:
        source = f"times from {forecast['eta_from']}"
    elif forecast["launcher"] == "slurm":
        source = "times are known once a run has finished: this machine's speed says nothing about the nodes"
    else:
        source = "for times, first measure the speed at this shape (about ten seconds): "
        source += shlex.join(["ebc-lab", "doctor", *overrides])
    console.print(Text(source, style="dim", overflow="fold"), soft_wrap=True)
    for line in _gpu_hours(forecast):
        console.print(Text(line, overflow="fold"), soft_wrap=True)


def _gpu_hours(forecast: Mapping[str, Any]) -> Iterator[str]:
    """Say how many GPU hours a plan comes to: as measured, else as estimated where that is not nothing."""
    total = forecast["stages"]["total"]
    measured, estimated = ({k: s[key] for k, s in total.items()} for key in ("gpu_hours", "flop_hours"))
    if measured["expected"] is not None:
        yield f"GPU hours: {_hours(measured)}, from {forecast['eta_from']}"
    elif estimated["expected"] is not None and estimated["expected"] >= LEAST_GPU_HOURS:
        yield (
            f"GPU hours: about {_hours(estimated)}, an estimate and no measurement: "
            f"{forecast['gpu_hours_from']}, without evaluations and what EBC measures"
        )


def _hours(hours: Mapping[str, float]) -> str:
    least, expected, most = (f"{hours[k]:,.3g}" for k in ("min", "expected", "max"))
    return expected if least == expected == most else f"{expected} ({least} to {most})"


def verified(console: Console, verdict: Mapping[str, Any]) -> None:
    for bad in verdict["bad"]:
        console.print(Text(f"{bad['file']}: {bad['what']}", style="red"))
        console.print(Text(f"  {bad['remedy']}", overflow="fold"))
    if verdict["under_way"]:
        console.print(f"in progress or interrupted: {verdict['unrecorded']} file(s) are not recorded yet")
    if verdict["growing"]:
        growing = f"{verdict['growing']} file(s) of runs without a result"
        console.print(f"{growing}: recorded once the result is there")
    word = "as recorded" if verdict["ok"] else f"checked, {len(verdict['bad'])} wrong"
    style = "green" if verdict["ok"] else "red"
    console.print(Text(f"{verdict['study']}: {verdict['files']} file(s) {word}", style=style))
    if "sha256" in verdict:
        console.print(f"sha256 of the bundle: {verdict['sha256']}", soft_wrap=True)


def exported(console: Console, bundle: Mapping[str, Any]) -> None:
    path = bundle["bundle"]
    content = f"{bundle['files']} files and their manifest, {size(bundle['bytes'])}"
    console.print(Text(f"{path}: {content}; checkpoints are not in it"))
    console.print(f"sha256: {bundle['sha256']}", soft_wrap=True)
    if bundle["replaced"]:
        console.print(Text(f"replaced {path} (sha256 {bundle['replaced']})", style="yellow"), soft_wrap=True)
    read = "`report` and `why --replay` read it"
    console.print(f"`ebc-lab verify {shlex.quote(path)}` checks it anywhere; {read}", soft_wrap=True)


COMPARED = {  # what is compared of two studies -> in words
    "settings": "settings",
    "resolved": "device, dtype, threads and compiling",
    "machine": "machine and versions",
}


def compared(console: Console, comparison: Mapping[str, Any]) -> None:
    """Print two studies side by side, what is equal in a few words and what is not in tables."""
    a, b = comparison["studies"]
    for name, lines in zip(comparison["studies"], comparison["answers"], strict=True):
        for line in lines:
            console.print(Text.assemble((f"{name}: ", "bold"), line))
    corpora = [f"{c['title']} ({c['sha256'][:12]}…)" for c in comparison["corpus"]]
    corpus = f"the same, {corpora[0]}" if comparison["same_corpus"] else " | ".join(corpora)
    console.print(Text(f"corpus: {corpus}"))
    rows = [(f"{arm} tuned to", *pair) for arm, pair in comparison["tuned"].items()]
    for what, words in COMPARED.items():
        how = ", as run" if what == "resolved" else ""
        rows += [(key + how, *pair) for key, pair in comparison[what].items()]
        if not comparison[what]:
            console.print(f"{words}: the same")
    runs = comparison["runs"]
    equal = f"{runs['common']} training runs in common, of which {runs['equal']} with equal results"
    weights = runs["weights"]
    equal += f"; {weights['equal']} of {weights['compared']} with the same weights_checksum"
    console.print(f"runs: {'; '.join(map(runs_in_words, runs['counts']))}; {equal}")
    for run_id, keys in runs["different"].items():
        differing = ", ".join(f"{k} {x!r} | {y!r}" for k, (x, y) in list(keys.items())[:3])
        console.print(Text(f"  {run_id}: {differing}"))
    for stage, tracks in comparison["decisions"].items():
        for track, figures in tracks.items():
            rows += [(f"{stage} {optimizer(track)}: {key}", *pair) for key, pair in figures.items()]
    if rows:
        table = plain_table("~what differs in bold", f"~{a}", f"~{b}")
        for name, *pair in rows:
            shown = [f"{x:.6g}" if isinstance(x, float) else str("–" if x is None else x) for x in pair]
            table.add_row(name, *shown, style="bold" if pair[0] != pair[1] else "")
        console.print(table)
    if comparison["verdict"]:
        table = plain_table("verdict", "", f"~{a}", "", f"~{b}", "", title="Verdict")
        for line in comparison["verdict"]:
            cells = [Text(v or "–", style=VERDICT_STYLE.get(v or "", "")) for v in line["verdict"]]
            (x, y), flip = line["figure"], Text("flipped" if line["flipped"] else "", style="bold")
            name = f"{optimizer(line['track'])}: {line['name']}"
            table.add_row(name, cells[0], x or "", cells[1], y or "", flip)
        console.print(table)
    if comparison["arms"]:
        bits_compared = any(BITS in f for f in comparison["arms"].values())
        title = "Mean test loss, and bits per character" if bits_compared else "Mean test loss"
        table = plain_table("~arm", f">{a}", f">{b}", ">difference", title=title)
        for arm, f in comparison["arms"].items():
            losses = ["–" if x is None else f"{x:.4f}" for x in f["test_loss"]]
            bits = ["" if x is None else f" ({x:.3f})" for x in f.get(BITS, (None, None))]
            both = map("".join, zip(losses, bits, strict=True))
            table.add_row(arm, *both, "–" if f["difference"] is None else f"{f['difference']:+z.4f}")
        console.print(table)


def doctor(console: Console, examination: Mapping[str, Any]) -> None:
    """Print a line or a table for each thing that was examined."""

    def tell(about: str, fact: str, style: str = "") -> None:
        console.print(Text(f"{about:<11}{fact}", style=style))

    h = examination["hardware"]
    tell("machine", f"{h['host']}: {h['cpu']}, {h['cores']} cores, GPUs: {', '.join(h['gpus']) or 'none'}")
    tell("versions", ", ".join(f"{k} {v}" for k, v in examination["versions"].items()))
    if "corpus" in examination:
        c = examination["corpus"]
        text = f"{c['characters']:,} characters, sha256 {c['sha256'][:12]}…"
        tell("corpus", f"{c['name']}: {c['source']}, {text}")
    if "speed" in examination:
        _speed(console, examination["speed"])
    tell("verity", f"engine {examination['verity']}")
    o = examination["output"]
    writable = "writable" if o["writable"] else "NOT writable"
    tell("output", f"{o['path']}: {writable}, {o['free_gb']} GB free")
    tell("slurm", "sbatch is here" if examination["slurm"] else "no sbatch here")
    for problem in examination["problems"]:
        tell("problem", problem, "red")


def _speed(console: Console, s: Mapping[str, Any]) -> None:
    when = "measured here before, from the cache" if s["cached"] else "measured now"
    title = f"speed: {s['scale']} shape on {s['device']}, {when}"
    table = plain_table(">runs at once", ">threads each", "~dtype", ">total steps/s", title=title)
    for r in sorted(s["rates"], key=lambda r: (r["threads"], r["processes"], r["dtype"])):
        table.add_row(str(r["processes"]), str(r["threads"]), r["dtype"], f"{r['steps_per_s']:.1f}")
    console.print(table)
    for c in s["compile"]:
        steps = f"a step of {c['eager_ms']:.1f} ms takes {c['compiled_ms']:.1f} ms"
        shape = f"compiling at {c['threads']} thread(s) in {c['dtype']}"
        console.print(f"{shape}: {c['compile_s']:.0f} s, then {steps}")
    for what, name in (("study", "a study uses"), ("single_run", "one run uses")):
        for setting, reason in s[what]["why"].items():
            console.print(Text(f"{name}  {setting}={s[what][setting]}: {reason}", overflow="fold"))
    for setting, rule in s["rules"].items():
        console.print(Text(f"rule       {setting}: {rule}", style="dim", overflow="fold"))


def corpus(console: Console, facts: Mapping[str, Any]) -> None:
    for key, value in facts.items():
        if value is not None:
            console.print(Text(f"{key:<11} {value}"))
